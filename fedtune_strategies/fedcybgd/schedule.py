"""Which block is trained in which turn, by which node, for how many steps.

Pure functions of their arguments: a server that restarts, a test and an auditor all compute the same schedule.
Turns count from 1. A cycle is as many turns as there are blocks to train. A round is one turn, or several that start
from one snapshot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fedtune_strategies.errors import ConfigError
from fedtune_strategies.shared_random import stream

ORDERS = ("ascending", "descending", "random")


class Turn(NamedTuple):
    """One turn of the schedule."""

    turn: int  # counts from 1 over the whole run
    cycle: int
    position: int  # place in the cycle, from 0
    block: int  # index of the block to train


def turn_at(
    turn: int,
    blocks: Sequence[int],
    order: str = "ascending",
    seed: int = 0,
) -> Turn:
    """Say which block a turn trains.

    `blocks`: indices of the blocks to train, in ascending order.
    `order`: ``"random"`` visits every block once a cycle, in an order drawn for each cycle from `seed`.
    Returns: the turn's place in its cycle and its block.
    Raises `ConfigError`: if there is nothing to train or the order is unknown.
    """
    if turn < 1:
        raise ValueError(f"turns count from 1, not {turn}")
    if not blocks:
        raise ConfigError("there is no block to train: all are frozen")
    cycle, position = divmod(turn - 1, len(blocks))
    return Turn(turn, cycle, position, _cycle_order(cycle, blocks, order, seed)[position])


def rounds_in_cycle(blocks: int, width: int) -> int:
    """Rounds that a cycle over `blocks` takes at `width` turns a round."""
    return -(-blocks // width)


def blocks_of_round(
    round: int,
    width: int,
    blocks: Sequence[int],
    order: str = "ascending",
    seed: int = 0,
) -> list[int]:
    """Say which blocks a round trains: those of its turns, each once.

    `width`: turns in a round; the last round of a cycle may have fewer.
    Returns: indices of blocks, in the order of the turns.
    """
    cycle, part = divmod(round - 1, rounds_in_cycle(len(blocks), width))
    first = cycle * len(blocks) + part * width + 1
    end = min(first + width, (cycle + 1) * len(blocks) + 1)
    return list(dict.fromkeys(turn_at(turn, blocks, order, seed).block for turn in range(first, end)))


def nodes_for(turn: int, nodes: Sequence[str], blocks: int) -> list[str]:
    """Order the nodes for a turn: the responsible one first, then its substitutes.

    The nodes take turns one after the other. When a cycle is a multiple of a round of the nodes, each block would meet
    the same node for ever; so the list is rotated by one whenever both end together. Over as many cycles as there are
    nodes, every place in the cycle meets every node exactly once, and no node works more than one turn ahead.

    `nodes`: names of the nodes, sorted.
    Returns: all nodes. The first is responsible; a lost node's turn goes to the next idle one; a turn that several
        nodes share takes as many from the front.
    """
    turns_done = turn - 1
    first = (turns_done + turns_done // math.lcm(blocks, len(nodes))) % len(nodes)
    return [*nodes[first:], *nodes[:first]]


def local_steps_rule(num_examples: int, batch_size: int, num_blocks: int) -> int:
    """Local steps of a turn: clamp(n / (B·D), 50, 100), the rule of FedCyBGD (arXiv 2406.11187).

    `num_examples`, `batch_size`, `num_blocks`: the node's examples n, the batch size B, the blocks D.
    """
    return min(max(num_examples // (batch_size * num_blocks), 50), 100)


def _cycle_order(cycle: int, blocks: Sequence[int], order: str, seed: int) -> list[int]:
    if order == "ascending":
        return list(blocks)
    if order == "descending":
        return list(reversed(blocks))
    if order == "random":
        return _shuffled(blocks, seed, cycle)
    raise ConfigError(f"unknown block order {order!r}; use one of {', '.join(ORDERS)}")


def _shuffled(blocks: Sequence[int], seed: int, cycle: int) -> list[int]:
    """Put blocks in an order drawn from the seed."""
    return sorted(blocks, key=lambda block: int(stream("block order", seed, cycle, block, 0).random_raw()))
