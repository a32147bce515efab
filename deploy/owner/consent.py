"""What a device owner is told before they agree to a run: what it takes, what leaves, and what that binds it to.

All texts are ours. Of the operator's own there is one line, why they ask, and it is marked as theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from client_app.terms import Agreement, agreement_to
from deploy.common.units import size
from deploy.owner.join import Membership
from fedtune_strategies.config import Config
from fedtune_strategies.config.node import ALL, ANY, Terms
from fedtune_strategies.config.options import options
from fedtune_strategies.cost import ENVELOPE, Cost
from fedtune_strategies.errors import FedTuneError, ModelError
from fedtune_strategies.installed import installed_methods
from fedtune_strategies.language.model_files import model_folder
from fedtune_strategies.method import load_method
from fedtune_strategies.protocol.door import clean
from fedtune_strategies.run_config import parse

# With every reply, under every method.
ALWAYS = [
    "the node's name, the number of your examples, the mean training loss of a round",
    "how far a task is and how long it took, how much memory, which versions are installed, a fingerprint of the base "
    "model",
]
NEVER = "Your texts never leave, in no form. What leaves is computed from them and says something about them:"
NOTHING_ANNOUNCED = (
    "No run is going on there that you could agree to now. When one begins, you are shown what it asks for, and it "
    "begins here only once you have agreed."
)
BOUND = (
    "You agree to this and nothing wider: your machine refuses a run of another method, with smaller batches, more "
    "rounds or steps, less noise or other settings of the method, and you are asked again."
)
UNKNOWN = "not known before the base model is here"


@dataclass(frozen=True)
class Proposal:
    """A run as its owner is asked about it."""

    rows: list[tuple[str, str]]  # what it takes, as labelled lines
    leaves: list[str]  # everything that leaves the machine, in words
    agreement: Agreement  # what is written down if the owner agrees


def propose(
    settings: Mapping[str, Any], membership: Membership, examples: int, announced: Mapping[str, Any] | None = None
) -> Proposal:
    """Say what a run asks for.

    `settings`: the run configuration, as the operator sent it.
    `examples`: how many the owner has.
    `announced`: the operator's plan, a `Cost` as a mapping, for a base model that is not here.
    Returns: its numbers are upper bounds where they say so.
    Raises `FedTuneError`: the run cannot be understood here: its method is not installed, or a setting is wrong.
    """
    config = parse(settings)
    method = load_method(config.method.name)
    cost, whose = _cost(config, membership, examples, announced)
    agreement = agreement_to(config, (cost.largest or cost.up) if cost else 0)
    rows = [
        ("why", f"the operator's words: “{clean(config.run.purpose, 200)}”" if config.run.purpose else "not said"),
        ("method", f"{method.name}: {method.summary}"),
        ("model", base_model(config, membership)),
        ("tuned", _tuned(agreement.terms)),
        ("rounds", f"at most {agreement.terms.rounds}, of this and all later runs together"),
        ("each round", _steps(agreement, config)),
        ("noise", f"at least {agreement.terms.noise:g} times the clip" if agreement.terms.noise else "none is added"),
        *_takes(cost, whose, agreement.terms),
    ]
    leaves = [clean(f"{method.name}, {line}", 900) for line in method.leaves(config)]
    return Proposal(rows, [*leaves, *ALWAYS], agreement)


def by_hand(terms: Terms) -> tuple[list[tuple[str, str]], list[str]]:
    """Show terms that the owner has set by ``--set terms.…``: labelled lines, and what leaves at the usual settings."""
    rows = [
        (name, f"{getattr(terms, spec.name) or 'any'}: {spec.metadata['help']}") for name, _, spec in options(Terms)
    ]
    names = installed_methods() if terms.methods == ANY else [name.strip() for name in terms.methods.split(",")]
    lines = [f"{name}, {line}" for name in names for line in load_method(name).leaves(parse({"method.name": name}))]
    return rows, [*(clean(line, 900) for line in lines), *ALWAYS]


def base_model(config: Config, membership: Membership) -> str:
    """Say where the base model will come from: what the owner named, what is here, or the server."""
    name = clean(config.model.name, 200)
    if membership.model == "server":
        return f"{name}; it comes from the server, once"
    if membership.model:
        return f"{name}, which is {membership.model} here"
    try:
        return f"{name}, here in {clean(str(model_folder(config.model.name)))}"
    except ModelError:
        return f"{name}; not on this machine, so it comes from the server, once"


def _tuned(terms: Terms) -> str:
    if terms.parameters == ALL:
        return "all parameters, or the part of them that is named below"
    shown = clean(terms.parameters, 200)
    return f"[!] only parameters with a match for {shown!r}: with fewer, more can be made of what leaves"


def _steps(agreement: Agreement, config: Config) -> str:
    steps, batch = agreement.terms.steps, config.train.batch_size
    many = f"at most {steps} steps" if steps else "as many steps as the method's own rule says"
    few = " [!] FEW: what leaves is then about single examples" if batch < 4 else ""
    return f"{many}, {batch} examples in a step, {config.train.seq_length} tokens of each{few}"


def _takes(cost: Cost | None, whose: str, terms: Terms) -> list[tuple[str, str]]:
    if cost is None:
        return [(label, whose) for label in ("memory", "disk", "bytes")]
    free = psutil.virtual_memory().available
    enough = "" if cost.memory < free else " [!] NOT ENOUGH"
    flower = size(round(cost.tasks * ENVELOPE))
    return [
        ("memory", f"about {size(cost.memory)}{whose}; {size(free)} are free here{enough}"),
        ("disk", f"{size(cost.disk)} for the base model{whose}"),
        (
            "bytes",
            f"{size(cost.up)} up and {size(cost.down)} down a round on average{whose}, and {flower} of Flower's own; "
            f"at most {size(terms.bytes)} in one reply",
        ),
    ]


def _cost(
    config: Config, membership: Membership, examples: int, announced: Mapping[str, Any] | None
) -> tuple[Cost | None, str]:
    """What the run takes, and whose figures these are; or none, and why."""
    from deploy.plan import plan

    try:
        name = membership.model if membership.model not in ("", "server") else config.model.name
        return plan(config, model_folder(name), config.strategy.min_nodes, examples), ""
    except ModelError:
        names = {spec.name for spec in dataclasses.fields(Cost)}
        if announced and announced.keys() == names and all(type(value) in (int, float) for value in announced.values()):
            return Cost(**announced), " by the operator's figures"
        return None, UNKNOWN
    except FedTuneError as error:
        return None, f"not known: {clean(str(error))}"
