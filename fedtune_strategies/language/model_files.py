"""A model folder on disk: where it is, whether it is whole, what tensors it holds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open

from fedtune_strategies.errors import ModelError
from fedtune_strategies.tiny import MODEL_FOLDER

if TYPE_CHECKING:  # who looks at files alone needs no transformers
    from transformers import PreTrainedModel

EMBEDDED_NAME = "fedtune-tiny"
"""Name of the model that comes with the package."""

LONGEST_PART = 255
"""Most characters of a file's name."""

ADAPTER_CONFIG = "adapter_config.json"
"""File of peft that makes transformers attach an adapter on loading."""


def model_folder(name: str) -> Path:
    """Find the folder of a model, as `load_model` names it, on this machine; the network is never touched."""
    folder = MODEL_FOLDER if name == EMBEDDED_NAME else Path(name).expanduser()
    if any(len(part) > LONGEST_PART for part in folder.parts):
        raise ModelError(f"{name[:40]!r}…: too long for the name of a model")
    if folder.is_file():
        kind = "a GGUF file: give the folder of the original model, as safetensors"
        raise ModelError(f"{name}: is {kind if _is_gguf(folder) else 'a file: give the folder that holds it'}")
    if not folder.is_dir():
        folder = _cached_folder(name)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name}: {_without_config(folder)}")
    model_config(folder)
    return folder


def is_here(name: str) -> bool:
    """Say whether `model_folder` would find a model."""
    try:
        model_folder(name)
    except ModelError:
        return False
    return True


def model_config(folder: Path) -> dict[str, Any]:
    """Read a model folder's ``config.json``, which names a model type."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config["model_type"]
    except (ValueError, KeyError, TypeError):
        raise ModelError(f"{folder}: {path} does not say what model this is; download it again") from None
    return dict(config)


def is_only_described(folder: Path) -> bool:
    """Say whether a model folder holds no weights of any kind: enough for its shape."""
    return not any(path.suffix in (".safetensors", ".bin", ".gguf") for path in folder.iterdir())


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model folder in the order of their names, each checked to be whole."""
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
    elif any(folder.glob("model-*-of-*.safetensors")):
        raise ModelError(f"{folder}: the index of the weight files is missing; download {index.name} again")
    elif any(folder.glob("*.gguf")):
        raise ModelError(f"{folder}: holds a GGUF file; give the folder of the original model, as safetensors")
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


def tensor_dtypes(path: Path) -> set[str]:
    """Read which dtypes a safetensors file holds, as it names them (``"BF16"``, ``"F8_E4M3"``)."""
    with safe_open(path, framework="pt") as file:
        return {file.get_slice(key).get_dtype() for key in file.offset_keys()}


def weights_dtype(folder: Path, dtype: str) -> torch.dtype:
    """Return the type in which weights are held: of ``"auto"``, that of most numbers in the files, or float32."""
    if dtype != "auto":
        return cast(torch.dtype, getattr(torch, dtype))
    counts: Counter[str] = Counter()
    for path in weight_files(folder):
        with safe_open(path, framework="pt") as file:
            for part in map(file.get_slice, file.offset_keys()):
                counts[part.get_dtype()] += math.prod(part.get_shape())
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(counts.most_common(1)[0][0], torch.float32)


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


def stored_names(model: PreTrainedModel, stored: Collection[str]) -> dict[str, str]:
    """Return the name in its weight files of each parameter: of those that are not there, a name that is not either.

    Files written from a model without its head lack the prefix (the original GPT-2, for one).
    """
    prefix = model.base_model_prefix + "."
    return {name: name if name in stored else name.removeprefix(prefix) for name, _ in model.named_parameters()}


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _without_config(folder: Path) -> str:
    adapter = folder / ADAPTER_CONFIG
    if adapter.is_file():
        try:
            base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (ValueError, KeyError, TypeError):
            base = "another model"
        return f"is an adapter of {base}; merge it into that model once, and give the folder of the merged one"
    if any(folder.glob("*.gguf")):
        return "holds a GGUF file; give the folder of the original model, as safetensors"
    return f"not a model folder: no config.json in {folder}; give the folder that holds it"


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
    outside = [name for name in names if Path(name).name != name or "\\" in name]
    if outside:
        raise ModelError(
            f"{index}: names a file outside its folder, {outside[0]!r}; download the model from its source"
        )
    files = [index.parent / name for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelError(f"{index.parent}: incomplete download, without {', '.join(missing)}; download the model again")
    return files
