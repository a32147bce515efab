"""Flower's own strategies as aggregators of theta, and the step size over the rounds."""

from __future__ import annotations

import math
from typing import Any

import torch
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, FedTrimmedAvg, FedYogi, Krum, Strategy
from torch import Tensor

from fedtune_strategies.config import FedKSeedConfig, StrategyConfig


def make_aggregator(settings: StrategyConfig) -> Strategy:
    """Make the Flower strategy that ``strategy.aggregation`` names.

    Parameters
    ----------
    settings : StrategyConfig
        The run's ``strategy`` keys.

    Returns
    -------
    flwr.serverapp.strategy.Strategy
        A new one.
    """
    adaptive: dict[str, Any] = {"beta_1": settings.momentum, "beta_2": settings.second_momentum}
    match settings.aggregation:
        case "fedavgm":
            return FedAvgM(server_momentum=settings.momentum)
        case "fedadam":
            return FedAdam(**adaptive)
        case "fedyogi":
            return FedYogi(**adaptive)
        case "fedmedian":
            return FedMedian()
        case "trimmed-mean":
            return FedTrimmedAvg(beta=settings.trim)
        case "krum":
            return Krum(num_malicious_nodes=settings.faulty_nodes)
    return FedAvg()


def prepare(inner: Strategy) -> None:
    """Fit a Flower strategy to a round: its ``configure_train`` shall take up theta, and ask nobody."""
    if isinstance(inner, FedAvg):
        inner.fraction_train = 0.0
    if isinstance(inner, FedAvgM):
        inner.current_arrays = None  # it would go on from its own result, not from what was made of that


def set_step(inner: Strategy, lr: float, adaptivity: float) -> None:
    """Tell an adaptive Flower strategy the step size of the round.

    Parameters
    ----------
    inner : Strategy
        From `make_aggregator`.
    lr, adaptivity : float
        Step size of the round. An adaptive strategy's own step is as long, and its tau `adaptivity` times as long:
        without a unit, Adam's "1" would mean nothing in seed space.
    """
    if isinstance(inner, FedAdam | FedYogi):
        inner.eta, inner.tau = lr, adaptivity * lr


def moments(inner: Strategy) -> dict[str, Tensor]:
    """Return what a Flower strategy remembers from round to round, to be stored.

    Parameters
    ----------
    inner : Strategy
        From `make_aggregator`.

    Returns
    -------
    dict of str to Tensor
        Momenta, float64 [K]; empty before the first round and for strategies without.
    """
    if isinstance(inner, FedAvgM) and inner.momentum_vector is not None:
        return {"moment/1": torch.from_numpy(inner.momentum_vector[0])}
    if isinstance(inner, FedAdam | FedYogi) and inner.m_t and inner.v_t:
        return {"moment/1": torch.from_numpy(inner.m_t["theta"]), "moment/2": torch.from_numpy(inner.v_t["theta"])}
    return {}


def restore_moments(inner: Strategy, tensors: dict[str, Tensor]) -> None:
    """Give a Flower strategy back what `moments` returned; other tensors are left alone."""
    if "moment/1" not in tensors:
        return
    if isinstance(inner, FedAvgM):
        inner.momentum_vector = [tensors["moment/1"].numpy()]
    elif isinstance(inner, FedAdam | FedYogi):
        inner.m_t = {"theta": tensors["moment/1"].numpy()}
        inner.v_t = {"theta": tensors["moment/2"].numpy()}


def forget_moments(inner: Strategy) -> None:
    """Let a Flower strategy begin anew: its momenta belong to directions that do not move any more."""
    if isinstance(inner, FedAvgM):
        inner.momentum_vector = None
    elif isinstance(inner, FedAdam | FedYogi):
        inner.m_t, inner.v_t = None, None


def schedule(settings: FedKSeedConfig, round: int, rounds: int) -> float:
    """Return the factor of the step size in a round.

    Parameters
    ----------
    settings : FedKSeedConfig
        ``schedule`` and ``warmup`` are read.
    round : int
        The round, from 1.
    rounds : int
        Rounds of the run.

    Returns
    -------
    float
        Above 0, at most 1: it grows linearly over the warm-up, and then stays, or falls linearly or as half a cosine
        towards 0, which the round after the last one would reach.
    """
    if round <= settings.warmup:
        return round / (settings.warmup + 1)
    gone = (round - settings.warmup - 1) / max(1, rounds - settings.warmup)
    match settings.schedule:
        case "linear":
            return 1.0 - gone
        case "cosine":
            return (1.0 + math.cos(math.pi * gone)) / 2
    return 1.0
