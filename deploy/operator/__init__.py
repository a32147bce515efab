"""An operator's side: the server that nodes join, who may join, and the runs."""
