"""Flower's programs as FedTune starts them: each interface asks for a secret, and no code arrives over the network."""
