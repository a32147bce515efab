"""A device owner's side: joining a federation, and the node that takes part in it."""
