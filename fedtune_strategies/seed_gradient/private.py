"""Differentially private slopes along all directions: each example's are bounded, and noise is added on the node.

What DPZero (arXiv 2310.09639) does with one slope and DP-SGD (arXiv 1607.00133) with a whole gradient, in between: the
noise is as large along each of K directions, so a smaller K leaves more of the slopes.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def private_sum(examples: Iterable[Tensor], clip: float, noise_multiplier: float, size: int) -> Tensor:
    """Sum the examples' slopes, float64 [K], each of a norm of at most `clip`, and add noise; there may be no example.

    One example more or less changes the sum by at most `clip` in the 2-norm; the noise is normal along each direction,
    with standard deviation ``noise_multiplier * clip``. It comes from the operating system, so nobody can replay it. An
    example whose slopes are not finite counts as 0, so that it cannot be seen either.
    """
    total = torch.zeros(size, dtype=torch.float64)
    for g in examples:
        norm = float(g.norm())
        if norm < np.inf:  # false for NaN too
            total.add_(g, alpha=min(1.0, clip / norm) if norm else 0.0)
    return total.add_(torch.from_numpy(_normal(size)), alpha=noise_multiplier * clip)


def _normal(count: int) -> NDArray[np.float64]:
    """Standard normal numbers from the operating system's random bits (Box-Muller)."""
    bits = np.frombuffer(secrets.token_bytes(16 * count), dtype=np.uint64).reshape(2, count)
    radius, angle = ((bits >> np.uint64(11)) + 0.5) * 2.0**-53
    return np.asarray(np.sqrt(-2 * np.log(radius)) * np.cos(2 * np.pi * angle))
