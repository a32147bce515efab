"""What differentially private rounds have cost: epsilon, by the accountant library of Google (dp-accounting)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedtune_strategies.errors import ConfigError
from fedtune_strategies.fedkseed.config import FedKSeedRunConfig, GradientRunConfig

PREFIX = "asked/"


class PrivacySpent:
    """How often each node was asked: with its task it is spent, whether or not a reply comes. Empty without privacy."""

    def __init__(self, config: FedKSeedRunConfig | GradientRunConfig) -> None:
        self._config = config
        self.asked: dict[str, tuple[int, int]] = {}

    def check(self) -> None:
        """Raise `ConfigError` where the accountant is missing, before anything is spent."""
        self.metrics()

    def note(self, nodes: Mapping[str, int]) -> None:
        """Count a task of each node; `nodes` are their numbers of examples."""
        for name, examples in nodes.items() if self._config.privacy.clip else ():
            self.asked[name] = (self.asked.get(name, (0, 0))[0] + 1, examples)

    def metrics(self) -> dict[str, float]:
        """Return ``privacy/epsilon``, if the run is private."""
        return {"privacy/epsilon": epsilon(self._config, self.asked.values())} if self._config.privacy.clip else {}

    def state(self) -> dict[str, Tensor]:
        """Return what to store."""
        return {f"{PREFIX}{node}": torch.tensor(counts) for node, counts in self.asked.items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what `state` returned."""
        counts = {key.removeprefix(PREFIX): value for key, value in tensors.items() if key.startswith(PREFIX)}
        self.asked = {node: (int(pair[0]), int(pair[1])) for node, pair in counts.items()}


def epsilon(config: FedKSeedRunConfig | GradientRunConfig, asked: Iterable[tuple[int, int]]) -> float:
    """Return the largest epsilon of any example, at ``privacy.delta``.

    Each step is a Poisson-sampled Gaussian mechanism: an example is in a batch with probability B / n, and changes the
    sum of slopes by at most the clip, of one slope or in the 2-norm of all K. Steps compose by Rényi differential
    privacy (arXiv 1908.10530). Neighbouring data differ by one example more or less.

    `config`: ``privacy``, ``train.batch-size`` and ``train.local-steps`` are read.
    `asked`: of each node: how often it was asked, and how many examples it has.
    Raises `ConfigError`: the library is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ImportError:
        raise ConfigError("'privacy.clip' needs an accountant on the server: pip install dp-accounting.") from None
    noise = dp_accounting.GaussianDpEvent(config.privacy.noise_multiplier)
    spent = [0.0]
    for rounds, examples in set(asked):
        accountant = RdpAccountant()
        step = dp_accounting.PoissonSampledDpEvent(min(1.0, config.train.batch_size / examples), noise)
        accountant.compose(step, rounds * config.train.local_steps)
        spent.append(float(accountant.get_epsilon(config.privacy.delta)))
    return max(spent)
