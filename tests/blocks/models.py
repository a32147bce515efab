"""Tiny random models of every supported architecture, batches for them, and how long property tests may take."""

import torch
from hypothesis import settings
from transformers import AutoConfig, AutoModelForCausalLM

# Torch's first call of an operation takes longer than hypothesis allows by default.
quick = settings(max_examples=30, deadline=None)

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT2 = {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32}
_OPT = {"ffn_dim": 32, "word_embed_proj_dim": 8}

ARCHITECTURES = {
    "llama": {},
    "mistral": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma": {"head_dim": 8},
    "gpt2": _GPT2,
    "opt": _OPT,
    "gpt_neox": {},
}


def tiny_model(name="llama", dtype=torch.float32, **changes):
    torch.manual_seed(0)
    kept = {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"} if name == "gpt2" else set(_SIZES)
    sizes = {key: value for key, value in _SIZES.items() if key in kept}
    config = AutoConfig.for_model(name, **{**sizes, **ARCHITECTURES[name], **changes})
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def tiny_batches(count=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (2, 12), generator=generator) for _ in range(count)]


def lm_loss(model, batch):
    return model(input_ids=batch, labels=batch, use_cache=False).loss
