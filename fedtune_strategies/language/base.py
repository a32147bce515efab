"""The base model W_0 as its files hold it: its structure, its weights, and the fingerprint by which it is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from fedtune_strategies.language.model import LanguageModel, freeze_other_modalities
from fedtune_strategies.language.model_files import map_tensors, stored_names, weight_files, weights_dtype
from fedtune_strategies.seed_space import fingerprint


def base_tensors(language: LanguageModel) -> Mapping[str, torch.Tensor]:
    """Return the base weights of a model that has just been loaded, to be kept unchanged while it is tuned.

    A parameter that is in the weight files exactly as it was loaded is mapped from there, which costs no memory of its
    own. Another one (converted to a different dtype, or renamed or merged on loading) is copied. Never write to them.
    """
    if language.coded is not None:
        return language.coded
    stored = map_tensors(weight_files(language.folder))
    keys = stored_names(language.model, stored)
    tensors = {}
    for name, parameter in language.model.named_parameters():
        weights = parameter.detach()
        mapped = stored.get(keys[name])
        same = mapped is not None and mapped.dtype == weights.dtype and torch.equal(mapped, weights.cpu())
        tensors[name] = mapped if mapped is not None and same else weights.clone()
    return tensors


def structure(folder: Path) -> PreTrainedModel:
    """Build a model on the meta device: all its modules, no weights."""
    settings = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
    freeze_other_modalities(model)
    return cast(PreTrainedModel, model)


def stored_fingerprint(folder: Path, dtype: str) -> str:
    """Return the fingerprint of `base_tensors` from the weight files, without loading the model.

    It is empty where it takes the loaded model to tell: weights that are renamed, merged, tied otherwise or kept in
    another type on loading.
    """
    model, files, loaded = structure(folder), weight_files(folder), weights_dtype(folder, dtype)
    if get_checkpoint_conversion_mapping(model.config.model_type) or model._keep_in_fp32_modules:
        return ""
    stored = map_tensors(files)
    keys = stored_names(model, stored)
    buffers = {name for name, _ in model.named_buffers()}
    if set(keys.values()) != stored.keys() - buffers or any(
        stored[key].shape != model.get_parameter(name).shape for name, key in keys.items()
    ):
        return ""
    return fingerprint((name, stored[key].to(loaded)) for name, key in keys.items())
