"""A model folder on disk: where it lies, whether it is whole, what tensors it holds."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from fedtune_strategies.errors import ModelError
from fedtune_strategies.tiny import MODEL_FOLDER

EMBEDDED_NAME = "fedtune-tiny"
"""Name of the model that comes with the package."""


def model_folder(name: str) -> Path:
    """Find the folder of a model on this machine; the network is never touched.

    Parameters
    ----------
    name : str
        A folder, the id of a model in the Hugging Face cache, or `EMBEDDED_NAME`.

    Returns
    -------
    Path
        A folder whose ``config.json`` names a model type.

    Raises
    ------
    ModelError
        There is none.
    """
    folder = MODEL_FOLDER if name == EMBEDDED_NAME else Path(name).expanduser()
    if not folder.is_dir():
        folder = _cached_folder(name)
    config = folder / "config.json"
    if not config.is_file():
        raise ModelError(f"{name}: not a model folder: no config.json in {folder}; give the folder that holds it")
    try:
        json.loads(config.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{name}: {config} does not say what model this is; download it again") from None
    return folder


def is_here(name: str) -> bool:
    """Say whether `model_folder` would find a model."""
    try:
        model_folder(name)
    except ModelError:
        return False
    return True


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model folder, each checked to be whole.

    Parameters
    ----------
    folder : Path

    Returns
    -------
    list of Path
        In the order of their names.

    Raises
    ------
    ModelError
        There is none, one is missing, or one is cut short or damaged.
    """
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = _shards(index)
    elif any(folder.glob("*.bin")):
        raise ModelError(
            f"{folder}: the weights are pickled (.bin), and reading a pickle can run code; convert them once to "
            "safetensors by loading and save_pretrained on a machine where you trust them"
        )
    else:
        raise ModelError(f"{folder}: holds no weights (model.safetensors); download the model again")
    for path in files:
        try:
            tensor_shapes(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: incomplete or damaged ({error}); download the model again") from None
    return files


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Read the names and shapes in a safetensors file, and nothing else of it."""
    with safe_open(path, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.offset_keys()}


def count_parameters(files: list[Path]) -> int:
    """Count the numbers in safetensors files."""
    return sum(math.prod(shape) for path in files for shape in tensor_shapes(path).values())


def map_tensors(files: list[Path]) -> dict[str, torch.Tensor]:
    """Map all tensors of safetensors files into memory: pages are read when touched, and can be dropped again."""
    tensors = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            tensors.update({key: file.get_tensor(key) for key in file.offset_keys()})
    return tensors


def _cached_folder(name: str) -> Path:
    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, OSError):
        raise ModelError(
            f"{name}: no such folder, nor a model of that name in the Hugging Face cache; give a model folder, or "
            f"fetch the model once with `hf download {name}`"
        ) from None


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{index}: not an index of weight files; download the model again") from None
    files = [index.parent / name for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelError(f"{index.parent}: incomplete download, without {', '.join(missing)}; download the model again")
    return files
