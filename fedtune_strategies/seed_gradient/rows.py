"""Large matrices, such as an embedding or a head: their gradient is computed and projected some rows at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedtune_strategies.layer_weights import forward_as
from fedtune_strategies.seed_space import Pool
from fedtune_strategies.seed_space.pool import PART

LARGE = PART  # elements from which on a gradient is never whole
SHORT = 1 << 15  # elements of a part of an embedding that no token of the batch may have touched

Add = Callable[[Tensor], None]
Rows = Callable[[int, int], Tensor]


@contextlib.contextmanager
def projected_by_rows(model: nn.Module, parameters: Mapping[str, nn.Parameter], pool: Pool, add: Add) -> Iterator[None]:
    """Let large linear and embedding modules project the gradients of their weights themselves, and `add` each part.

    A matrix that several modules share gets its share of the slopes from each of them.
    """
    names: dict[Tensor, str] = {parameter: name for name, parameter in parameters.items() if parameter.numel() > LARGE}
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            # Of these types exactly: a subclass may do more with its weight.
            if type(module) is nn.Linear and module.weight in names:
                function = partial(_linear, module, partial(_project_product, pool, names[module.weight], add))
            elif type(module) is nn.Embedding and module.weight in names and not module.scale_grad_by_freq:
                function = partial(_lookup, module, partial(_project_rows, pool, names[module.weight], add))
            else:
                continue
            stack.enter_context(forward_as(module, function))
        yield


def _linear(module: nn.Linear, project: Callable[[Tensor, Tensor], None], inputs: Tensor) -> Tensor:
    output = _Linear.apply(inputs, module.weight, project)
    return output if module.bias is None else output + module.bias


def _lookup(module: nn.Embedding, project: Callable[[Tensor, Tensor, int], None], ids: Tensor) -> Tensor:
    return _Lookup.apply(ids, module.weight, module.padding_idx, project)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, project: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.project = project
        return F.linear(inputs, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,), (inputs, weight) = gradients, ctx.saved_tensors
        ctx.project(gradient.flatten(0, -2), inputs.flatten(0, -2))
        return gradient @ weight, None, None


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, padding: int | None, project: Callable[[Tensor, Tensor, int], None]
    ) -> Tensor:
        ctx.ids, ctx.rows, ctx.padding, ctx.project = ids, len(weight), padding, project
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        (gradient,), ids = gradients, ctx.ids.flatten()
        gradient = gradient.flatten(0, -2)
        if ctx.padding is not None:  # torch.nn.Embedding never trains this row
            kept = ids != ctx.padding
            ids, gradient = ids[kept], gradient[kept]
        ctx.project(ids, gradient, ctx.rows)
        return None, None, None, None


def _project_product(pool: Pool, name: str, add: Add, gradient: Tensor, inputs: Tensor) -> None:
    """Project ``gradient^T inputs``, shapes (tokens, rows) and (tokens, width)."""
    width, part = inputs.shape[1], max(PART, _alignment(pool))
    count = gradient.shape[1] * width
    for low in range(0, count, part):
        first, values = _rows_of(low, min(low + part, count), width)
        rows = gradient[:, values].T @ inputs
        add(_project(pool, name, rows.flatten()[first : first + part], low))


def _project_rows(pool: Pool, name: str, add: Add, ids: Tensor, gradient: Tensor, rows: int) -> None:
    """Project what backward adds to the rows `ids` of a matrix; parts that no row touches are left out."""
    width, part = gradient.shape[1], max(SHORT, _alignment(pool))
    ids, positions = ids.unique(return_inverse=True)
    sums = torch.zeros(len(ids), width, dtype=torch.float32, device=gradient.device)
    sums.index_add_(0, positions, gradient.float())
    touched = {place for i in ids.tolist() for place in range(i * width // part, -(-(i + 1) * width // part))}
    for low in (place * part for place in sorted(touched)):
        high = min(low + part, rows * width)
        first, chosen = _rows_of(low, high, width)
        inside = (ids >= chosen.start) & (ids < chosen.stop)
        values = torch.zeros(chosen.stop - chosen.start, width, dtype=torch.float32, device=sums.device)
        values[ids[inside] - chosen.start] = sums[inside]
        add(_project(pool, name, values.flatten()[first : first + high - low], low))


def _rows_of(low: int, high: int, width: int) -> tuple[int, slice]:
    """Return the rows that hold the elements from `low` to `high`, and where among theirs `low` is."""
    first = low // width
    return low - first * width, slice(first, -(-high // width))


def _alignment(pool: Pool) -> int:
    """Return what the first element of a part must be a multiple of."""
    return 1 << (pool.size - 1).bit_length()


def _project(pool: Pool, name: str, values: Tensor, start: int) -> Tensor:
    return pool.project_part(name, values.float(), start)[: pool.size]
