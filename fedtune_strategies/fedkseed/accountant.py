"""What differentially private rounds have cost: epsilon, by the accountant library of Google (dp-accounting)."""

from __future__ import annotations

from collections.abc import Iterable

from fedtune_strategies.errors import ConfigError
from fedtune_strategies.fedkseed.config import FedKSeedRunConfig


def epsilon(config: FedKSeedRunConfig, asked: Iterable[tuple[int, int]]) -> float:
    """Return the largest epsilon of any example, at ``privacy.delta``.

    Each step is a Poisson-sampled Gaussian mechanism: an example is in a batch with probability B / n, and changes the
    sum of slopes by at most the clip. Steps compose by Rényi differential privacy (arXiv 1908.10530). Neighbouring data
    differ by one example more or less.

    Parameters
    ----------
    config : FedKSeedRunConfig
        ``privacy``, ``train.batch-size`` and ``train.local-steps`` are read.
    asked : iterable of (int, int)
        Of each node: how often it was asked, and how many examples it has.

    Returns
    -------
    float
        epsilon; 0 where nobody was asked.

    Raises
    ------
    ConfigError
        The library is not installed.
    """
    try:
        import dp_accounting
        from dp_accounting.rdp import RdpAccountant
    except ImportError:
        raise ConfigError("'privacy.clip' needs an accountant on the server: pip install 'fedtune[privacy]'.") from None
    noise = dp_accounting.GaussianDpEvent(config.privacy.noise_multiplier)
    spent = [0.0]
    for rounds, examples in set(asked):
        accountant = RdpAccountant()
        step = dp_accounting.PoissonSampledDpEvent(min(1.0, config.train.batch_size / examples), noise)
        accountant.compose(step, rounds * config.train.local_steps)
        spent.append(float(accountant.get_epsilon(config.privacy.delta)))
    return max(spent)
