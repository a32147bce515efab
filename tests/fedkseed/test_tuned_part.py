"""Pools over a part of the parameters."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from fedtune_strategies.errors import ConfigError, ModelError
from fedtune_strategies.run_config import parse
from tests.federations import assert_resumed_alike, run


def test_only_matching_parameters_move(settings, data_files, tmp_path):
    settings |= {"train.parameters": r"layers\.1\..*proj", "num-server-rounds": 2, "eval.answers": 0}
    ledger = run(settings, data_files)
    assert not list(ledger.records("refused"))
    base = AutoModelForCausalLM.from_pretrained(settings["model.name"])
    tuned = AutoModelForCausalLM.from_pretrained(ledger.last("finished").body["model"])
    moved = {
        name for (name, a), b in zip(base.named_parameters(), tuned.parameters(), strict=True) if not torch.equal(a, b)
    }
    assert moved == {name for name, _ in base.named_parameters() if "layers.1." in name and "proj" in name}
    assert_resumed_alike(settings, data_files, tmp_path)


def test_a_pattern_without_a_match_or_meaning(settings, data_files):
    with pytest.raises(ModelError, match="nothing-like-this"):
        run(settings | {"train.parameters": "nothing-like-this"}, {})
    with pytest.raises(ConfigError, match="no regular expression"):
        parse({"train.parameters": "("})
