"""Rebuilding a model folder of safetensors shards, one shard in memory at a time."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedtune_strategies.errors import ModelError
from fedtune_strategies.seed_space.pool import Pool


def rebuild_folder(
    pool: Pool, source: Path | str, target: Path | str, theta: Tensor, names: Collection[str] | None = None
) -> None:
    """Write a copy of a model folder with its weights at theta; everything but the weights is copied as it is.

    Parameters
    ----------
    pool : Pool
        The seed pool.
    source, target : Path or str
        Folder of the base model, with one or more ``*.safetensors``; folder to write, made if missing.
    theta : Tensor
        float32, shape (K,).
    names : collection of str, optional
        Canonical names of the tuned tensors. By default every floating-point tensor of the folder.

    Raises
    ------
    ModelError
        If the folder has no safetensors file, or not all of `names`.
    """
    source, target = Path(source), Path(target)
    shards = sorted(source.glob("*.safetensors"))
    if not shards:
        raise ModelError(f"{source} has no *.safetensors file: give a model folder saved by save_pretrained")
    target.mkdir(parents=True, exist_ok=True)
    missing = set(names or ())
    for path in source.iterdir():
        if path.is_file() and path not in shards:
            shutil.copyfile(path, target / path.name)
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            metadata = file.metadata()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and (names is None or name in names):
                pool.rebuild(name, tensor, theta, out=tensor)
        missing -= tensors.keys()
        save_file(tensors, target / shard.name, metadata=metadata)
    if missing:
        raise ModelError(
            f"{source} lacks {sorted(missing)[0]} and {len(missing) - 1} more: it belongs to another model"
        )
