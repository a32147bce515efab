"""The machinery of the comparison, benchmarks/compare.py: search, resumption, counting, table."""

import json
from pathlib import Path

import pytest
from comparison import runs
from comparison.protocols import PROTOCOLS, Entrant, Files, Protocol
from comparison.report import _apart, interval, read_lines, write_report
from comparison.runs import Study

from fedtune_strategies.protocol import messages
from fedtune_strategies.run_config import parse


@pytest.mark.parametrize("name", sorted(PROTOCOLS))
def test_every_entrant_has_a_valid_configuration_and_the_same_number_of_local_steps(name):
    protocol = PROTOCOLS[name]
    for entrant in protocol.entrants():
        config = parse(protocol.run_config(entrant) | {"train.lr": entrant.start})
        steps = config.train.local_steps
        if config.method.name == "fedcybgd":
            nodes = config.fedcybgd.nodes_per_round
        else:
            nodes = 1 if entrant.central else round(config.strategy.fraction_train * config.strategy.min_nodes)
        assert config.num_server_rounds * nodes * steps == protocol.budget, entrant.name


@pytest.fixture
def protocol(settings, data_files, tmp_path):
    common = settings | {"strategy.fraction-train": 1.0}
    for key in ("run.dir", "eval.data", "train.local-steps", "num-server-rounds"):
        del common[key]
    held_out = Path(settings["eval.data"])
    files = Files(list(data_files.values()), data_files["node-0"], held_out, held_out)

    class Small(Protocol):
        def settings(self):
            return common

    entrants = [
        Entrant("FedKSeed", {"method.name": "fedkseed", "train.local-steps": 2}, 1e-4),
        Entrant("FedAvg", {"method.name": "fedavg", "train.local-steps": 2}, 1e-3),
        Entrant("alone", {"method.name": "fedavg", "train.local-steps": 6}, 1e-3, True, "FedAvg"),
    ]
    return Small("small", lambda folder: files, rounds=2, steps=2, asked=3, list_entrants=lambda _: entrants)


def test_a_study_that_was_interrupted_goes_on_and_makes_a_report(protocol, tmp_path, monkeypatch):
    results = tmp_path / "results" / "runs.jsonl"
    monkeypatch.setattr(Study, "step_size", lambda self, entrant: entrant.start)
    with pytest.raises(SystemExit):
        Study(protocol, results, tmp_path / "work", seconds=-1).run_all([])
    Study(protocol, results, tmp_path / "work").run_all(["FedKSeed"], [0])
    before = results.read_text()
    Study(protocol, results, tmp_path / "work").run_all([], [0, 1])
    assert results.read_text().startswith(before)
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert len(rows) == len({(row["entrant"], row["seed"]) for row in rows}) == 6
    for row in rows:
        curve = row["curve"]
        assert len(curve) == 3 and curve[0]["down"] == 0 < curve[1]["down"] < curve[2]["down"]
        assert len(curve[-1]["nodes_cpu"]) == (1 if row["entrant"] == "alone" else 3)
        assert not any(str(tmp_path) in str(value) for value in row["settings"].values()), "a path of this machine"
    write_report(protocol, results.parent)
    page = (results.parent / "report.html").read_text()
    assert page.count("<img") == 4 and "FedAvg" in page
    table = (results.parent / "table.md").read_text()
    lines = {line.entrant.name: line for line in read_lines(protocol, results.parent)}
    assert f"{interval(lines['FedAvg'].last('loss'))}" in table


def test_the_search_goes_on_beyond_its_ends(protocol, tmp_path, monkeypatch):
    tried = []

    def loss(self, entrant, power):
        tried.append(power)
        return abs(power - 2.2)

    monkeypatch.setattr(Study, "_search", loss)
    study = Study(protocol, tmp_path / "runs.jsonl", tmp_path)
    first = protocol.entrants()[0]
    assert study.step_size(first) == pytest.approx(first.start * 9)
    assert tried == [-1, 0, 1, 2, 3]


def test_bytes_are_those_of_the_messages_both_ways():
    meter = runs.Meter()
    handle = meter.around(lambda kind, payload: (kind, payload * 2))
    handle("hello", b"12345")
    assert not meter.down and not meter.up
    first, second = (messages.encode(messages.Ack("node", round)) for round in (1, 2))
    assert handle("ack", first) == ("ack", first * 2)
    handle("ack", second)
    size = len(first)
    assert (meter.down, meter.up) == ({1: size, 2: size}, {1: 2 * size, 2: 2 * size})
    assert [runs.until(meter.down, round) for round in range(3)] == [0, size, 2 * size]


def test_names_beside_a_plot_are_moved_apart_and_no_farther_than_needed():
    assert _apart([1.0, 2.0, 3.0], 0.5) == [1.0, 2.0, 3.0]
    assert _apart([1.0, 1.0, 1.0, 5.0], 0.5) == pytest.approx([0.5, 1.0, 1.5, 5.0])


def test_the_interval_is_students():
    assert interval([1.0, 2.0, 3.0], 2) == "2.00 ± 2.48"  # 4.303 / sqrt(3)
    assert interval([1.5]) == "1.500"


def test_runs_of_different_evaluations_are_not_shown_side_by_side(tmp_path):
    def line(start, stage="final"):
        return json.dumps({"entrant": "FedAvg", "stage": stage, "curve": [{"loss": start}]}) + "\n"

    results = tmp_path / "runs.jsonl"
    results.write_text(line(4.0471) + line(4.0471) + line(3.5, "search"), encoding="utf-8")
    assert len(runs.read_runs(results)) == 3
    results.write_text(results.read_text() + line(4.0895), encoding="utf-8")
    with pytest.raises(SystemExit, match=r"different evaluations: before tuning they are at 4\.047, 4\.09"):
        runs.read_runs(results)
