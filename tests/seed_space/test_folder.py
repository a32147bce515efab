"""Rebuilding safetensors folders."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from fedtune_strategies.errors import ModelError
from fedtune_strategies.seed_space import make_pool, rebuild_folder


def test_every_shard_is_rebuilt_and_the_rest_copied(tmp_path):
    pool, theta = make_pool("walsh", 1, 32), torch.randn(32)
    source, target = tmp_path / "base", tmp_path / "tuned"
    source.mkdir()
    first = {"a": torch.randn(9, 7), "step": torch.arange(3)}
    save_file(first, source / "model-1.safetensors", metadata={"format": "pt"})
    save_file({"b": torch.randn(50).bfloat16()}, source / "model-2.safetensors")
    (source / "config.json").write_text("{}")
    rebuild_folder(pool, source, target, theta)
    assert (target / "config.json").read_text() == "{}"
    rebuilt = load_file(target / "model-1.safetensors")
    assert torch.equal(rebuilt["a"], pool.rebuild("a", first["a"], theta))
    assert torch.equal(rebuilt["step"], first["step"])
    assert load_file(target / "model-2.safetensors")["b"].dtype == torch.bfloat16


def test_a_folder_without_weights_or_of_another_model_is_refused(tmp_path):
    pool = make_pool("walsh", 1, 4)
    with pytest.raises(ModelError, match=r"no .*safetensors file"):
        rebuild_folder(pool, tmp_path, tmp_path / "out", torch.zeros(4))
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="lacks b"):
        rebuild_folder(pool, tmp_path, tmp_path / "out", torch.zeros(4), names=["a", "b"])
