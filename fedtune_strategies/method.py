"""What ``method.name`` names: all that a tuning method is, in one object.

A package names its `Method` in the entry point group ``fedtune.methods``; FedTune's own are declared the same way. A
run can only name what the owners of the machines have installed: nothing executable travels with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from fedtune_strategies.errors import ConfigError
from fedtune_strategies.installed import points
from fedtune_strategies.shared_random import digest

if TYPE_CHECKING:  # the configuration is read where no torch is
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from fedtune_strategies.config import Config
    from fedtune_strategies.config.node import NodeConfig
    from fedtune_strategies.cost import Cost, Fleet, Shape
    from fedtune_strategies.language.examples import Batch, Examples
    from fedtune_strategies.language.model import LanguageModel
    from fedtune_strategies.protocol.messages import Message
    from fedtune_strategies.strategy import TuningStrategy


@dataclass(frozen=True)
class NodeContext:
    """What a node has to work with.

    Attributes
    ----------
    config : Config
        The run configuration, of the class that the method declares.
    name : str
        The node's name.
    model : nn.Module
        The node's model, at the base weights.
    base : mapping of str to Tensor
        W_0 by canonical parameter name; not to be changed.
    examples : Examples
        The owner's data, tokenised.
    node : NodeConfig
        The node's own configuration: how it uses its memory.
    on_step : callable
        Called with (steps begun, steps of the round) as `batches` is drawn from.
    residuals : mapping of int to (mapping of str to Tensor)
        What the coding of changes held back, by a number of the method's choice. It is kept in the node's folder for as
        long as the run lasts: a worker that was ended takes it up again.
    """

    config: Any
    name: str
    model: nn.Module
    base: Mapping[str, Tensor]
    examples: Examples
    node: NodeConfig
    on_step: Callable[[int, int], object] = lambda begun, steps: None
    residuals: MutableMapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def secret(self, purpose: str, round: int) -> str:
        """Return what only this node can compute: for random choices that it tells the server alone.

        Parameters
        ----------
        purpose : str
            What it is for; secrets for other purposes cannot be told from it.
        round : int
            The round.

        Returns
        -------
        str
            32 hexadecimal digits, the same each time; empty where the node's ``draw-key`` is public.
        """
        key = self.node.draw_key
        return digest(purpose, self.config.train.seed, round, self.name, key).hex() if key else ""

    def batches(self, round: int, steps: int) -> Iterator[Batch]:
        """Draw a round's batches, ``train.batch-size`` examples each; see `language.examples.batches`.

        Their order depends on the run's seed, the round and the node's ``draw-key``, which nobody else knows: who
        cannot tell which examples a step was about can make less of what leaves.

        Parameters
        ----------
        round : int
            The round.
        steps : int
            How many.

        Yields
        ------
        dict of tensors
            The same ones each time that the node is asked for the round.
        """
        from fedtune_strategies.language.examples import batches

        train, own = self.config.train, self.node.draw_key
        key = (train.seed, round, self.name, *([own] if own else []))
        for step, batch in enumerate(batches(self.examples, train.batch_size, steps, key), start=1):
            self.on_step(step, steps)
            yield batch


@dataclass(frozen=True)
class Panel:
    """What a method shows on the status page beside what all methods show.

    Attributes
    ----------
    title, note : str
        Heading, and a sentence that says what the figures mean.
    columns : sequence of (str, float)
        Label and height of each column of a chart, from left to right.
    unit : str
        What the heights count.
    """

    title: str
    note: str
    columns: Sequence[tuple[str, float]]
    unit: str


@dataclass(frozen=True)
class Method:
    """A tuning method.

    Attributes
    ----------
    name : str
        As in ``method.name``; the same as that of the entry point.
    summary : str
        One line for help texts.
    config : type
        Subclass of `fedtune_strategies.config.Config` with the method's sections.
    strategy : callable
        From the run configuration, the server's model and W_0 by name to a new strategy.
    client : callable
        From a `NodeContext` to the function that answers the strategy's tasks. It is made once and lives as long as
        the node's model. What it raises from `fedtune_strategies.errors` reaches the operator as one line.
    leaves : callable
        From the run configuration to what leaves a node with its replies, one line each, for the owner's consent.
    messages : callable
        Returns the method's message types; see `fedtune_strategies.protocol.messages.register`.
    cost : callable or None
        From the run configuration, the model's `Shape` and the `Fleet` to a node's `Cost`; None where it is unknown.
    seconds : callable or None
        From the run configuration, a freshly loaded model, a node's number of examples and a clock to the seconds of
        one task on this machine; the model may be changed.
    parts : callable or None
        From the run configuration and the model's structure on the meta device to the parts that it trains by turns:
        name, number of parameters, and whether it is frozen.
    by_layers : bool
        Whether its client can work with a model without weights, whose layers get theirs from ``NodeContext.base`` as
        they run: it is given one where the node's ``frozen`` is not "decoded".
    panel : callable or None
        From the run configuration and the tensors that the strategy stored last, as NumPy arrays, to the method's
        `Panel`; None where it shows nothing of its own. Imports neither torch nor Flower: the status page does not.
    """

    name: str
    summary: str
    config: type[Config]
    strategy: Callable[[Any, nn.Module, Mapping[str, Tensor]], TuningStrategy]
    client: Callable[[NodeContext], Callable[[Message], Message]]
    leaves: Callable[[Any], Sequence[str]]
    messages: Callable[[], Sequence[type]] = field(default=tuple)
    cost: Callable[[Any, Shape, Fleet], Cost] | None = None
    seconds: Callable[[Any, LanguageModel, int, Callable[[], float]], float] | None = None
    parts: Callable[[Any, nn.Module], Sequence[tuple[str, int, bool]]] | None = None
    by_layers: bool = False
    panel: Callable[[Any, Mapping[str, NDArray[Any]]], Panel | None] | None = None


def deferred(place: str) -> Callable[..., Any]:
    """Return a function that is imported when it is called, ``"module:name"``: declaring a method imports no torch."""
    module, _, name = place.partition(":")
    return lambda *args: getattr(import_module(module), name)(*args)


def load_method(name: str) -> Method:
    """Load a method.

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
        No installed package has it, or what it names is no `Method` of that name.
    """
    if name not in points():
        raise ConfigError(f"run config: no installed package brings the method '{name}': install it here too.")
    method = points()[name].load()
    if not isinstance(method, Method) or method.name != name:
        raise ConfigError(
            f"run config: {points()[name].value}, installed as the method '{name}', is no fedtune Method of that name."
        )
    return method


def register_messages(name: str) -> Method:
    """Load a method and make its message types known to `decode`; needs torch."""
    from fedtune_strategies.protocol.messages import register

    method = load_method(name)
    register(*method.messages())
    return method
