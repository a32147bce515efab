"""Flower's own strategies as aggregators of replies."""

from __future__ import annotations

from flwr.serverapp.strategy import FedAvg, FedMedian, FedTrimmedAvg, Krum, Strategy

from fedtune_strategies.config import RobustConfig


def robust_aggregator(settings: RobustConfig) -> Strategy:
    """Make the Flower strategy without memory that ``strategy.aggregation`` names; FedAvg for any other name."""
    match settings.aggregation:
        case "fedmedian":
            return FedMedian()
        case "trimmed-mean":
            return FedTrimmedAvg(beta=settings.trim)
        case "krum":
            return Krum(num_malicious_nodes=settings.faulty_nodes)
    return FedAvg()
