"""Whole runs of FedCyBGD over an in-memory grid: every structure and every coding."""

import copy
from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from fedtune_strategies.blocks.codecs import decode
from fedtune_strategies.blocks.find import find_blocks
from fedtune_strategies.blocks.uploads import Residuals
from fedtune_strategies.errors import ConfigError
from fedtune_strategies.fedcybgd.messages import BlockTask
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.testing import InMemoryGrid, Lost
from server_app import rounds
from server_app.ledger import Ledger
from server_app.run import execute
from tests.conftest import write_rows
from tests.deploy.status.runs import report
from tests.federations import assert_resumes_exactly, make_nodes, run, run_with_restarts
from tests.models import CONFIGS, make_model, make_tokenizer


@pytest.fixture(scope="module")
def deep_llama(tmp_path_factory):
    """Folder of a random Llama with five layers, so that some can be left out."""
    folder = tmp_path_factory.mktemp("deep")
    config = copy.deepcopy(CONFIGS["llama"])
    config.num_hidden_layers = 5
    make_model(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def settings(settings, tmp_path):
    calibration = write_rows(tmp_path / "calibration.jsonl", 8, shift=3)
    return settings | {
        "method.name": "fedcybgd",
        "eval.data": "",
        "train.lr": 1e-2,
        "fedcybgd.calibration": str(calibration),
    }


def versioned(settings):
    """Hashes of all blocks of all rounds: equal ones mean that the runs took the same way."""
    ledger = Ledger.read(Path(settings["run.dir"]))
    return [
        {label: name for label, name in record.body["files"].items() if label.startswith("block")}
        for record in ledger.records("round")
    ]


def spied(settings, data_files):
    """Run; return (node number, task) of everything that was sent."""
    sent = []
    nodes = make_nodes(settings, data_files)

    def spy(number):
        def handle(kind, payload):
            sent.append((number, protocol.decode(kind, payload), len(payload)))
            return nodes[number].handle(kind, payload)

        return handle

    execute(InMemoryGrid({number: spy(number) for number in nodes}), settings, run_id=1)
    return [entry for entry in sent if isinstance(entry[1], BlockTask)]


VARIANTS = {
    "parallel": {"structure": "parallel", "nodes-per-round": 2, "order": "random", "rest": "nf4"},
    "averaged": {"structure": "averaged", "nodes-per-round": 2, "rest": "prune:0.5+int8"},
}


def variant(name):
    own = {f"fedcybgd.{key}": value for key, value in VARIANTS[name].items()}
    return own | {"train.upload": {"parallel": "sign", "averaged": "bf16"}[name]}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_killed_at_any_record_resumes_to_the_same_bits(settings, data_files, name, tmp_path):
    assert_resumes_exactly(settings | variant(name) | {"num-server-rounds": 2}, data_files, tmp_path, first=7)


@pytest.mark.parametrize("rest", ["nf4", "drop:2+prune:0.5+int8"])
def test_how_a_node_holds_the_rest_does_not_change_a_bit(settings, data_files, rest, deep_llama, tmp_path):
    settings |= {"model.name": str(deep_llama), "num-server-rounds": 6, "fedcybgd.rest": rest}
    for hold in ("decoded", "coded", "disk"):
        run(settings | {"run.dir": str(tmp_path / hold)}, data_files, frozen=hold)
    ways = [versioned({"run.dir": str(tmp_path / hold)}) for hold in ("decoded", "coded", "disk")]
    assert len(ways[0]) == 6 and ways[0] == ways[1] == ways[2]


def test_dropped_layers_are_not_sent(settings, data_files, deep_llama):
    settings |= {"model.name": str(deep_llama), "num-server-rounds": 16, "fedcybgd.rest": "drop:2+int8"}
    blocks = find_blocks(AutoModelForCausalLM.from_pretrained(deep_llama))
    for _, task, _ in spied(settings, data_files):
        absent = task.dropped.tolist()
        assert len(absent) == (2 if task.block >= 0 else 0)
        sent = {key.partition(":")[0] for key in task.frozen}
        assert not any(set(block.parameters) & sent for block in blocks if block.layer in absent)


@pytest.mark.parametrize("method", ["fedcybgd", "fedavg"])
def test_what_coding_kept_back_outlives_the_worker(settings, data_files, tmp_path, method):
    settings |= {"method.name": method, "train.upload": "sign", "num-server-rounds": 8 if method == "fedcybgd" else 3}
    undisturbed = settings | {"run.dir": str(tmp_path / "undisturbed")}
    run(undisturbed, data_files, folder=str(tmp_path / "a"), **{"draw-key": "public"})
    run_with_restarts(settings, data_files, folder=str(tmp_path / "b"), **{"draw-key": "public"})
    ours, theirs = (Path(one["run.dir"], "model", "model.safetensors").read_bytes() for one in (settings, undisturbed))
    assert ours == theirs
    assert list((tmp_path / "b" / "node-1" / "residuals").glob("*/*.safetensors"))


def test_a_restarted_worker_gets_blocks_again(settings, data_files, tmp_path):
    settings |= {"num-server-rounds": 4, "fedcybgd.rest": "prune:0.5+nf4"}
    forgetful = settings | {"run.dir": str(tmp_path / "forgetful")}
    run(settings, data_files)
    run_with_restarts(forgetful, data_files)
    assert versioned(forgetful) == versioned(settings)


@pytest.mark.parametrize("change", [{"checkpoint": "always"}, {"prefix-cache-mb": 1.0}])
def test_cheaper_steps_have_the_same_bits(settings, data_files, change, tmp_path):
    settings |= {"train.local-steps": 8, "fedcybgd.order": "descending"}
    run(settings, data_files)
    cheap = settings | {"run.dir": str(tmp_path / "cheap")}
    run(cheap, data_files, **change)
    assert versioned(cheap) == versioned(settings)


@pytest.mark.parametrize("change", [{"autocast": "bfloat16"}, {"accumulate": 2}])
def test_other_steps_learn_too(settings, data_files, change, tmp_path):
    settings |= {"eval.data": str(write_rows(tmp_path / "held.jsonl", 12)), "eval.answers": 0, "num-server-rounds": 8}
    ledger = run(settings | {f"fedcybgd.{key}": value for key, value in change.items()}, data_files)
    losses = [record.body["eval/loss"] for record in ledger.records("evaluation")]
    assert losses[-1] < losses[0]


def test_prefetching_changes_what_waits_and_not_a_bit(settings, data_files, tmp_path):
    settings |= {"num-server-rounds": 8}
    eager = settings | {"run.dir": str(tmp_path / "eager")}
    plain = settings | {"run.dir": str(tmp_path / "plain"), "fedcybgd.prefetch": False}
    ahead, waiting = spied(eager, data_files), spied(plain, data_files)
    assert versioned(eager) == versioned(plain)
    assert all(task.block >= 0 for _, task, _ in waiting)
    # With its turn a node now gets the block that was trained last, and nothing that was known before.
    late = [size for _, task, size in ahead if task.block >= 0]
    assert sum(late[3:]) < 0.7 * sum(size for _, _, size in waiting[3:])
    for _, task, _ in ahead:
        training = next(own for _, own, _ in ahead if own.round == task.round and own.block >= 0)
        if task.block < 0:
            names = {key.partition(":")[0] for key in task.frozen}
            block = find_blocks(AutoModelForCausalLM.from_pretrained(settings["model.name"]))[training.block]
            assert not names & set(block.parameters)


def test_a_node_that_hangs_while_it_is_sent_something_ahead_does_not_hold_the_round(settings, data_files, monkeypatch):
    """The deadline is an hour: with the turns there the round ends, and the model is the same."""
    monkeypatch.setattr(rounds, "AHEAD", 0.0)
    settings |= {"num-server-rounds": 3, "eval.every": 3, "round.deadline": 3600.0}
    plain = settings | {"run.dir": settings["run.dir"] + "-plain", "fedcybgd.prefetch": False}
    nodes, hung = make_nodes(settings, data_files), []

    def hanging(node):
        def handle(kind, payload):
            task = protocol.decode(kind, payload)
            if isinstance(task, BlockTask) and task.block < 0:
                hung.append(task.round)
                raise Lost
            return node.handle(kind, payload)

        return handle

    execute(InMemoryGrid({number: hanging(node) for number, node in nodes.items()}), settings, run_id=1)
    run(plain, data_files)
    assert hung and versioned(settings) == versioned(plain)


def test_bytes_of_parts_sent_ahead_are_in_the_ledger(settings, data_files):
    sent = Counter()
    for number, task, size in spied(settings, data_files):
        sent[f"node-{number - 1}", task.round] += size
    ledger, counted = Ledger.read(Path(settings["run.dir"])), Counter()
    for record in [*ledger.records("reply"), *ledger.records("acknowledged")]:
        counted[record.node, record.round] += record.body["bytes_down"]
    assert {record.body["kind"] for record in ledger.records("acknowledged")} == {"ack"}
    assert counted == sent
    shown = report(ledger.folder)
    assert {node["name"]: node["bytes_down"] for node in shown["nodes"]} == {
        name: sum(size for (node, _), size in sent.items() if node == name) for name in data_files
    }
    assert shown["totals"]["bytes_down"] == sum(one["bytes_down"] for one in shown["rounds"]) == sent.total()
    total = sum(r.body["bytes_up"] for kind in ("reply", "acknowledged") for r in ledger.records(kind)) + sent.total()
    assert f"{total:,} bytes" in (ledger.folder / "model" / "README.md").read_text()


def test_parallel_nodes_train_different_blocks_of_one_snapshot(settings, data_files):
    settings |= {"fedcybgd.structure": "parallel", "fedcybgd.nodes-per-round": 2, "num-server-rounds": 3}
    sent = [(number, task) for number, task, _ in spied(settings, data_files) if task.block >= 0]
    assert [task.block for _, task in sent] == [0, 1, 2, 3, 0, 1]
    assert [task.versions.tolist() for _, task in sent[:4]] == [[0] * 4, [0] * 4, [1, 1, 0, 0], [1, 1, 0, 0]]
    ledger = Ledger.read(Path(settings["run.dir"]))
    assert ledger.last("round").body["metrics"]["blocks"] == [0, 1]
    assert safetensors.torch.load(ledger.payload(ledger.last("round")))["versions"].tolist() == [2, 2, 1, 1]


def test_what_a_lost_node_left_undone_goes_to_an_idle_one(settings, data_files):
    settings |= {"fedcybgd.structure": "parallel", "fedcybgd.nodes-per-round": 2, "num-server-rounds": 2}
    nodes = make_nodes(settings, data_files)
    losses = iter([True])

    def loses_one(kind, payload):
        if kind == "block-task" and protocol.decode(kind, payload).block >= 0 and next(losses, False):
            raise RuntimeError("power cut")
        return nodes[2].handle(kind, payload)

    execute(InMemoryGrid({1: nodes[1].handle, 2: loses_one, 3: nodes[3].handle}), settings, run_id=1)
    rounds = [record.body["metrics"]["blocks"] for record in Ledger.read(Path(settings["run.dir"])).records("round")]
    assert rounds == [[0], [1, 2, 3]]


def test_an_idle_node_takes_over_in_the_same_round(settings, data_files):
    settings |= {"fedcybgd.structure": "averaged", "fedcybgd.nodes-per-round": 2, "strategy.min-replies": 2}
    nodes = make_nodes(settings, data_files)

    def lost(kind, payload):
        if kind == "block-task":
            raise RuntimeError("power cut")
        return nodes[2].handle(kind, payload)

    execute(InMemoryGrid({1: nodes[1].handle, 2: lost, 3: nodes[3].handle}), settings, run_id=1)
    ledger = Ledger.read(Path(settings["run.dir"]))
    assert [sorted(record.body["replies"]) for record in ledger.records("round")] == [["node-0", "node-2"]] * 3


def test_several_nodes_on_one_block_are_averaged(settings, data_files):
    settings |= {"fedcybgd.structure": "averaged", "fedcybgd.nodes-per-round": 3, "num-server-rounds": 2}
    ledger = run(settings, data_files)
    start = find_blocks(AutoModelForCausalLM.from_pretrained(settings["model.name"]))[0].parameters
    base = AutoModelForCausalLM.from_pretrained(settings["model.name"]).state_dict()
    replies = [protocol.decode("block-reply", ledger.payload(record)) for record in ledger.records("reply", round=1)]
    assert len(replies) == 3
    total = sum(reply.num_examples for reply in replies)
    new = ledger.get_file(next(ledger.records("round")).body["files"]["block-0"])
    for name in start:
        mean = sum(decode(reply.delta)[name] * (reply.num_examples / total) for reply in replies)
        torch.testing.assert_close(new[name], base[name] + mean)


def test_a_coded_upload_is_smaller(settings, data_files, tmp_path):
    sizes = []
    for upload in ("float32", "bf16", "int8", "sign"):
        ledger = run(settings | {"train.upload": upload, "run.dir": str(tmp_path / upload)}, data_files)
        sizes.append(sum(record.body["bytes_up"] for record in ledger.records("reply")))
    assert sizes[0] > sizes[1] > sizes[2] > sizes[3]


@pytest.mark.parametrize("upload", ["int8", "sign"])
def test_a_coded_upload_carries_what_it_lost_into_the_next(settings, data_files, tmp_path, monkeypatch, upload):
    settings |= {"num-server-rounds": 5, "train.upload": upload, "strategy.min-nodes": 1}
    one, without = {"node-0": data_files["node-0"]}, settings | {"run.dir": str(tmp_path / "without")}
    own = {"draw-key": "public", "folder": str(tmp_path / "node")}  # only a node with a folder keeps them in files
    run(settings, one, **own)
    monkeypatch.setattr(Residuals, "get", lambda self, block, default: {})
    run(without, one, **own)
    # Four blocks: the fifth round is the first that comes back to one.
    assert versioned(settings)[:4] == versioned(without)[:4]
    assert versioned(settings)[4] != versioned(without)[4]


def test_adapters_alone_are_trained_and_merged(settings, data_files, tmp_path):
    settings |= {"fedcybgd.adapters": True, "lora.targets": "all-linear", "num-server-rounds": 5}
    ledger = run(settings | {"eval.data": str(write_rows(tmp_path / "held.jsonl", 12)), "eval.answers": 0}, data_files)
    assert [record.body["metrics"]["blocks"] for record in ledger.records("round")] == [[0], [1], [0], [1], [0]]
    assert all(
        ".lora_" in name
        for r in ledger.records("round")
        for f in r.body["files"].values()
        for name in ledger.get_file(f)
    )
    losses = [record.body["eval/loss"] for record in ledger.records("evaluation")]
    assert losses[-1] < losses[0]
    base = AutoModelForCausalLM.from_pretrained(settings["model.name"]).state_dict()
    tuned = AutoModelForCausalLM.from_pretrained(ledger.last("finished").body["model"]).state_dict()
    changed = {name for name, value in base.items() if not torch.equal(value, tuned[name])}
    assert changed == {name for name, value in base.items() if value.dim() == 2 and "layers" in name}


def test_the_learning_rate_runs_over_the_rounds(settings, data_files):
    settings |= {"num-server-rounds": 4, "train.lr-schedule": "linear", "train.warmup": 0.5}
    rates = [task.lr for _, task, _ in spied(settings, data_files) if task.block >= 0]
    assert rates == pytest.approx([0.0025, 0.0075, 0.0075, 0.0025])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fedcybgd.rest": "int7"}, "int7"),
        ({"fedcybgd.rest": "drop:1", "fedcybgd.calibration": ""}, "fedcybgd.calibration"),
        ({"fedcybgd.nodes-per-round": 2}, "sequential"),
        ({"fedcybgd.structure": "parallel", "fedcybgd.nodes-per-round": 4}, "min-nodes"),
        ({"strategy.min-replies": 2}, "min-replies"),
        (
            {"fedcybgd.structure": "parallel", "fedcybgd.nodes-per-round": 2, "strategy.min-replies": 2},
            "must be 1 where",
        ),
    ],
)
def test_keys_that_do_not_go_together(settings, change, words):
    with pytest.raises(ConfigError, match=words):
        run(settings | change, {})
