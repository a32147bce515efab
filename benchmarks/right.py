"""Where the core was silently wrong: the way of then beside the way of now, on the same numbers. Prints a table.

python benchmarks/right.py
"""

from __future__ import annotations

import warnings
from functools import partial
from unittest import mock

import numpy as np
import torch
import transformers
from architectures import BATCH, POOL, loss, tiny_model
from torch import Tensor, nn

from fedtune_strategies import layer_weights
from fedtune_strategies.blocks import chunked_matmul
from fedtune_strategies.blocks.codec_config import Codec
from fedtune_strategies.blocks.codecs import decode, encode
from fedtune_strategies.seed_space import fingerprint
from fedtune_strategies.zeroth_order import local_steps

MODELS = ("qwen3_next", "qwen3_5_text", "mamba")


def slopes(kind: str) -> tuple[str, str]:
    """Slopes found layer by layer against those in place: correlation and relative error; by module, and by layer."""
    batches, seeds = [BATCH] * 16, np.arange(16)
    steps = partial(local_steps, tiny_model(kind), POOL, loss, batches, seeds, eps=1e-3, lr=0.0)
    true = steps(in_place=True).g

    def compared(found: np.ndarray) -> str:
        error = np.linalg.norm(found - true) / np.linalg.norm(true)
        return f"{np.corrcoef(found, true)[0, 1]:.4f}, {error:.4f}"

    now = compared(steps(in_place=False).g)
    with mock.patch.object(layer_weights, "_unit", lambda path, modules, around: path):
        return compared(steps(in_place=False).g), now


def rows_seen(changed: int) -> tuple[str, str]:
    """Of 20 embeddings of which so many of 32,000 rows differ by 1.0: how many fingerprints see it."""
    table, random = torch.randn(32_000, 256), np.random.default_rng(0)

    def sampled(tensor: Tensor) -> bytes:  # 16 runs of 64 elements, evenly spaced
        starts = np.linspace(0, tensor.numel() - 64, 16, dtype=np.int64)
        return b"".join(tensor.flatten()[start : start + 64].numpy().tobytes() for start in starts)

    before, now = sampled(table), fingerprint({"w": table})
    seen = np.zeros(2, dtype=int)
    for _ in range(20):
        rows = torch.from_numpy(random.choice(len(table), changed, replace=False))
        table[rows] += 1.0
        seen += sampled(table) != before, fingerprint({"w": table}) != now
        table[rows] -= 1.0
        # Adding and taking away 1.0 rounds, so the next table begins as this one ended.
        before, now = sampled(table), fingerprint({"w": table})
    return f"{seen[0]} of 20", f"{seen[1]} of 20"


def experts() -> tuple[str, str]:
    """Largest error of int8 in a row of 8 experts, as a share of the row's largest value; one row in each is small."""
    weights = torch.randn(8, 64, 64) * 0.02
    weights[:, 0] *= 0.005

    def error(found: Tensor) -> str:
        return f"{((found - weights).abs().amax(-1) / weights.abs().amax(-1)).max():.3f}"

    by_expert = decode(encode({"w": weights.reshape(8, -1)}, Codec("int8")))["w"].reshape(weights.shape)
    return error(by_expert), error(decode(encode({"w": weights}, Codec("int8")))["w"])


def backward() -> tuple[str, str]:
    """Relative error of the gradient through a frozen matrix of 32,000 × 512 in bfloat16, some rows at a time."""
    weight = (torch.randn(32_000, 512) * 0.02).bfloat16()
    gradient = torch.randn(8, 32_000).bfloat16()
    true = gradient.double() @ weight.double()

    def error(found: Tensor) -> str:
        return f"{(found.double() - true).norm() / true.norm():.4f}"

    chunks = chunked_matmul._chunks(*weight.shape)
    then = sum(
        (gradient[:, rows] @ weight[rows] for rows in chunks[1:]), start=gradient[:, chunks[0]] @ weight[chunks[0]]
    )
    layer = nn.Linear(512, 32_000, bias=False)
    inputs = torch.zeros(8, 512, dtype=torch.bfloat16, requires_grad=True)
    with chunked_matmul.chunked({layer: "w"}, lambda name, rows: weight[rows]):
        layer(inputs).backward(gradient)
    assert inputs.grad is not None
    return error(then), error(inputs.grad)


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    cells = {f"slopes of {kind} layer by layer: correlation, relative error": slopes(kind) for kind in MODELS}
    cells |= {f"fingerprints that see {n} of 32,000 rows changed": rows_seen(n) for n in (1, 10, 100)}
    cells |= {
        "experts in int8: error as a share of a row": experts(),
        "backward through a large bf16 matrix": backward(),
    }
    print("| | then | now |\n|---|---:|---:|")
    for name, (then, now) in cells.items():
        print(f"| {name} | {then} | {now} |")


if __name__ == "__main__":
    main()
