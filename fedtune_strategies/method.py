"""What ``method.name`` names: a strategy on the server, and what answers its tasks on a node.

The methods of FedTune are named in `fedtune_strategies.strategies.build` and `client_app.tasks`. Others come from
packages that the owners of the machines have installed: such a package names its `Method` in the entry point group
``fedtune.methods``. A run can only name what is installed; nothing executable travels with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from fedtune_strategies.errors import ConfigError

if TYPE_CHECKING:  # the configuration is read where no torch is
    from torch import Tensor, nn

    from fedtune_strategies.config import Config
    from fedtune_strategies.language.examples import Examples
    from fedtune_strategies.protocol.messages import Message
    from fedtune_strategies.strategies.base import TuningStrategy

GROUP = "fedtune.methods"


@dataclass(frozen=True)
class NodeContext:
    """What a node has to work with.

    Attributes
    ----------
    config : Config
        The run configuration.
    name : str
        The node's name.
    model : nn.Module
        The node's model, at the base weights.
    base : mapping of str to Tensor
        W_0 by canonical parameter name; not to be changed.
    examples : Examples
        The owner's data, tokenised.
    """

    config: Config
    name: str
    model: nn.Module
    base: Mapping[str, Tensor]
    examples: Examples


@dataclass(frozen=True)
class Method:
    """A tuning method of another package.

    Attributes
    ----------
    strategy : callable
        From the run configuration, the server's model and W_0 by name to a new strategy.
    node : callable
        From a `NodeContext` to the function that answers the strategy's tasks. It is made once and lives as long as
        the node's model. What it raises from `fedtune_strategies.errors` reaches the operator as one line.
    """

    strategy: Callable[[Config, nn.Module, Mapping[str, Tensor]], TuningStrategy]
    node: Callable[[NodeContext], Callable[[Message], Message]]


def installed_methods() -> tuple[str, ...]:
    """Return the names of the methods that installed packages bring, sorted."""
    return tuple(sorted({point.name for point in entry_points(group=GROUP)}))


def load_method(name: str) -> Method:
    """Load a method of an installed package.

    Parameters
    ----------
    name : str
        One of `installed_methods`.

    Returns
    -------
    Method
        The method.

    Raises
    ------
    ConfigError
        No installed package has it, or what it names is no `Method`.
    """
    points = [point for point in entry_points(group=GROUP) if point.name == name]
    if not points:
        raise ConfigError(f"run config: no installed package brings the method '{name}': install it here too.")
    method = points[0].load()
    if not isinstance(method, Method):
        raise ConfigError(f"run config: {points[0].value}, installed as the method '{name}', is no fedtune Method.")
    return method
