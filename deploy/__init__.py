"""What operators and device owners run: the ``fedtune`` command and the processes it looks after."""
