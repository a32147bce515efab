"""From a run configuration to the strategy that it names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from fedtune_strategies.blocks.cut import cut_model
from fedtune_strategies.blocks.rest import Calibration, calibrate
from fedtune_strategies.config import METHODS, Config
from fedtune_strategies.language.data import read_rows
from fedtune_strategies.language.examples import batches, tokenise
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.language.model import load_tokenizer
from fedtune_strategies.method import load_method
from fedtune_strategies.seed_space import tuned_parameters
from fedtune_strategies.strategies.adapter_blocks import AdapterBlocks
from fedtune_strategies.strategies.arrays import ArraysStrategy
from fedtune_strategies.strategies.base import TuningStrategy
from fedtune_strategies.strategies.fedcybgd import FedCyBGD
from fedtune_strategies.strategies.fedit import FedIT
from fedtune_strategies.strategies.fedkseed import FedKSeed
from fedtune_strategies.strategies.fedkseed_pro import FedKSeedPro

CALIBRATION_ROWS = 128


def build_strategy(config: Config, model: nn.Module, base: Mapping[str, Tensor]) -> TuningStrategy:
    """Make the strategy of ``method.name``.

    Parameters
    ----------
    config : Config
        The run configuration.
    model : nn.Module
        The server's copy of the model; its structure gives the blocks.
    base : mapping of str to Tensor
        W_0 by canonical parameter name.

    Returns
    -------
    TuningStrategy
        A new strategy at the base model.
    """
    if config.method.name not in METHODS:
        return load_method(config.method.name).strategy(config, model, base)
    if config.method.name == "fedcybgd":
        return _fedcybgd(config, model, base)
    if config.method.name == "fedit":
        return FedIT(config, model, base)
    if config.method.name in ("fedavg", "fedzo"):
        return ArraysStrategy(config, base)
    if config.fedkseed.tune:
        base = {name: base[name] for name in tuned_parameters(model, config.fedkseed.tune)}
    return {"fedkseed": FedKSeed, "fedkseed-pro": FedKSeedPro}[config.method.name](config, base)


def _fedcybgd(config: Config, model: nn.Module, base: Mapping[str, Tensor]) -> FedCyBGD:
    def measure() -> Calibration:
        rows = read_rows(Path(config.fedcybgd.calibration).expanduser(), "auto")[:CALIBRATION_ROWS]
        examples = tokenise(rows, load_tokenizer(config.model.name), config.train.seq_length)
        count = -(-len(examples) // config.train.batch_size)
        chosen = list(batches(examples, config.train.batch_size, count, ("calibration",)))
        return calibrate(model, chosen, response_loss)

    if config.fedcybgd.adapters:
        return AdapterBlocks(config, model, base, measure)
    return FedCyBGD(config, base, cut_model(model, config), measure)
