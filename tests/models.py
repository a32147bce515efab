"""Tiny random models of every architecture, batches for them, and a tokenizer of single characters."""

from copy import deepcopy

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEHIRSU0123456789 \n.,:?#_|"
SIZES = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONTEXT = 128

CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES, intermediate_size=24, max_position_embeddings=CONTEXT),
    "llama-tied": transformers.LlamaConfig(
        **SIZES, intermediate_size=24, max_position_embeddings=CONTEXT, tie_word_embeddings=True
    ),
    "qwen2": transformers.Qwen2Config(
        **SIZES, intermediate_size=24, num_key_value_heads=1, max_position_embeddings=CONTEXT
    ),
    "qwen3": transformers.Qwen3Config(
        **SIZES, intermediate_size=24, num_key_value_heads=1, head_dim=8, max_position_embeddings=CONTEXT
    ),
    "gemma": transformers.GemmaConfig(
        **SIZES, intermediate_size=24, num_key_value_heads=1, head_dim=8, max_position_embeddings=CONTEXT
    ),
    "gpt2": transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=CONTEXT),
    "opt": transformers.OPTConfig(**SIZES, ffn_dim=24, word_embed_proj_dim=8, max_position_embeddings=CONTEXT),
    "gpt-neox": transformers.GPTNeoXConfig(**SIZES, intermediate_size=24, max_position_embeddings=CONTEXT),
    "mistral": transformers.MistralConfig(
        **SIZES, intermediate_size=24, num_key_value_heads=1, max_position_embeddings=CONTEXT
    ),
}


def make_tokenizer(**options):
    """Make a tokenizer of single characters; `options` override the special tokens."""
    specials = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokens = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | options
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **tokens)


def tiny_model(name="llama", dtype=torch.float32, **changes):
    """Make a random model of three layers, or with other changes of its configuration."""
    torch.manual_seed(0)
    known = {key: value for key, value in CONFIGS[name].to_dict().items() if key != "layer_types"}  # a list by layer
    config = type(CONFIGS[name]).from_dict(known | {"num_hidden_layers": 3} | changes)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def tiny_batches(count=4, seed=0):
    """Make batches of two random texts for `lm_loss`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 64, (2, 12), generator=generator) for _ in range(count)]


def lm_loss(model, batch):
    """Mean loss over all tokens of a batch."""
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def make_model(config):
    """Make a random model whose logits differ enough from token to token to tell answers apart."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(config))  # a model writes its dtype into its configuration
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    return model
