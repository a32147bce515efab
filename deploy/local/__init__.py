"""A whole federation on one machine, each side as its own processes, with every node's bytes counted."""
