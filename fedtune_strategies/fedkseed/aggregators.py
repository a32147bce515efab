"""Flower's own strategies as aggregators of theta."""

from __future__ import annotations

from typing import Any

import torch
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedYogi, Strategy
from torch import Tensor

from fedtune_strategies.aggregators import robust_aggregator
from fedtune_strategies.fedkseed.config import SeedStrategyConfig


def make_aggregator(settings: SeedStrategyConfig) -> Strategy:
    """Make the Flower strategy that ``strategy.aggregation`` names."""
    adaptive: dict[str, Any] = {"beta_1": settings.momentum, "beta_2": settings.second_momentum}
    match settings.aggregation:
        case "fedavgm":
            return FedAvgM(server_momentum=settings.momentum)
        case "fedadam":
            return FedAdam(**adaptive)
        case "fedyogi":
            return FedYogi(**adaptive)
    return robust_aggregator(settings)


def prepare(inner: Strategy) -> None:
    """Fit a Flower strategy to a round: its ``configure_train`` is to take up theta, and ask nobody."""
    if isinstance(inner, FedAvg):
        inner.fraction_train = 0.0
    if isinstance(inner, FedAvgM):
        inner.current_arrays = None  # it would continue from its own result, not from what was made of it


def set_step(inner: Strategy, lr: float, adaptivity: float) -> None:
    """Tell an adaptive Flower strategy the step size of the round: its own step is as long.

    Its tau is `adaptivity` times as long: without a unit, Adam's "1" would mean nothing in seed space.
    """
    if isinstance(inner, FedAdam | FedYogi):
        inner.eta, inner.tau = lr, adaptivity * lr


def moments(inner: Strategy) -> dict[str, Tensor]:
    """Return what a Flower strategy remembers from round to round, float64 [K] each, to be stored; often nothing."""
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
    """Let a Flower strategy start over: its momenta belong to directions that do not move any more."""
    if isinstance(inner, FedAvgM):
        inner.momentum_vector = None
    elif isinstance(inner, FedAdam | FedYogi):
        inner.m_t, inner.v_t = None, None
