"""A base model that is held coded: what the codes decode to is the base, on every holder, layer by layer or whole."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from client_app.node import Node
from fedtune_strategies.blocks.codecs import decode, encode
from fedtune_strategies.fedkseed.pools import nth_pool
from fedtune_strategies.language.base import base_tensors
from fedtune_strategies.language.coded import CODECS
from fedtune_strategies.language.model import load_model
from fedtune_strategies.run_config import defaults, parse
from fedtune_strategies.seed_gradient import decode as decode_point
from fedtune_strategies.seed_space import fingerprint
from fedtune_strategies.seed_space.scaled import rms_scales, scaled
from fedtune_strategies.testing import InMemoryGrid
from server_app.ledger import Ledger
from server_app.run import execute
from tests.federations import final_state, make_grid, make_nodes, run

HOLD = ("decoded", "coded", "disk")


def of_estimator(settings, name, base):
    flat = {"method.name": "fedkseed", "fedkseed.estimator": name}
    common = {key: value for key, value in settings.items() if key in defaults("fedkseed", flat)}
    own = {"train.lr": "auto", "fedkseed.seeds": 256} if name == "gradient" else {"fedkseed.pool-every": 2}
    return common | flat | own | {"model.base": base, "num-server-rounds": 3}


def decoded(settings):
    original = dict(AutoModelForCausalLM.from_pretrained(settings["model.name"]).named_parameters())
    codec = CODECS[settings["model.base"]]
    return {name: decode(encode({name: tensor.detach()}, codec))[name] for name, tensor in original.items()}


def expected(settings, base, ledger):
    """W_0 + sum_p sum_k theta_{p,k} z_{p,k}, pool by pool, from what the ledger holds."""
    config, last = parse(settings), list(ledger.records("round"))
    files = {label: ledger.get_file(name) for record in last for label, name in record.body["files"].items()}
    if settings["fedkseed.estimator"] == "gradient":
        scales = rms_scales(base)
        pools = [scaled(nth_pool(config, number), scales) for number in range(3)]
        points = [files[f"point-{number}"] for number in (1, 2, 3)]
        thetas = [torch.from_numpy(decode_point(one["levels"], float(one["unit"]), 4, 256)) for one in points]
    else:
        pools = [nth_pool(config, number) for number in range(2)]
        thetas = [files["pool-0"]["theta"], safetensors.torch.load(ledger.payload(last[-1]))["theta"]]
    for pool, theta in zip(pools, thetas, strict=True):
        base = {name: pool.rebuild(name, value, theta) for name, value in base.items()}
    return base


@pytest.mark.parametrize("estimator", ["gradient", "two-sided"])
@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_nodes_that_hold_it_in_different_ways_make_one_model_which_is_exported_exactly(
    settings, data_files, estimator, base
):
    """Every reply bears the fingerprint of the weights on which the node worked: all count, so all held the same."""
    settings = of_estimator(settings, estimator, base)
    paths = enumerate(zip(HOLD, data_files.items(), strict=True), start=1)
    nodes = {
        i: Node(settings, {"name": name, "data": str(path), "frozen": hold}, i) for i, (hold, (name, path)) in paths
    }
    execute(make_grid(nodes), settings, run_id=1)
    ledger = Ledger.read(Path(settings["run.dir"]))
    assert sum(1 for _ in ledger.records("reply")) == 9 and not list(ledger.records("refused"))
    assert len({node.base_fingerprint for node in nodes.values()}) == 1
    w_0 = decoded(settings)
    exported = dict(AutoModelForCausalLM.from_pretrained(Path(settings["run.dir"]) / "model").named_parameters())
    for name, value in expected(settings, w_0, ledger).items():
        assert torch.equal(exported[name], value), name
        assert not torch.equal(value, w_0[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_however_a_node_computes_the_gradient_ends_in_the_same_bits(settings, data_files, tmp_path, dtype):
    settings = of_estimator(settings, "gradient", "exact") | {"model.dtype": dtype, "num-server-rounds": 2}
    settings |= {"eval.data": ""}
    run(settings, data_files)
    for number, way in enumerate(({"frozen": "disk"}, {"checkpoint": "never"})):
        other = settings | {"run.dir": str(tmp_path / f"{number}")}
        run(other, data_files, **way)
        assert final_state(settings)[2] == final_state(other)[2], way


@pytest.mark.parametrize("base", ["exact", "int8", "nf4"])
def test_an_empty_model_and_a_loaded_one_have_the_same_base(settings, base):
    name = settings["model.name"]
    empty, whole = load_model(name, base=base, empty=True), load_model(name, base=base)
    assert fingerprint(base_tensors(empty)) == fingerprint(base_tensors(whole))
    assert all(parameter.untyped_storage().nbytes() <= 4 for parameter in empty.model.parameters())
    if base != "exact":
        share = empty.coded.nbytes / sum(4 * parameter.numel() for parameter in whole.model.parameters())
        assert share < (0.35 if base == "int8" else 0.25)


def test_a_node_with_another_base_is_refused_by_name(settings, data_files):
    settings = of_estimator(settings, "gradient", "int8") | {"strategy.min-nodes": 2, "num-server-rounds": 1}
    nodes = make_nodes(settings, data_files) | {3: make_nodes(settings | {"model.base": "nf4"}, data_files)[3]}
    execute(InMemoryGrid({i: node.handle for i, node in nodes.items()}), settings, run_id=1)
    refused = [record.body["reason"] for record in Ledger.read(Path(settings["run.dir"])).records("refused")]
    assert len(refused) == 1 and "another base model" in refused[0]
