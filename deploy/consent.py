"""What a device owner is told before they agree: who asks, for what, what it takes, and exactly what leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# With every reply, whatever the method.
ALWAYS = [
    "the node's name, the number of your examples, the mean training loss of a round",
    "how long a task took, how much memory, which versions are installed, a fingerprint of the base model",
]
BY_METHOD = {
    "fedkseed": ["FedKSeed, every round: {steps} numbers, the slopes of the loss on your data along known directions"],
    "fedkseed-pro": ["FedKSeed-Pro, every round: {steps} numbers, the slopes of the loss along known directions"],
    "fedcybgd": ["FedCyBGD, in its turns: the change of one block of the model by training on your data"],
}
NEVER = "Your texts never leave, in no form. What leaves is computed from them and says something about them:"


def leaves(offer: Mapping[str, Any]) -> list[str]:
    """Everything that leaves the machine, in words.

    Parameters
    ----------
    offer : mapping
        The announced keys of the run configuration; without ``method.name`` the operator may choose any method.

    Returns
    -------
    list of str
        One entry for each kind of thing.
    """
    method = offer.get("method.name")
    steps = offer.get("fedkseed.local-steps", 200)
    if method is None:
        chosen = [line for lines in BY_METHOD.values() for line in lines]
    else:
        chosen = BY_METHOD.get(method, [f"{method}: what its own package says; read it before you agree"])
    return [*(line.format(steps=steps) for line in chosen), *ALWAYS]
