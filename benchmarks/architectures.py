"""Every causal language model of transformers that can be built tiny, on every path of ours: docs/architectures.md.

    python benchmarks/architectures.py > docs/architectures.md

Weights are random, four times as large as at initialisation, so that every layer matters. A path is "ok" where it gives
the result of the plain way: see `PATHS`.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fedtune_strategies.blocks.codec_config import Codec
from fedtune_strategies.blocks.codecs import decode, encode
from fedtune_strategies.blocks.find import Block, decoder_layers, find_blocks
from fedtune_strategies.blocks.frozen import FrozenBlocks
from fedtune_strategies.blocks.gradients import block_gradients
from fedtune_strategies.blocks.layers import PrefixCache, without_layers
from fedtune_strategies.blocks.rest import layer_influence
from fedtune_strategies.blocks.train import BlockUpdate, train_block
from fedtune_strategies.errors import ModelError
from fedtune_strategies.layer_weights import require_reads_within_layers
from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.zeroth_order import at_point, local_steps

LARGEST = 5_000_000  # parameters of what counts as tiny
POOL, SEEDS = make_pool("walsh", 3, 16), [4, 9, 4]
BATCH = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))

# What most configurations call their sizes. A configuration gets those that it knows.
SIZES: dict[str, object] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_inner", "encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 3),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), 3),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "context_length"), 64),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 12),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace", "num_key_value_heads"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "qk_head_dim", "head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim"), 4),
    **dict.fromkeys(("linear_num_heads", "linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_head_dim", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_d_state", "state_size", "mamba_head_dim", "sliding_window"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 4),
    **{"vocab_size": 64, "n_inner": None, "mamba_expand": 2, "attn_layer_period": 2, "attn_layer_offset": 1},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
# Multi-head latent attention: the part of a head that is rotated.
LATENT: dict[str, object] = {"head_dim": 4, "num_key_value_heads": 2}
OWN: dict[str, dict[str, object]] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "youtu"), LATENT),
    "longcat_flash": LATENT,
    "codegen": {"hidden_size": 32, "num_attention_heads": 4, "rotary_dim": 4},
    "diffllama": {"num_key_value_heads": 2},
    "dots3_note_text": {"num_key_value_heads": 2},
    "falcon_h1": {"mamba_d_ssm": 32},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": None,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 4,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 4},
    "gpt_neo": {"attention_types": [[["global"], 3]]},
    "gptj": {"rotary_dim": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 4, "n_groups": 1},
    "nemotron_h": {"n_groups": 1, "mamba_n_groups": 1},
    "roc_bert": {"pronunciation_vocab_size": 8, "shape_vocab_size": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "attn_layer_period": 3, "attn_layer_offset": 2},
    "zamba2": {
        "num_hidden_layers": 6,
        "layer_types": ["mamba", "mamba", "hybrid"] * 2,
        "num_mem_blocks": 1,
        "mamba_ngroups": 1,
        "n_mamba_heads": 4,
        "mamba_headdim": 8,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_model(kind: str) -> nn.Module:
    """Build a model of three small layers; raises where transformers cannot, `ModelError` where it is not tiny."""
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(_tiny_config(kind)).parameters())
    if size > LARGEST:
        raise ModelError(f"{size / 1e6:,.0f} million parameters")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_tiny_config(kind), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
        loss(model, BATCH)
    return model


def _tiny_config(kind: str) -> PreTrainedConfig:
    config: Any = CONFIG_MAPPING[kind]
    known = {**config().to_dict(), **config.attribute_map}
    return config(**{key: value for key, value in SIZES.items() if key in known} | OWN.get(kind, {}))


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean loss over all tokens."""
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def layerwise(model: nn.Module) -> bool:
    """A model rebuilt layer by layer has the loss and, up to rounding, the slopes of one that is moved in place."""
    names, theta = tuned_parameters(model), torch.linspace(-0.02, 0.02, 16)
    with torch.no_grad():
        require_reads_within_layers(model, names)
        with at_point(model, POOL, theta):
            found = loss(model, BATCH)
        before = {name: parameter.clone() for name, parameter in names.items()}
        POOL.rebuild_model(names, before, theta)
        same = torch.equal(found, loss(model, BATCH))
        for name, parameter in names.items():
            parameter.copy_(before[name])
    slopes = []
    for in_place in (False, True):
        steps = local_steps(model, POOL, loss, [BATCH] * 3, SEEDS, eps=1e-3, lr=0.0, in_place=in_place)
        slopes.append(steps.g)
    return same and np.allclose(slopes[0], slopes[1], rtol=0.02, atol=0.02)


def gradient(model: nn.Module) -> bool:
    """Each block's gradient is that of the whole model's backward pass."""
    loss(model, BATCH).backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    same = True
    for block in find_blocks(model):
        with block_gradients(model, block, loss, [BATCH], checkpoint=True) as found:
            tensors = found([0]).tensors
        for name, tensor in zip(block.parameters, tensors, strict=True):
            expected = wanted[name]
            same &= torch.allclose(tensor, torch.zeros(()) if expected is None else expected, rtol=1e-3, atol=1e-6)
    return same


def coded(model: nn.Module) -> bool:
    """A block trains to the same bits with the others decoded beforehand in int8, and decoded as they are used."""
    return _offloaded(model, "coded")


def on_disk(model: nn.Module) -> bool:
    """The same with the coded form in a file."""
    return _offloaded(model, "disk")


def _offloaded(model: nn.Module, hold: str) -> bool:
    blocks, block = find_blocks(model), _middle(model)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    parts = encode(weights, Codec("int8"))
    start = {name: weights[name] for name in block.parameters}
    for name, value in decode(parts).items():
        model.get_parameter(name).data.copy_(value)
    plain = train_block(model, block, loss, [BATCH], 2, 1e-2, start=start)
    frozen = FrozenBlocks(model, [name for own in blocks for name in own.parameters], hold)
    frozen.put(parts)
    with frozen.in_use(block.parameters):
        found = train_block(model, block, loss, [BATCH], 2, 1e-2, start=start)
    return _same(plain, found)


def cached(model: nn.Module) -> bool:
    """A block trains to the same bits with the layers below remembered; `ModelError` where they are not remembered."""
    block = _middle(model)
    plain = train_block(model, block, loss, [BATCH], 3, 1e-2)
    same = _same(plain, train_block(model, block, loss, [BATCH], 3, 1e-2, cache_bytes=2**20))
    _, layers = decoder_layers(model)
    trained = [model.get_parameter(name) for name in block.parameters]
    if same and not PrefixCache(2**20).check(list(layers)[: block.layer], trained, lambda: loss(model, BATCH)):
        raise ModelError("layers below a block run every time")
    return same


def dropped(model: nn.Module) -> bool:
    """A model computes without its middle layer, and differently."""
    layer_influence(model, [BATCH], loss)
    with torch.no_grad():
        whole = loss(model, BATCH)
        with without_layers(model, [1]):
            found = loss(model, BATCH)
    return bool(found.isfinite()) and not torch.equal(found, whole)


def saved(model: PreTrainedModel) -> bool:
    """A model that was saved and loaded computes the same loss."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        return torch.equal(
            loss(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), BATCH), loss(model, BATCH)
        )


PATHS: dict[str, Callable[[Any], bool]] = {
    "layer by layer": layerwise,
    "gradient": gradient,
    "coded": coded,
    "on disk": on_disk,
    "cached": cached,
    "dropped": dropped,
    "saved": saved,
}


def results(kind: str) -> list[str]:
    """``"ok"``, ``"wrong"`` or why not, for each path; a single reason where the kind cannot be built."""
    try:
        model = tiny_model(kind)
    except Exception as error:
        return [_line(error)]
    return [_result(copy.deepcopy(model), path) for path in PATHS]


def _result(model: nn.Module, path: str) -> str:
    try:
        return "ok" if PATHS[path](model) else "wrong"
    except ModelError as error:
        return f"refused: {_line(error)}"
    except Exception as error:
        return _line(error)


def kinds() -> list[str]:
    """All that transformers can make a causal language model of."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _line(error: Exception) -> str:
    """One line of a table."""
    name = "" if isinstance(error, ModelError) else f"{type(error).__name__}: "
    return name + " ".join(str(error).split()).replace("|", "/")[:120]


def _middle(model: nn.Module) -> Block:
    return next(block for block in find_blocks(model) if block.layer == 1)


def _same(first: BlockUpdate, second: BlockUpdate) -> bool:
    """Equal losses and changes, bit for bit; NaN is equal to nothing."""
    return (
        bool(first.losses)
        and first.losses == second.losses
        and all(torch.equal(first.delta[name], second.delta[name]) for name in first.delta)
    )


def page(rows: dict[str, list[str]]) -> str:
    """docs/architectures.md, from each kind's results."""
    built = {kind: row for kind, row in rows.items() if len(row) == len(PATHS)}
    right = [kind for kind, row in built.items() if set(row) == {"ok"}]
    notes = list(dict.fromkeys(cell for row in built.values() for cell in row if cell != "ok"))
    marks = {"ok": "ok"} | {note: f"({number})" for number, note in enumerate(notes, start=1)}
    lines = [
        "# Architectures",
        "",
        f"Each of the {len(rows)} causal language models of transformers {transformers.__version__} on every path of",
        f"ours: {len(built)} can be built tiny (three layers, at most {LARGEST // 10**6} million random parameters);",
        f"{len(right)} of them are right on all paths. Made by",
        "`python benchmarks/architectures.py > docs/architectures.md`;",
        "`tests/test_architectures.py` fails where a new release of transformers changes it.",
        "",
        *[f"- **{path}**: {function.__doc__}" for path, function in PATHS.items()],
        "",
        f"Right on every path: {textwrap.fill(', '.join(right), 120, break_on_hyphens=False)}.",
        "",
        f"| the others | {' | '.join(PATHS)} |",
        "|---" * (len(PATHS) + 1) + "|",
        *[f"| {kind} | {' | '.join(marks[cell] for cell in built[kind])} |" for kind in built if kind not in right],
        "",
        *[f"({number}) {note}" + "\n" for number, note in enumerate(notes, start=1)],
        "## Not built",
        "",
        "Larger ones hold a vision or audio tower; the language model alone is above where it has a name.",
        "",
        "| architecture | why |",
        "|---|---|",
        *[f"| {kind} | {row[0]} |" for kind, row in rows.items() if kind not in built],
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    print(page({kind: results(kind) for kind in sys.argv[1:] or kinds()}))
