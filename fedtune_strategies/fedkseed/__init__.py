"""FedKSeed and FedKSeed-Pro (arXiv 2312.06353): the model is a point in the space of K seeded directions."""
