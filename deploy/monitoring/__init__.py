"""Monitoring: what Prometheus asks of a server and of a node, and the dashboard that shows it."""
