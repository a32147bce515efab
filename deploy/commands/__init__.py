"""The commands of ``fedtune``, a module per group. They read options, call the rooms and print; they decide nothing."""
