"""Load and save a causal language model and its tokenizer: from disk only, safetensors only."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import psutil
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from fedtune_strategies.errors import ConfigError, ModelError, ResourceError
from fedtune_strategies.language.coded import CodedWeights, code_loaded, read_empty
from fedtune_strategies.language.model_files import (
    ADAPTER_CONFIG,
    count_parameters,
    model_config,
    model_folder,
    tensor_dtypes,
    weight_files,
    weights_dtype,
)

CGROUP = Path("/sys/fs/cgroup")
"""Where a container finds its own memory limit (control groups, version 2)."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LanguageModel:
    """A loaded model."""

    # In evaluation mode: no dropout. What text does not train (a vision tower) has ``requires_grad = False``.
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase  # has a padding token
    name: str  # as it was asked for
    folder: Path  # where the weights are
    coded: CodedWeights | None = None  # the base weights, where they are held coded or the model is empty


def load_model(
    name: str, dtype: str = "float32", device: str = "cpu", base: str = "exact", *, empty: bool = False
) -> LanguageModel:
    """Load a causal language model from disk; the network is never touched.

    `name` is a folder, the id of a model in the Hugging Face cache, or ``"fedtune-tiny"``. `base` is what is kept of
    its matrices, "exact", "int8" or "nf4"; the model's are what the codes decode to. An `empty` model has no weights of
    its own: they are in `LanguageModel.coded` alone, and only one tensor at a time is ever decoded, also while they are
    read.
    """
    folder, tokenizer = check_model(name)
    loaded = weights_dtype(folder, dtype)
    coded: CodedWeights | None
    if empty and (read := read_empty(folder, loaded, base)):
        model, coded = read
    else:
        needed = count_parameters(weight_files(folder)) * loaded.itemsize
        _check_memory(name, needed, device)
        model = _load_weights(name, folder, loaded)
        coded = code_loaded(model, base, empty=empty) if empty or base != "exact" else None
    freeze_other_modalities(model)
    model.to(torch.device(device))  # type: ignore[arg-type]  # transformers declares its wrapper without self
    return LanguageModel(model.eval(), tokenizer, name, folder, coded)


def check_model(name: str) -> tuple[Path, PreTrainedTokenizerBase]:
    """Check that a model can be tuned, without loading its weights: all that any part of FedTune admits passes here."""
    folder = model_folder(name)
    config = model_config(folder)
    _check_architecture(name, config)
    _check_weights(name, folder, config)
    tokenizer = load_tokenizer(name)
    settings = model_settings(name, folder)
    _check_modalities(name, settings)
    _check_vocabulary(name, settings, tokenizer)
    return folder, tokenizer


def freeze_other_modalities(model: PreTrainedModel) -> None:
    """Freeze what text does not train: the towers and projectors of a model that also sees or hears."""
    if not model.config.sub_configs:
        return
    parts = [model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings()]
    language = {id(parameter) for part in parts if part is not None for parameter in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in language:
            parameter.requires_grad_(False)


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model from disk; it has a padding token."""
    folder = model_folder(name)
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exception on a malformed file
        pieces = (folder / "tokenizer.model").is_file() and find_spec("sentencepiece") is None
        remedy = "pip install sentencepiece" if pieces else "copy the tokenizer's files there"
        raise ModelError(f"{name}: no usable tokenizer in {folder} ({_brief(error)}); {remedy}") from None
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise ModelError(
            f"{name}: has the chat templates {', '.join(map(repr, sorted(templates)))}, but none is named 'default'; "
            "give that name to the one to use, in the tokenizer's files"
        )
    _ensure_padding(name, tokenizer)
    return tokenizer


def check_context(name: str, settings: PretrainedConfig, seq_length: int) -> None:
    """Check that a model reads sequences of so many tokens."""
    limit = context_length(settings)
    if limit is not None and seq_length > limit:
        raise ConfigError(f"run config: 'train.seq-length' is {seq_length}, but {name} reads at most {limit}; lower it")


def context_length(settings: PretrainedConfig) -> int | None:
    """Return how many tokens a model reads at most; None where its configuration does not say."""
    return getattr(settings.get_text_config(), "max_position_embeddings", None)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a model as a plain Hugging Face folder that ``AutoModelForCausalLM.from_pretrained`` loads."""
    try:
        with _quiet():
            model.save_pretrained(folder)
            tokenizer.save_pretrained(str(folder))
    except Exception as error:  # the safetensors library wraps the system's error
        if getattr(error, "errno", None) != errno.ENOSPC and "os error 28" not in str(error):
            raise
        raise ResourceError(f"{folder}: no disk space left for the model; free some and export again") from None


def _check_architecture(name: str, config: dict[str, Any]) -> None:
    architecture = (config.get("architectures") or [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config["model_type"])])[0]
    # An encoder such as BERT can be loaded as a causal model too, but sees the tokens that it is to predict.
    if architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise ModelError(
            f"{name}: {architecture or config['model_type']} is not a causal language model that transformers "
            f"{transformers.__version__} knows; choose one such as Llama, Qwen, Gemma or GPT-2"
        )


def _load_weights(name: str, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with _quiet():
            loaded = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise ModelError(f"{name}: cannot be loaded as a causal language model: {_brief(error)}") from None
    model, info = cast(tuple[PreTrainedModel, dict], loaded)
    # What the files lack would be drawn at random, differently on every node.
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        raise ModelError(
            f"{name}: cannot be loaded as a causal language model: its weight files lack {len(missing)} tensors, "
            f"such as {missing[0]}"
        )
    return model


def _check_weights(name: str, folder: Path, config: dict[str, Any]) -> None:
    """Refuse weights that are not plain numbers, and adapters that transformers would attach to them."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    quantised = [part[key] for part in parts for key in ("quantization_config", "compression_config") if part.get(key)]
    method = str(quantised[0].get("quant_method", "bitsandbytes")) if quantised else ""
    packed = {dtype for path in weight_files(folder) for dtype in tensor_dtypes(path) if dtype.startswith("F8")}
    if method or packed:
        raise ModelError(f"{name}: is quantised ({method or 'fp8'}), which cannot be tuned; take the original model")
    if (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"{name}: files of an adapter are beside the model's weights, and would be loaded with them; move "
            f"{ADAPTER_CONFIG} and adapter_model.safetensors out of {folder}, or merge the adapter into the model"
        )


def model_settings(name: str, folder: Path) -> PretrainedConfig:
    """Read a model's settings as transformers knows them; `ModelError` where it knows no such model."""
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, KeyError) as error:
        raise ModelError(f"{name}: cannot be loaded as a causal language model: {_brief(error)}") from None


def _check_modalities(name: str, settings: PretrainedConfig) -> None:
    others = settings.sub_configs.keys() & {"vision_config", "audio_config"}
    if others and "text_config" not in settings.sub_configs:
        raise ModelError(
            f"{name}: a {settings.model_type} model also sees or hears with parts that cannot be told from its "
            "language model; choose one for text"
        )


def _check_vocabulary(name: str, settings: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    embedded = settings.get_text_config().vocab_size
    # Text models keep the tokens of their siblings that see or hear (Gemma 3 1B): no text holds them.
    media = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "audio", "video")}
    known = {index: token for token, index in tokenizer.get_vocab().items() if token not in media}
    beyond = [index for index in sorted(known) if index >= embedded]
    if tokenizer.pad_token_id >= embedded:
        raise ModelError(
            f"{name}: the padding token {tokenizer.pad_token!r} has id {tokenizer.pad_token_id}, but the model embeds "
            f"{embedded} tokens; set pad_token to a token of the model, such as {tokenizer.eos_token!r}"
        )
    if beyond:
        raise ModelError(
            f"{name}: the tokenizer has {beyond[-1] + 1} tokens but the model embeds {embedded}, none for "
            f"{known[beyond[0]]!r}; use the tokenizer that the model was trained with, or enlarge the embedding"
        )


def _ensure_padding(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is not None:
        return
    # Padding is masked from attention and loss, so any token that exists will do.
    tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token_id is None:
        raise ModelError(f"{name}: the tokenizer has no pad, eos or unk token; set pad_token in tokenizer_config.json")
    log.info("%s: the tokenizer has no padding token; padding with %s", name, tokenizer.pad_token)


def _check_memory(name: str, needed: int, device: str) -> None:
    available = _available_memory(device)
    if needed > available:
        raise ResourceError(
            f"{name}: the weights need {needed:,} bytes on {device}, but {available:,} are available; "
            "take a smaller model or a 16-bit dtype, or free memory"
        )


def _available_memory(device: str) -> int:
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ResourceError(
            f"device {device!r}: torch cannot use it on this machine ({_brief(error)}); take 'cpu'"
        ) from None
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min(psutil.virtual_memory().available, _container_memory())


def _container_memory() -> int:
    """Bytes left under the container's limit; psutil sees the whole machine only."""
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no control groups, or a limit of "max"
        return 1 << 62
    return limit - used + int(stat["inactive_file"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and advice off the screen."""
    shown, told = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(told)
        if shown:
            transformers_logging.enable_progress_bar()


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
