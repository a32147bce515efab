"""On what terms a node takes part: what its owner agreed to, and in which points a run asks for more.

An agreement has two parts. Its terms are bounds: fewer rounds and steps, larger batches and more noise are within
them. All other keys that say what a node computes, those of the method above all, must be as the owner saw them: no
rule is known by which one value of them gives less away than another, and a method may come from anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from fedtune_strategies.config import Config, Scalar
from fedtune_strategies.config.node import ALL, ANY, FIRST, NONE, Terms
from fedtune_strategies.config.options import values
from fedtune_strategies.protocol.door import clean

# What the server does with replies, and what every run has of its own, is no matter of the node's owner.
_FREE_GROUPS = {spec.name for spec in fields(Config)} - {"train", "model"}
_FREE_KEYS = {"num-server-rounds", "model.name", "train.seed", "train.lr", "train.lr-schedule", "train.warmup"}
STEPS, PARAMETERS = "train.local-steps", "train.parameters"
CLIP, NOISE = "privacy.clip", "privacy.noise-multiplier"
# A round whose answer was lost is asked again; so many answers for each agreed round bound how often.
ANSWERS = 2
SLACK, ENVELOPE = 1.25, 4096  # of a planned reply: names of tensors are not planned


@dataclass(frozen=True)
class Agreement:
    """What an owner agreed to."""

    terms: Terms
    settings: Mapping[str, Scalar] = field(default_factory=dict)  # keys of the run configuration that must be so


@dataclass(frozen=True)
class Spent:
    """What has left since the agreement."""

    rounds: frozenset[tuple[str, int]] = frozenset()  # run and round of every reply that told something about the data
    replies: int = 0  # how many of them there were


def agreement_to(config: Config, largest_reply: int = 0) -> Agreement:
    """Make the narrowest agreement that allows a run, whose replies have at most a planned size; 0 for unknown."""
    asked = values(config)
    terms = Terms(
        methods=config.method.name,
        rounds=config.num_server_rounds,
        steps=int(asked.get(STEPS, 0)),
        batch=config.train.batch_size,
        bytes=int(SLACK * largest_reply) + ENVELOPE if largest_reply else 0,
        parameters=str(asked.get(PARAMETERS, "")) or ALL,
        noise=_noise(asked),
        model=FIRST,
    )
    return Agreement(terms, _held(asked, terms))


def beyond(agreement: Agreement, config: Config, spent: Spent) -> list[str]:
    """Say in which points a run asks for more than was agreed to, a clause for each; empty where it is within."""
    terms, asked = agreement.terms, values(config)
    if terms.methods == NONE:
        return ["no run was agreed to yet"]
    methods = [name.strip() for name in terms.methods.split(",")]
    if terms.methods != ANY and config.method.name not in methods:
        return [f"the run's method is {config.method.name}, agreed was {', '.join(methods)}"]
    steps, tuned, noise = int(asked.get(STEPS, 1)), str(asked.get(PARAMETERS, "")) or ALL, _noise(asked)
    found = _beyond_rounds(terms, config, spent)
    if terms.steps and not 0 < steps <= terms.steps:
        found.append(f"the run asks for {steps or 'any number of'} local steps, agreed were at most {terms.steps}")
    if config.train.batch_size < terms.batch:
        found.append(f"the run asks for batches of {config.train.batch_size}, agreed were at least {terms.batch}")
    if terms.parameters not in (ANY, tuned):
        found.append(f"the run tunes {_shown(tuned)} of the parameters, agreed was {_shown(terms.parameters)}")
    if noise < terms.noise:
        found.append(f"the run's noise is {noise:g}, agreed was at least {terms.noise:g}")
    held, agreed = _held(asked, terms), agreement.settings
    for key in sorted(held.keys() | agreed.keys()) if agreed and not found else ():
        if held.get(key) != agreed.get(key):
            found.append(f"the run sets '{key}' to {_shown(held.get(key))}, agreed was {_shown(agreed.get(key))}")
    return found


def _held(asked: Mapping[str, Scalar], terms: Terms) -> dict[str, Scalar]:
    """Keep the keys that must be as the owner saw them."""
    bounded = {PARAMETERS, *([STEPS] if terms.steps else []), *([NOISE] if terms.noise else [])}
    return {
        key: value
        for key, value in asked.items()
        if key not in _FREE_KEYS | bounded and key.partition(".")[0] not in _FREE_GROUPS
    }


def _beyond_rounds(terms: Terms, config: Config, spent: Spent) -> list[str]:
    run = run_name(config)
    elsewhere = sum(1 for name, _ in spent.rounds if name != run)
    if not terms.rounds:
        return []
    if config.num_server_rounds > terms.rounds - elsewhere:
        left = f", {elsewhere} of them spent on other runs" if elsewhere else ""
        return [f"the run asks for {config.num_server_rounds} rounds, agreed were at most {terms.rounds}{left}"]
    if spent.replies >= ANSWERS * terms.rounds:
        return [f"{spent.replies} answers have left, agreed were {terms.rounds} rounds"]
    return []


def beyond_round(agreement: Agreement, config: Config, spent: Spent, round: int) -> list[str]:
    """Say whether a task's round is one too many; see `beyond`."""
    if not agreement.terms.rounds:
        return []
    limit = min(config.num_server_rounds, agreement.terms.rounds)
    if round > limit or len(spent.rounds | {(run_name(config), round)}) > agreement.terms.rounds:
        return [f"the task is of round {round}, agreed were at most {limit} rounds"]
    return []


def beyond_bytes(agreement: Agreement, size: int) -> list[str]:
    """Say whether a reply is larger than agreed."""
    most = agreement.terms.bytes
    return [f"the reply has {size:,} bytes, agreed were at most {most:,}"] if most and size > most else []


def beyond_model(agreed: str, fingerprint: str) -> list[str]:
    """Say whether a base model is another than agreed; ``agreed`` is empty for any."""
    if agreed in ("", fingerprint):
        return []
    return [f"the run's base model has the fingerprint {fingerprint}, agreed was {agreed}"]


def run_name(config: Config) -> str:
    """Name a run as its operator does, by its folder; empty where it has none."""
    return clean(Path(config.run.dir).name, 80)


def _noise(asked: Mapping[str, Scalar]) -> float:
    """The noise of a run, in units of its clip; 0 for none."""
    return float(asked[NOISE]) if asked.get(CLIP) and NOISE in asked else 0.0


def _shown(value: Scalar | None) -> str:
    return clean(repr(value), 60) if value is not None else "nothing"
