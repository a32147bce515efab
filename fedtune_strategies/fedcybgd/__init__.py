"""FedCyBGD (arXiv 2406.11187): nodes train one block of the model in turn and exchange that block alone."""
