"""Running a model with some of its decoder layers changed: skipped, checkpointed, or computed once and remembered.

Every change replaces the ``forward`` of single layers for as long as a context lasts, so it works for any architecture
whose layers take the hidden states first and return them, alone or as the first of a tuple.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedtune_strategies.blocks.find import decoder_layers
from fedtune_strategies.errors import ModelError
from fedtune_strategies.layer_weights import forward_as

_Form = tuple[type, int] | None


@contextlib.contextmanager
def without_layers(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """Leave decoder layers out: their input is their output."""
    _, modules = decoder_layers(model)
    left_out = set(layers)
    if left_out and len(set(modules)) < len(modules):
        raise ModelError(
            f"{type(model).__name__} runs one layer in several places, so none can be left out: "
            "choose a codec without drop"
        )
    forms: list[_Form] = []  # of what layers return: known as soon as one has run
    sample = next((module for index, module in enumerate(modules) if index not in left_out), modules[0]).forward

    def run(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        forms.append(_form(output))
        return output

    def skip(*args: Any, **kwargs: Any) -> Any:
        if not forms:
            with torch.no_grad():
                run(sample, *args, **kwargs)
        return _unchanged(forms[-1], *args, **kwargs)

    with contextlib.ExitStack() as stack:
        for index, module in enumerate(modules):
            if left_out:
                stack.enter_context(forward_as(module, skip if index in left_out else partial(run, module.forward)))
        yield


@contextlib.contextmanager
def checkpointed(model: nn.Module, first: int) -> Iterator[None]:
    """Keep only the inputs of decoder layers from `first` on for backward, and compute the rest again: same bits."""
    _, modules = decoder_layers(model)
    with contextlib.ExitStack() as stack:
        for module in list(modules)[first:]:
            function = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            stack.enter_context(forward_as(module, function))
        yield


class PrefixCache:
    """Hidden states above the frozen layers below a block, computed once for every batch, in at most `budget` bytes.

    Local epochs run the same batches through the same frozen layers: only the first pass needs to. The remembered
    states are the very tensors that the layers returned, so the result is the same bit for bit.
    """

    def __init__(self, budget: int) -> None:
        self.free = budget
        self._states: dict[tuple[int, int], Any] = {}
        self._forms: dict[nn.Module, _Form] = {}
        self._batch = 0
        self._call = 0

    def begin(self, batch: int) -> None:
        """Say which batch the following forward passes belong to."""
        self._batch, self._call = batch, 0

    @contextlib.contextmanager
    def installed(self, prefix: Sequence[nn.Module]) -> Iterator[None]:
        """Put the cache behind the layers of `prefix`, the model's first ones, in order; none: no effect."""
        with contextlib.ExitStack() as stack:
            for module in prefix[:-1]:
                stack.enter_context(forward_as(module, partial(self._skip_if_known, module, module.forward)))
            for module in prefix[-1:]:
                stack.enter_context(forward_as(module, partial(self._recall, module.forward)))
            yield

    def check(self, prefix: Sequence[nn.Module], trained: Sequence[nn.Parameter], loss: Callable[[], Tensor]) -> bool:
        """Whether the states kept of a batch are still right when what is trained has changed; keeps them if so.

        They are not where layers above the prefix take more from it than its last hidden states, or where the prefix
        runs again on what the trained layers gave.
        """
        before = [parameter.data for parameter in trained]
        try:
            with self.installed(prefix):
                loss()
            for parameter in trained:
                parameter.data = parameter.data * 1.5 + 0.01
            self._call = 0
            expected = loss()
            with self.installed(prefix):
                return torch.equal(loss(), expected)
        except (RuntimeError, TypeError, AttributeError, ValueError, LookupError):  # None where a tensor was counted on
            return False
        finally:
            for parameter, data in zip(trained, before, strict=True):
                parameter.data = data

    def _skip_if_known(self, module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if (self._batch, self._call) in self._states:
            return _unchanged(self._forms[module], *args, **kwargs)
        output = forward(*args, **kwargs)
        self._forms[module] = _form(output)
        return output

    def _recall(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        key = (self._batch, self._call)
        self._call += 1
        if key in self._states:
            return self._states[key]
        output = forward(*args, **kwargs)
        tensors = [one for one in ([output] if isinstance(output, Tensor) else output) if isinstance(one, Tensor)]
        size = sum(tensor.nbytes for tensor in tensors)
        # An output with a gradient depends on what is trained, and is another one at every step.
        if not any(tensor.requires_grad for tensor in tensors) and size <= self.free:
            self._states[key] = output
            self.free -= size
        return output


def _form(output: Any) -> _Form:
    """How a layer returns its hidden states: alone, or as the first of so many in a tuple or list."""
    return None if isinstance(output, Tensor) else (type(output), len(output))


def _unchanged(form: _Form, *args: Any, **kwargs: Any) -> Any:
    """Return a layer's hidden states in its form, with None for attention weights and the like."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return form[0]([hidden, *[None] * (form[1] - 1)]) if form else hidden
