"""What runs on a device owner's machine: a thin Flower ``ClientApp`` and the resident worker behind it."""
