"""Which block is trained in which turn, by which node, for how many steps, at which learning rate.

Pure functions of their arguments: a server that restarts, a test and an auditor all compute the same schedule.
Turns count from 1. A cycle is as many turns as there are blocks to train. A round is one turn, or several that start
from one snapshot.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fedtune_strategies.draws import stream
from fedtune_strategies.errors import ConfigError

ORDERS = ("ascending", "descending", "random", "importance")
LR_SCHEDULES = ("constant", "linear", "cosine")


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


def turn_at(
    turn: int,
    blocks: Sequence[int],
    order: str = "ascending",
    seed: int = 0,
    importance: Mapping[int, float] | None = None,
) -> Turn:
    """Say which block a turn trains.

    Parameters
    ----------
    turn : int
        From 1.
    blocks : sequence of int
        Indices of the blocks to train, in ascending order.
    order : {"ascending", "descending", "random", "importance"}
        ``"random"`` visits every block once a cycle, in an order drawn anew each cycle from `seed`.
        ``"importance"`` shares half of a cycle's turns equally and half by `importance`, so that a block may come
        several times in a cycle or wait for a later one.
    seed : int
        Seed of the run.
    importance : mapping of int to float, optional
        Importance of every block as it stood when the turn's cycle began, none negative; see `block_importance`. By
        default all are equal.

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
    return Turn(turn, cycle, position, _cycle_order(cycle, blocks, order, seed, importance)[position])


def rounds_in_cycle(blocks: int, width: int) -> int:
    """Rounds that a cycle over `blocks` takes at `width` turns a round."""
    return -(-blocks // width)


def blocks_of_round(
    round: int,
    width: int,
    blocks: Sequence[int],
    order: str = "ascending",
    seed: int = 0,
    importance: Mapping[int, float] | None = None,
) -> list[int]:
    """Say which blocks a round trains: those of its turns, each once.

    Parameters
    ----------
    round : int
        From 1.
    width : int
        Turns in a round; the last round of a cycle may have fewer.
    blocks, order, seed, importance
        See `turn_at`.

    Returns
    -------
    list of int
        Indices of blocks, in the order of the turns.
    """
    cycle, part = divmod(round - 1, rounds_in_cycle(len(blocks), width))
    first = cycle * len(blocks) + part * width + 1
    end = min(first + width, (cycle + 1) * len(blocks) + 1)
    return list(dict.fromkeys(turn_at(turn, blocks, order, seed, importance).block for turn in range(first, end)))


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


def block_importance(history: Iterable[tuple[int, float]], blocks: Sequence[int]) -> dict[int, float]:
    """Weigh blocks by what their turns achieved, recent turns most.

    Parameters
    ----------
    history : iterable of (int, float)
        Block and value of every turn before the present cycle, in order. The value is the decrease of the loss over
        the turn, or the norm of the gradient; what is negative counts as zero.
    blocks : sequence of int
        Indices of the blocks to train.

    Returns
    -------
    dict of int to float
        A block's value, in which each turn halves the weight of those before. A block without a turn gets the mean of
        the others; without any turn all get 1.
    """
    values: dict[int, float] = {}
    for block, value in history:
        known = max(value, 0.0)
        values[block] = (values[block] + known) / 2 if block in values else known
    mean = sum(values.values()) / len(values) if values else 1.0
    return {block: values.get(block, mean) for block in blocks}


def learning_rate(progress: float, peak: float, kind: str = "constant", warmup: float = 0.0) -> float:
    """Learning rate of the schedule that runs once over all turns of a run, never restarted for a node.

    Parameters
    ----------
    progress : float
        Share of the run that is done, in [0, 1]: (turn − 1 + step / steps) / turns.
    peak : float
        Highest learning rate.
    kind : {"constant", "linear", "cosine"}
        Shape after the warm-up; the latter two end at zero.
    warmup : float
        Share of the run, in [0, 1), over which the rate rises in a line from zero.

    Returns
    -------
    float
        The learning rate.

    Raises
    ------
    ConfigError
        If the kind is unknown.
    """
    if kind not in LR_SCHEDULES:
        raise ConfigError(f"unknown learning-rate schedule {kind!r}; use one of {', '.join(LR_SCHEDULES)}")
    if progress < warmup:
        return peak * progress / warmup
    left = (1.0 - progress) / (1.0 - warmup)
    shape = {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * math.cos(math.pi * left)}
    return peak * shape[kind]


def _cycle_order(
    cycle: int, blocks: Sequence[int], order: str, seed: int, importance: Mapping[int, float] | None
) -> list[int]:
    if order == "ascending":
        return list(blocks)
    if order == "descending":
        return list(reversed(blocks))
    if order == "random":
        return _shuffled(blocks, seed, cycle)
    if order == "importance":
        return _shuffled(_by_importance(blocks, _uniform(seed, cycle), importance), seed, cycle)
    raise ConfigError(f"unknown block order {order!r}; use one of {', '.join(ORDERS)}")


def _shuffled(blocks: Sequence[int], seed: int, cycle: int) -> list[int]:
    """Put blocks, some of them several times, in an order drawn from the seed."""
    visits = [(block, list(blocks[:place]).count(block)) for place, block in enumerate(blocks)]
    key = {visit: int(stream("block order", seed, cycle, *visit).random_raw()) for visit in visits}
    return [block for block, _ in sorted(visits, key=key.__getitem__)]


def _uniform(seed: int, cycle: int) -> float:
    return int(stream("block importance", seed, cycle).random_raw() >> 11) / 2**53


def _by_importance(blocks: Sequence[int], offset: float, importance: Mapping[int, float] | None) -> list[int]:
    """Systematic sampling: of n expected visits a block gets ⌊n⌋ or ⌈n⌉."""
    weights = [importance[block] for block in blocks] if importance else [1.0] * len(blocks)
    total = sum(weights)
    expected = [0.5 + 0.5 * len(blocks) * weight / total if total else 1.0 for weight in weights]
    ends = list(itertools.accumulate(expected))
    ends[-1] = float(len(blocks))
    return [blocks[bisect.bisect_right(ends, place + offset)] for place in range(len(blocks))]
