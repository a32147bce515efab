"""FedKSeed-Pro (arXiv 2312.06353, algorithm 2): FedKSeed with seeds drawn by what they have brought."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import Strategy
from numpy.typing import NDArray
from torch import Tensor

from fedtune_strategies.fedkseed.config import FedKSeedProRunConfig
from fedtune_strategies.fedkseed.seed_draws import levels
from fedtune_strategies.fedkseed.strategy import FedKSeed
from fedtune_strategies.strategy import State

# The published code clips a scalar to this before it enters the mean amplitude of its seed.
AMPLITUDE_LIMIT = 1000.0


class FedKSeedPro(FedKSeed):
    """FedKSeed whose nodes draw seeds by the amplitude that their scalars had (arXiv 2312.06353, section 4.3).

    The odds are a softmax of the min-max normalised mean amplitude, so the likeliest seed is at most e times as
    likely as the unlikeliest. With ``fedkseed.pro-mean = "faithful"`` every history
    starts with the published code's artificial 0.0, which halves a once-drawn seed and puts never-drawn seeds last;
    with ``"counted"`` the mean is over true draws and a never-drawn seed counts as average.
    """

    history = ("sums", "count")

    def __init__(self, config: FedKSeedProRunConfig, base: Mapping[str, Tensor], inner: Strategy | None = None) -> None:
        super().__init__(config, base, inner)
        self.mean = config.fedkseed.pro_mean
        self.sums = np.zeros(config.fedkseed.seeds, dtype=np.float64)
        self.count = np.zeros(config.fedkseed.seeds, dtype=np.int64)

    def levels(self) -> NDArray[np.int32]:
        """Return which of the odds each seed has, int32 [K]; empty before the first reply."""
        return levels(self.sums, self.count, self.mean)

    def observe(self, seeds: NDArray[np.int64], scalars: NDArray[np.float32]) -> None:
        """Add the clipped amplitudes of one node to the history of its seeds."""
        finite = np.isfinite(scalars)
        np.add.at(self.sums, seeds[finite], np.minimum(np.abs(scalars[finite], dtype=np.float64), AMPLITUDE_LIMIT))
        np.add.at(self.count, seeds[finite], 1)

    def next_pool(self) -> None:
        """Close the pool, and begin a history for the next one's seeds."""
        super().next_pool()
        self.sums, self.count = np.zeros_like(self.sums), np.zeros_like(self.count)

    def state(self) -> State:
        """Return FedKSeed's state and the amplitudes' history."""
        history = {"sums": torch.tensor(self.sums), "count": torch.tensor(self.count)}
        state = super().state()
        return State(state.tensors | history, state.files)

    def restore(self, tensors: dict[str, Tensor], load: Callable[[str], dict[str, Tensor] | None]) -> ArrayRecord:
        """Take up FedKSeed's state and the amplitudes' history."""
        self.sums, self.count = tensors["sums"].numpy(), tensors["count"].numpy()
        return super().restore(tensors, load)
