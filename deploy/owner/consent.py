"""What a device owner is told before they agree: who asks, for what, what it takes, and exactly what leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psutil

from deploy.common.units import size
from deploy.owner.join import Membership
from fedtune_strategies.config import defaults, parse
from fedtune_strategies.cost import ENVELOPE
from fedtune_strategies.errors import ConfigError, ModelError
from fedtune_strategies.language.model_files import model_folder
from fedtune_strategies.method import installed_methods, load_method
from fedtune_strategies.protocol.door import clean

# With every reply, whatever the method.
ALWAYS = [
    "the node's name, the number of your examples, the mean training loss of a round",
    "how long a task took, how much memory, which versions are installed, a fingerprint of the base model",
]
NEVER = "Your texts never leave, in no form. What leaves is computed from them and says something about them:"
UNKNOWN = "the operator names it when a run starts"


def base_model(membership: Membership, offer: Mapping[str, Any]) -> str:
    """Say where the base model will come from: what the owner named, what lies here, or the server."""
    if membership.model == "server":
        return "it comes from the server, once"
    if membership.model:
        return membership.model
    name = offer.get("settings", {}).get("model.name")
    if name is None:
        return f"{UNKNOWN}; it comes from the server where it is not here"
    name = clean(str(name))
    try:
        return f"{name}, here in {model_folder(name)}"
    except ModelError:
        return f"{name}; not on this machine, so it comes from the server, once"


def terms(offer: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What taking part takes, as labelled lines."""
    settings, plan = offer.get("settings", {}), offer.get("plan")
    rows = [("method", clean(str(settings.get("method.name", UNKNOWN))))]
    if settings:
        rounds = settings.get("num-server-rounds") or defaults(settings.get("method.name", ""))["num-server-rounds"]
        rows.append(("rounds", clean(str(rounds))))
    if plan:
        free = psutil.virtual_memory().available
        enough = "" if plan["memory"] < free else " [!] NOT ENOUGH"
        rows += [
            ("memory", f"about {size(plan['memory'])}; {size(free)} are free here{enough}"),
            ("disk", f"{size(plan['disk'])} for the base model"),
            (
                "each round",
                f"{size(plan['up'])} up and {size(plan['down'])} down on average, and {size(plan['tasks'] * ENVELOPE)} "
                "of Flower's own",
            ),
        ]
    return rows


def leaves(offer: Mapping[str, Any]) -> list[str]:
    """Everything that leaves the machine, in words.

    Parameters
    ----------
    offer : mapping
        From the server; where it names no method, the operator may choose any.

    Returns
    -------
    list of str
        One entry for each kind of thing.
    """
    settings = offer.get("settings", {})
    named = settings.get("method.name")
    lines = []
    for name in [named] if named else installed_methods():
        try:
            config = parse(settings if named else {"method.name": name})
            lines += [clean(f"{name}, {line}", 900) for line in load_method(name).leaves(config)]
        except ConfigError as error:
            lines.append(clean(f"{name}: unknown here ({error})"))
    return [*lines, *ALWAYS]
