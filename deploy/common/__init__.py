"""What all sides stand on: processes, keys, Flower's programs, addresses, private files, a small web server."""
