"""What a run of each method will cost a node, from the model's shape alone."""

from __future__ import annotations

from pathlib import Path

from fedtune_strategies.blocks.codec_config import coded_bytes
from fedtune_strategies.config import Config
from fedtune_strategies.cost import PROCESS, Cost, Fleet, Shape
from fedtune_strategies.errors import ConfigError
from fedtune_strategies.language.base import structure
from fedtune_strategies.language.coded import CODECS
from fedtune_strategies.language.model_files import is_only_described, weight_files, weights_dtype
from fedtune_strategies.method import load_method


def shape_of(folder: Path, config: Config) -> Shape:
    """Read a model's shape; no weight is loaded, and there need be none: then its type is what ``config.json`` says."""
    model, described = structure(folder), is_only_described(folder)
    text = model.config.get_text_config()
    hidden = text.hidden_size
    parameters = list(model.parameters())
    own = described and config.model.dtype == "auto"
    width = (parameters[0].dtype if own else weights_dtype(folder, config.model.dtype)).itemsize
    count = sum(value.numel() for value in parameters)
    base = config.model.base
    codes = 0.0 if base == "exact" else coded_bytes([tuple(one.shape) for one in parameters], CODECS[base], width)
    return Shape(
        parameters=count,
        layers=text.num_hidden_layers,
        hidden=hidden,
        inner=getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden,
        vocabulary=text.vocab_size,
        model=model,
        stored=width * count if described else sum(file.stat().st_size for file in weight_files(folder)),
        width=width,
        weights=width * count + round(codes),
    )


def plan(config: Config, folder: Path, nodes: int, examples: int) -> Cost:
    """Plan a run of a base model on so many nodes, each with so many examples."""
    method = load_method(config.method.name)
    if method.cost is None:
        raise ConfigError(f"the method '{method.name}' does not say what it costs: ask its author.")
    return method.cost(config, shape_of(folder, config), Fleet(nodes, examples))


def server_memory(config: Config, folder: Path) -> int:
    """Bytes that the server takes to hold and evaluate a model; a method may need more."""
    shape = shape_of(folder, config)
    return (
        PROCESS + shape.width * shape.parameters + shape.activations(config.eval.batch_size * config.train.seq_length)
    )
