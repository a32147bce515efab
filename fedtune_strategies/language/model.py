"""Load and save a causal language model and its tokenizer: from disk only, safetensors only."""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fedtune_strategies.errors import ModelError, ResourceError

Dtype = Literal["float32", "bfloat16", "float16"]

EMBEDDED_NAME = "fedtune-tiny"
EMBEDDED_FOLDER = Path(__file__).parent.parent / "tiny" / "model"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model.

    Attributes
    ----------
    model : PreTrainedModel
        In evaluation mode: no dropout.
    tokenizer : PreTrainedTokenizerBase
        Has a padding token.
    name : str
        As it was asked for.
    folder : Path
        Where the weights lie.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    folder: Path


def load_model(name: str, dtype: Dtype = "float32", device: str = "cpu") -> LanguageModel:
    """Load a causal language model from disk; the network is never touched.

    Parameters
    ----------
    name : str
        A folder, the id of a model in the Hugging Face cache, or ``"fedtune-tiny"`` for the embedded model.
    dtype : {"float32", "bfloat16", "float16"}
        Of the loaded weights.
    device : str
        ``"cpu"``, ``"cuda"``, ``"cuda:1"`` …

    Returns
    -------
    LanguageModel

    Raises
    ------
    ModelError
        No such model, not a model folder, weights missing, truncated or not safetensors, not a causal language model,
        or no usable tokenizer.
    ResourceError
        The weights do not fit in the memory that is available.
    """
    folder = model_folder(name)
    files = weight_files(folder)
    _check_memory(name, _count_parameters(files) * getattr(torch, dtype).itemsize, device)
    tokenizer = _load_tokenizer(name, folder)
    with _quiet():
        model = _load_weights(name, folder, dtype)
    _check_vocabulary(name, model, tokenizer)
    _ensure_padding(name, model, tokenizer)
    return LanguageModel(model.to(device).eval(), tokenizer, name, folder)


def base_tensors(language: LanguageModel) -> Mapping[str, torch.Tensor]:
    """Return the base weights of a model that has just been loaded, to be kept unchanged while it is tuned.

    A parameter that lies in the weight files as it was loaded is mapped from there, which costs no memory of its own;
    another (converted to a different dtype, or stored under a shape of its own) is copied.

    Parameters
    ----------
    language : LanguageModel
        Not yet tuned.

    Returns
    -------
    Mapping of str to torch.Tensor
        By canonical name (the first in ``model.named_parameters()`` of tied ones), in the dtype of the model, on the
        CPU if mapped. Never write to them.
    """
    stored = {}
    for path in weight_files(language.folder):
        with safe_open(path, framework="pt") as file:
            stored |= {key: (path, key) for key in file.keys()}
    prefix = language.model.base_model_prefix + "."
    tensors = {}
    for name, parameter in language.model.named_parameters():
        # Files written from a model without its head lack the prefix (the original GPT-2, for one).
        entry = stored.get(name) or stored.get(name.removeprefix(prefix))
        mapped = _map_tensor(*entry) if entry else None
        weights = parameter.detach()
        same = mapped is not None and mapped.dtype == weights.dtype and torch.equal(mapped, weights.cpu())
        tensors[name] = mapped if same and mapped is not None else weights.clone()
    return tensors


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a model as a plain Hugging Face folder that ``AutoModelForCausalLM.from_pretrained`` loads.

    Parameters
    ----------
    model : PreTrainedModel
        Tied weights are written once.
    tokenizer : PreTrainedTokenizerBase
    folder : str or Path
        Made if absent.

    Raises
    ------
    ResourceError
        The disk is full.
    """
    try:
        with _quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ResourceError(f"{folder}: no disk space left for the model; free some and export again") from None


def model_folder(name: str) -> Path:
    """Find the folder of a model on this machine.

    Parameters
    ----------
    name : str
        As in `load_model`.

    Returns
    -------
    Path

    Raises
    ------
    ModelError
        There is none, or it holds no ``config.json``.
    """
    folder = EMBEDDED_FOLDER if name == EMBEDDED_NAME else Path(name).expanduser()
    if not folder.is_dir():
        folder = _cached_folder(name)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name}: not a model folder: {folder} holds no config.json")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model folder, checked to be whole.

    Parameters
    ----------
    folder : Path

    Returns
    -------
    list of Path

    Raises
    ------
    ModelError
        There is none, one is missing, or one is cut short.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    files = [folder / name for name in names]
    missing = [path.name for path in files if not path.is_file()]
    if missing and not index.is_file():
        if any(folder.glob("*.bin")):
            raise ModelError(
                f"{folder}: weights are in .bin files, which can run code when read; convert them once with "
                "save_pretrained, which writes safetensors"
            )
        raise ModelError(f"{folder}: holds no weights (model.safetensors); download the model again")
    if missing:
        raise ModelError(f"{folder}: incomplete download: {', '.join(missing)} missing; download the model again")
    for path in files:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path}: incomplete or damaged ({error}); download the model again") from None
    return files


def _cached_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (HFValidationError, OSError):
        raise ModelError(
            f"{name}: no such folder, and no model of this name in the Hugging Face cache; give a model folder, or "
            f"fetch the model once with: hf download {name}"
        ) from None


def _load_weights(name: str, folder: Path, dtype: Dtype) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise ModelError(f"{name}: cannot be loaded as a causal language model: {_brief(error)}") from None
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{name}: the weight files lack {missing[0]} and {len(missing) - 1} more of the model's weights"
        )
    return model


def _load_tokenizer(name: str, folder: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizer library raises bare Exception on a malformed file
        raise ModelError(f"{name}: no usable tokenizer in {folder}: {_brief(error)}") from None


def _ensure_padding(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is not None:
        return
    # Padding is masked from attention and loss, so any token that exists will do.
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{name}: the tokenizer has no pad, eos or unk token; set pad_token in tokenizer_config.json")
    log.info("%s: the tokenizer has no padding token; using %s", name, tokenizer.pad_token)


def _check_vocabulary(name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} tokens but the model embeds {rows}; "
            "the folder mixes two models"
        )


def _check_memory(name: str, needed: int, device: str) -> None:
    if torch.device(device).type == "cuda":
        if not torch.cuda.is_available():
            raise ResourceError(f"device {device!r} asked for, but torch finds no GPU on this machine; use 'cpu'")
        available = torch.cuda.mem_get_info(device)[0]
    else:
        available = psutil.virtual_memory().available
    if needed > available:
        raise ResourceError(
            f"{name}: its weights need {needed:,} bytes of memory on {device} but {available:,} are available; "
            "choose a smaller model or a 16-bit dtype, or free memory"
        )


def _count_parameters(files: list[Path]) -> int:
    count = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            count += sum(_size(file.get_slice(key).get_shape()) for key in file.keys())
    return count


def _size(shape: list[int]) -> int:
    return int(torch.Size(shape).numel())


def _map_tensor(path: Path, key: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(key)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars off the screen."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
