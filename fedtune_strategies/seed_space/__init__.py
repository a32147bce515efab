"""Seed space: a tuned model as a point theta in R^K along K fixed random directions. See docs/seed-space.md."""

from fedtune_strategies.seed_space.parameters import (
    combine_fingerprints,
    fingerprint,
    tensor_fingerprint,
    tuned_parameters,
)
from fedtune_strategies.seed_space.pool import GaussianPool, Pool, WalshPool, make_pool

__all__ = [
    "GaussianPool",
    "Pool",
    "WalshPool",
    "combine_fingerprints",
    "fingerprint",
    "make_pool",
    "tensor_fingerprint",
    "tuned_parameters",
]
