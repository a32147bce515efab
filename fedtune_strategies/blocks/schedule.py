"""Which block is trained in which turn, by which node, for how many steps, at which learning rate.

Pure functions of their arguments: a server that restarts, a test and an auditor all compute the same schedule.
Turns count from 1. A cycle is as many turns as there are blocks to train.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fedtune_strategies.draws import stream
from fedtune_strategies.errors import ConfigError

ORDERS = ("ascending", "descending", "random")


class Turn(NamedTuple):
    """One turn of the schedule.

    Attributes
    ----------
    turn : int
        Counts from 1 over the whole run.
    cycle : int
        Counts from 0.
    position : int
        Place in the cycle, from 0.
    block : int
        Index of the block to train.
    """

    turn: int
    cycle: int
    position: int
    block: int


def turn_at(turn: int, blocks: Sequence[int], order: str = "ascending", seed: int = 0) -> Turn:
    """Say which block a turn trains.

    Parameters
    ----------
    turn : int
        From 1.
    blocks : sequence of int
        Indices of the blocks to train, in ascending order.
    order : {"ascending", "descending", "random"}
        ``"random"`` visits every block once a cycle, in an order drawn anew each cycle from `seed`.
    seed : int
        Seed of the run.

    Returns
    -------
    Turn
        The turn's place in its cycle and its block.

    Raises
    ------
    ConfigError
        If there is nothing to train or the order is unknown.
    """
    if turn < 1:
        raise ValueError(f"turns count from 1, not {turn}")
    if not blocks:
        raise ConfigError("there is no block to train: all are frozen")
    cycle, position = divmod(turn - 1, len(blocks))
    return Turn(turn, cycle, position, _cycle_order(cycle, blocks, order, seed)[position])


def nodes_for(turn: int, nodes: Sequence[str], blocks: int) -> list[str]:
    """Order the nodes for a turn: the responsible one first, then its substitutes.

    The nodes take turns one after the other. When a cycle is a multiple of a round of the nodes, each block would meet
    the same node for ever; so the list is rotated by one whenever both end together. Over as many cycles as there are
    nodes, every place in the cycle meets every node exactly once, and no node works more than one turn ahead.

    Parameters
    ----------
    turn : int
        From 1.
    nodes : sequence of str
        Names of the nodes, sorted.
    blocks : int
        Turns in a cycle.

    Returns
    -------
    list of str
        All nodes. The first is responsible; a lost node's turn goes to the next idle one; a turn that several nodes
        share takes as many from the front.
    """
    turns_done = turn - 1
    first = (turns_done + turns_done // math.lcm(blocks, len(nodes))) % len(nodes)
    return [*nodes[first:], *nodes[:first]]


def node_for(turn: int, nodes: Sequence[str], blocks: int) -> str:
    """Return the node responsible for a turn; see `nodes_for`."""
    return nodes_for(turn, nodes, blocks)[0]


def local_steps_rule(num_examples: int, batch_size: int, num_blocks: int) -> int:
    """Local steps of a turn: clamp(n / (B·D), 50, 100), the rule of FedCyBGD (arXiv 2406.11187).

    Parameters
    ----------
    num_examples, batch_size, num_blocks : int
        The node's examples n, the batch size B, the blocks D.

    Returns
    -------
    int
        Between 50 and 100.
    """
    return min(max(num_examples // (batch_size * num_blocks), 50), 100)


def _cycle_order(cycle: int, blocks: Sequence[int], order: str, seed: int) -> list[int]:
    if order == "ascending":
        return list(blocks)
    if order == "descending":
        return list(reversed(blocks))
    if order == "random":
        return sorted(blocks, key=lambda block: int(stream("block order", seed, cycle, block).random_raw()))
    raise ConfigError(f"unknown block order {order!r}; use one of {', '.join(ORDERS)}")
