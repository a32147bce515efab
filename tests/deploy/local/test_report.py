import io
from dataclasses import replace

import pytest
from rich.console import Console

from deploy.common.units import clock, size
from deploy.local.demo import _deal, _write, show_results
from deploy.local.proxy import Traffic
from deploy.local.report import markdown, samples, summarise
from fedtune_strategies.errors import DataError, RunError
from server_app.ledger import Ledger


def evaluation(loss, answer):
    answers = [{"prompt": f"ask {i}\nnow", "reference": f"right {i}", "answer": f"{answer} {i}"} for i in range(6)]
    return {"eval/loss": loss, "eval/perplexity": 2.0**loss, "eval/rougeL": 1 / loss, "answers": answers}


def write_run(folder, finished=True):
    """Write what a run of two rounds with two nodes writes."""
    ledger = Ledger(folder)
    ledger.append("start")
    ledger.append("evaluation", body=evaluation(4.0, "before"))
    for number in (1, 2):
        ledger.append("asked", round=number, body={"nodes": ["node-0", "node-1"]})
        for node in ("node-0", "node-1"):
            ledger.append("reply", round=number, node=node, body={"peak_memory": 100_000_000 * number, "loss": 3.0})
        ledger.append("round", round=number, body={"metrics": {"train/loss": 3.5 / number}, "files": {}})
        ledger.append("evaluation", round=number, body=evaluation(4.0 - number, "after"))
    if finished:
        ledger.append("finished", round=2, body={"model": str(folder / "model")})
    ledger.close()


@pytest.fixture
def results(tmp_path):
    for method in ("fedkseed", "fedcybgd"):
        write_run(tmp_path / method)
    traffic = {"fedkseed": Traffic(7_200, 72_000), "fedcybgd": Traffic(4_000_000, 40_000_000)}
    return [summarise(tmp_path / name, name, 2, traffic[name], 61.0) for name in traffic]


def test_figures_are_those_of_the_ledger_and_the_connections(results):
    first = results[0]
    assert (first.rounds, first.nodes, first.peak_memory) == (2, 2, 200_000_000)
    assert first.per_node_and_round == Traffic(1_800, 18_000)
    assert (first.before.loss, first.after.loss) == (4.0, 2.0)


def test_markdown_table_is_complete_and_rectangular(results):
    lines = markdown(results).splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in rows} == {5}
    assert "| held-out loss | 4.000 | 2.000 | 2.000 |" in rows
    assert "| perplexity | 16.00 | 4.00 | 4.00 |" in rows
    assert "| Rouge-L | 0.250 | 0.500 | 0.500 |" in rows
    assert "| up, a node and round |  | 1.8 kB | 1.0 MB |" in rows
    assert "| down, a node and round |  | 18.0 kB | 10.0 MB |" in rows
    assert "| up and down in all |  | 79.2 kB | 44.0 MB |" in rows
    assert "| peak memory of a node |  | 200.0 MB | 200.0 MB |" in rows
    assert "| seconds |  | 61 | 61 |" in rows


def test_samples_are_spread_evenly_not_chosen(results):
    shown = samples(results)
    assert [sample["expected"] for sample in shown] == ["right 0", "right 2", "right 4"]
    answers = {"expected": "right 2", "before": "before 2", "fedkseed": "after 2", "fedcybgd": "after 2"}
    assert shown[1] == {"prompt": "ask 2\nnow", **answers}


def test_the_demo_ends_with_table_samples_and_the_path_of_every_model(results, tmp_path):
    console = Console(file=io.StringIO(), width=80, color_system=None)
    _write(results, tmp_path)
    four = [replace(result, method=name) for result in results for name in (result.method, "fedkseed-pro")]
    show_results(four, tmp_path, console)
    text = console.file.getvalue()
    heads = [line.split() for line in text.splitlines() if "held-out loss" in line]
    assert heads == [["held-out", "loss", "4.000", "2.000", "2.000", "2.000", "2.000"]]  # on one line of 80
    assert "before 2" in text and str(tmp_path / "fedcybgd" / "model") in text.replace("\n", "")
    assert (tmp_path / "table.md").read_text() == markdown(results)
    assert '"per_node_and_round"' in (tmp_path / "results.json").read_text()


def test_an_unfinished_run_has_no_result(tmp_path):
    write_run(tmp_path, finished=False)
    with pytest.raises(RunError, match="no result yet"):
        summarise(tmp_path, "fedkseed", 2, Traffic(), 1.0)


def test_sizes_and_times_are_for_people():
    assert [size(n) for n in (0, 999, 1000, 17_984, 5_000_000, 2.5e12)] == [
        "0 B", "999 B", "1.0 kB", "18.0 kB", "5.0 MB", "2.5 TB"
    ]  # fmt: skip
    assert [clock(s) for s in (0, 59.9, 61, 12345)] == ["0:00", "0:59", "1:01", "3:25:45"]


def test_a_users_file_is_dealt_out_without_loss(tmp_path):
    source = tmp_path / "mine.jsonl"
    lines = [f'{{"prompt": "p{i}", "completion": "c{i}"}}' for i in range(103)]
    source.write_text("\n".join(lines) + "\n")
    files, held_out = _deal(source, tmp_path, 4)
    dealt = [file.read_text().splitlines() for file in [*files, held_out]]
    assert [len(part) for part in dealt] == [21, 21, 21, 20, 20]
    assert sorted(line for part in dealt for line in part) == sorted(lines)


def test_a_file_too_small_to_deal_is_refused(tmp_path):
    source = tmp_path / "mine.jsonl"
    source.write_text('{"prompt": "p", "completion": "c"}\n' * 4)
    with pytest.raises(DataError, match="4 records: too few for 4 nodes"):
        _deal(source, tmp_path, 4)
