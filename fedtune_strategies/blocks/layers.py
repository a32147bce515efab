"""Running a model with some of its decoder layers changed: skipped, checkpointed, or computed once and remembered.

Every change replaces the ``forward`` of single layers for as long as a context lasts, so it works for any architecture
whose layers take the hidden states first and return them alone, as all decoder layers of transformers 5 do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fedtune_strategies.blocks.find import decoder_layers
from fedtune_strategies.layer_weights import forward_as


@contextlib.contextmanager
def without_layers(model: nn.Module, layers: Iterable[int]) -> Iterator[None]:
    """Leave decoder layers out: their input is their output.

    Parameters
    ----------
    model : nn.Module
        A causal language model.
    layers : iterable of int
        Indices of the layers to skip.
    """
    _, modules = decoder_layers(model)
    with contextlib.ExitStack() as stack:
        for layer in layers:
            stack.enter_context(forward_as(modules[layer], _unchanged))
        yield


@contextlib.contextmanager
def checkpointed(model: nn.Module, first: int) -> Iterator[None]:
    """Keep only the inputs of decoder layers for backward and compute the rest again: same bits, less memory.

    Parameters
    ----------
    model : nn.Module
        A causal language model in evaluation mode.
    first : int
        First layer to checkpoint; all above it follow.
    """
    _, modules = decoder_layers(model)
    with contextlib.ExitStack() as stack:
        for module in list(modules)[first:]:
            function = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            stack.enter_context(forward_as(module, function))
        yield


class PrefixCache:
    """Hidden states above the frozen layers below a block, computed once for every batch.

    Local epochs run the same batches through the same frozen layers: only the first pass needs to. The remembered
    states are the very tensors that the layers returned, so the result is the same bit for bit.

    Parameters
    ----------
    budget : int
        Most bytes to remember; batches beyond it are computed again each time.
    """

    def __init__(self, budget: int) -> None:
        self.free = budget
        self._states: dict[tuple[int, int], Tensor] = {}
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
                stack.enter_context(forward_as(module, partial(self._skip_if_known, module.forward)))
            for module in prefix[-1:]:
                stack.enter_context(forward_as(module, partial(self._recall, module.forward)))
            yield

    def _skip_if_known(
        self, forward: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        known = (self._batch, self._call) in self._states
        return hidden_states if known else forward(hidden_states, *args, **kwargs)

    def _recall(self, forward: Callable[..., Tensor], hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        key = (self._batch, self._call)
        self._call += 1
        if key in self._states:
            return self._states[key]
        output = forward(hidden_states, *args, **kwargs)
        # An output with a gradient depends on what is trained, and is another one at every step.
        if not output.requires_grad and output.nbytes <= self.free:
            self._states[key] = output
            self.free -= output.nbytes
        return output


def _unchanged(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return hidden_states
