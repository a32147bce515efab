"""A whole federation on one machine, each side as processes of its own, with every node's bytes counted."""
