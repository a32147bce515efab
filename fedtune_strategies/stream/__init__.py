"""One long-lived TLS gRPC stream from each node's worker to the run's ServerApp, beside Flower's messages.

`offer` says where the stream is and who may open it, `frames` what it carries, `connection` how both sides keep it;
`server` is the ServerApp's side, `grid` the Flower Grid over both ways. The node's side is `client_app.stream`.
"""
