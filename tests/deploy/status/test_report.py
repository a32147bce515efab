import json
import os
import sqlite3
from contextlib import closing

import pytest

from deploy.common.paths import newest_runs
from deploy.status import report as document
from fedtune_strategies.errors import LedgerError
from fedtune_strategies.run_config import defaults
from server_app import run_view
from server_app.ledger import Ledger
from server_app.run_view import RunView
from server_app.steps import write_measured, write_steps
from tests.deploy.status.runs import NODES, begin, finished_run, play, pro_state, reply, report
from tests.federations import run


def test_a_real_run_is_told_as_its_ledger_has_it(settings, data_files):
    ledger = run(settings | {"method.name": "fedkseed-pro"}, data_files)
    shown = json.loads(json.dumps(report(ledger.folder), allow_nan=False))
    replies = list(ledger.records("reply"))
    assert (shown["run"]["state"], shown["run"]["round"], shown["run"]["rounds"]) == ("finished", 3, 3)
    assert shown["totals"]["bytes_up"] == sum(one.body["bytes_up"] for one in replies)
    assert [one["round"] for one in shown["rounds"]] == [1, 2, 3]
    assert [one["loss"] for one in shown["evaluations"]] == [
        one.body["eval/loss"] for one in ledger.records("evaluation")
    ]
    # Every node worked on the weights that the server had after the round before.
    after = {one["round"]: one["fingerprint"] for one in shown["evaluations"]}
    assert all(one["fingerprints"] == [after[one["round"] - 1]] for one in shown["rounds"])
    assert {node["name"] for node in shown["nodes"]} == set(data_files)
    assert sum(height for _, height in shown["panel"]["columns"]) == 64
    assert len(shown["answers"]) == 2 and all(answer["after"] for answer in shown["answers"])


def test_what_each_node_does_and_did(tmp_path):
    ledger = begin(tmp_path)
    play(ledger, 1, answering=("alice", "bob"))
    ledger.append("lost", node="bob", body={"reason": "is no longer connected"})
    ledger.append("asked", round=2, body={"nodes": ["alice", "carol"]})
    ledger.append("reply", round=2, node="alice", body=reply(2, "alice"))
    shown = report(tmp_path)
    assert {node["name"]: node["state"] for node in shown["nodes"]} == {
        "alice": "present", "bob": "lost", "carol": "working",
    }  # fmt: skip
    assert shown["totals"]["nodes_alive"] == 2
    states = {(turn["round"], turn["node"]): turn["state"] for turn in shown["turns"]}
    assert states == {
        (1, "alice"): "replied", (1, "bob"): "replied", (1, "carol"): "none",
        (2, "alice"): "replied", (2, "carol"): "working",
    }  # fmt: skip
    ledger.append("round", round=2, body={"metrics": {}, "files": {}})
    ledger.close()
    assert {node["name"]: node["state"] for node in report(tmp_path)["nodes"]}["carol"] == "silent"


def test_a_node_that_only_kept_a_part_had_no_turn_and_is_not_silent(tmp_path):
    ledger = begin(tmp_path, "fedcybgd")
    play(ledger, 1, answering=("alice",))
    shown = report(tmp_path)
    assert {turn["node"]: turn["state"] for turn in shown["turns"]} == {
        "alice": "replied",
        "bob": "none",
        "carol": "none",
    }
    ledger.append("acknowledged", round=1, node="bob", body={"kind": "kept", "bytes_down": 500, "bytes_up": 70})
    ledger.close()
    shown = report(tmp_path)
    assert {node["name"]: node["state"] for node in shown["nodes"]} == {
        "alice": "present", "bob": "present", "carol": "silent",
    }  # fmt: skip
    assert {turn["node"]: turn["state"] for turn in shown["turns"]} == {"alice": "replied", "carol": "none"}
    assert (shown["rounds"][0]["bytes_down"], shown["rounds"][0]["bytes_up"]) == (1500, 170)
    assert (shown["rounds"][0]["replies"], shown["totals"]["bytes_down"]) == (1, 1500)


def test_who_only_receives_is_not_counted_among_those_asked_for_a_reply(tmp_path):
    with closing(begin(tmp_path, "fedcybgd")) as ledger:
        ledger.append("asked", round=1, body={"nodes": dict.fromkeys(NODES, 10)})
        ledger.append("acknowledged", round=1, node="alice", body={"kind": "ack"})  # then it has its turn
        ledger.append("reply", round=1, node="alice", body=reply(1, "alice"))
        ledger.append("acknowledged", round=1, node="bob", body={"kind": "ack"})
        ledger.append("acknowledged", round=1, node="carol", body={"kind": "state-missing"})
        assert report(tmp_path)["run"]["phase"] == "1 of 3 replied"
        ledger.append("round", round=1, body={"metrics": {}, "files": {}})
    shown = report(tmp_path)["rounds"][0]
    assert (shown["replies"], shown["asked"]) == (1, 2)


def test_the_steps_of_an_open_round_are_those_that_its_nodes_said_last(tmp_path):
    with closing(begin(tmp_path)) as ledger:
        play(ledger, 1)
        view = RunView(tmp_path)
        write_steps(tmp_path, {"alice": (200, 200)})  # of the first round
        ledger.append("asked", round=2, body={"nodes": dict.fromkeys(("alice", "bob", "carol"), 10)})
        os.utime(tmp_path / "steps.json", (0, 0))
        assert view.update() and document.phase(view) == "0 of 3 replied"
        write_steps(tmp_path, {"alice": (57, 200), "bob": (8, 200), "gone": (1, 200)})
        assert view.update() and document.phase(view) == "0 of 3 replied, step 8/200"
        assert [node["step"] for node in document.report(view)["nodes"]] == [(57, 200), (8, 200), None]
        ledger.append("reply", round=2, node="bob", body=reply(2, "bob"))
        assert view.update() and document.phase(view) == "1 of 3 replied, step 57/200"
        (tmp_path / "steps.json").write_text("half a li")
        assert view.update() and document.phase(view) == "1 of 3 replied" and not view.update()


def test_bytes_that_no_reply_accounts_for_are_in_the_totals(tmp_path):
    finished_run(tmp_path, rounds=1)
    before = report(tmp_path)["totals"]
    with closing(Ledger(tmp_path)) as ledger:
        ledger.append("joined", node="bob", body={"reason": "joined", "bytes_down": 4_000})  # the base model
        ledger.append("lost", node="bob", body={"reason": "did not answer", "bytes_down": 300})
        ledger.append("refused", round=1, node="bob", body={"reason": "no", "bytes_down": 20, "bytes_up": 7})
    after = report(tmp_path)["totals"]
    assert (after["bytes_down"] - before["bytes_down"], after["bytes_up"] - before["bytes_up"]) == (4_320, 7)


def test_refusals_are_counted_and_told(tmp_path):
    ledger = begin(tmp_path)
    ledger.append("refused", node="node 0012", body={"reason": "holds another base model"})
    ledger.append("asked", round=1, body={"nodes": list(NODES)})
    ledger.append("refused", round=1, node="bob", body={"reason": "worked on other weights"})
    ledger.close()
    shown = report(tmp_path)
    assert shown["totals"]["refused"] == 2
    assert [note["reason"] for note in shown["notes"]] == ["worked on other weights", "holds another base model"]
    assert next(turn for turn in shown["turns"] if turn["node"] == "bob")["state"] == "refused"


def test_a_failed_run_shows_its_line_until_it_is_resumed(tmp_path):
    ledger = begin(tmp_path)
    ledger.append("failed", body={"exit_code": 14, "message": "too few nodes"})
    failed = report(tmp_path)["run"]
    assert (failed["state"], failed["message"], failed["exit_code"]) == ("failed", "too few nodes", 14)
    ledger.append("start", body={"config": {"num-server-rounds": 5}, "version": "0.1.0"})
    ledger.close()
    resumed = report(tmp_path)["run"]
    assert (resumed["state"], resumed["restarts"], resumed["rounds"]) == ("running", 1, 5)


def test_a_run_without_rounds_to_come_measures_and_writes_its_model(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.append("start", body={"config": {"num-server-rounds": 1, "eval.data": "held_out.jsonl"}, "run_id": "7"})
    ledger.append("round", round=1, body={"metrics": {}})
    assert report(tmp_path)["run"]["phase"] == "measuring the model"
    write_measured(tmp_path, 3, 12)
    assert report(tmp_path)["run"]["phase"] == "measuring the model, 3/12"
    ledger.append("evaluation", round=1, body={"eval/loss": 4.0, "eval/perplexity": 9.0})
    assert report(tmp_path)["run"]["phase"] == "writing the model"
    ledger.close()


def test_a_run_says_what_it_waits_for(tmp_path):
    def phase():
        return report(tmp_path)["run"]["phase"]

    ledger = Ledger(tmp_path)
    config = defaults("fedkseed") | {"num-server-rounds": 2, "eval.data": "held_out.jsonl", "strategy.min-nodes": 2}
    ledger.append("submitted", body={"config": config})
    assert phase() == "starting" and report(tmp_path)["run"]["rounds"] == 2
    ledger.append("start", body={"config": config, "run_id": "7"})
    assert phase() == "loading the model"
    ledger.append("base", body={"fingerprint": "0"})
    assert phase() == "waiting for nodes: 0 of 2 there"
    for name in ("alice", "bob"):
        ledger.append("joined", node=name, body={"reason": "joined with 10 examples"})
    assert phase() == "asking the nodes"
    ledger.append("asked", round=1, body={"nodes": {"alice": 10, "bob": 10}, "again": False})
    ledger.append("reply", round=1, node="bob", body=reply(1, "bob"))
    assert phase() == "1 of 2 replied"
    write_measured(tmp_path, 3, 12)
    assert phase() == "1 of 2 replied, measuring 3/12"
    ledger.append("evaluation", round=0, body={"eval/loss": 4.0})
    assert phase() == "1 of 2 replied"
    ledger.append("failed", body={"exit_code": 14, "message": "the disk is full"})
    ledger.append("submitted", body={"config": config})
    assert phase() == "starting" and report(tmp_path)["run"]["state"] == "running"
    ledger.close()


def test_the_time_while_a_run_was_stopped_is_no_time_of_its_rounds(tmp_path, monkeypatch):
    now = 1000.0
    monkeypatch.setattr("server_app.ledger.time.time", lambda: now)
    ledger = begin(tmp_path)
    ledger.append("asked", round=1, body={"nodes": dict.fromkeys(NODES, 10), "again": False})
    now = 1010.0
    ledger.append("reply", round=1, node="alice", body=reply(1, "alice"))
    now = 5000.0
    ledger.append("start", body={"config": ledger.last("start").body["config"], "run_id": "8"})
    ledger.append("asked", round=1, body={"nodes": {"bob": 10, "carol": 10}, "again": False})
    now = 5007.0
    for name in ("bob", "carol"):
        ledger.append("reply", round=1, node=name, body=reply(1, name))
    ledger.append("round", round=1, body={"metrics": {}, "files": {}})
    ledger.close()
    shown = report(tmp_path)
    assert shown["run"]["seconds"] == 17.0 and shown["rounds"][0]["seconds"]["waiting"] == 17.0
    assert {turn["node"]: turn["seconds"] for turn in shown["turns"]} == {"alice": 10.0, "bob": 7.0, "carol": 7.0}


def test_turns_name_their_blocks_and_what_is_not_finite_is_nothing(tmp_path):
    finished_run(tmp_path, "fedcybgd", asked=("bob",), block=4, loss=float("nan"))
    shown = report(tmp_path)
    assert [(turn["node"], turn["block"], turn["loss"]) for turn in shown["turns"]] == [("bob", 4, None)] * 3
    json.dumps(shown, allow_nan=False)


def test_odds_of_the_seeds(tmp_path):
    settings = {"fedkseed.seeds": 4}
    ledger = begin(tmp_path, "fedkseed-pro", **settings)
    play(ledger, 1, blob=pro_state(settings, [0.0, 10.0, 10.0, 0.0], [1, 1, 1, 0]))
    ledger.close()
    panel = report(tmp_path)["panel"]
    # Amplitudes 0, 10 and 10; the seed never drawn counts as average. The likeliest are e times the unlikeliest.
    assert panel["note"].startswith("3 of 4 seeds were drawn so far. The likeliest is 2.72 times as likely")
    assert [height for _, height in panel["columns"]] == [1, 1, 2]
    assert sum(float(label) * height for label, height in panel["columns"]) == pytest.approx(4, abs=0.02)


def test_a_view_follows_a_run_row_by_row(tmp_path):
    ledger = begin(tmp_path)
    view = RunView(tmp_path)
    assert view.update() and not view.update()
    for round in (1, 2):
        play(ledger, round)
        assert view.update()
        assert document.report(view) == report(tmp_path)
    ledger.close()


def test_a_view_notices_a_ledger_that_was_cut_back(tmp_path):
    ledger = begin(tmp_path)
    play(ledger, 1)
    view = RunView(tmp_path)
    view.update()
    ledger.close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.execute("DELETE FROM records WHERE seq > 5")
    (tmp_path / "ledger.head").unlink(missing_ok=True)
    ledger = Ledger(tmp_path)
    play(ledger, 1, answering=("alice",))
    ledger.close()
    view.update()
    assert document.report(view) == report(tmp_path)


def test_a_long_run_of_a_large_fleet_stays_a_small_document(tmp_path, monkeypatch):
    monkeypatch.setattr(run_view, "TURNS", 5)
    monkeypatch.setattr(document, "MAX_POINTS", 8)
    monkeypatch.setattr(document, "MAX_CELLS", 9)
    finished_run(tmp_path, rounds=30)
    view = RunView(tmp_path)
    view.update()
    shown = document.report(view)
    assert [one["round"] for one in shown["rounds"]] == [2, 6, 10, 14, 18, 22, 26, 30]
    assert {turn["round"] for turn in shown["turns"]} == {28, 29, 30}
    # Details of old rounds are not kept; their sums are.
    assert sum(bool(one.turns) for one in view.rounds.values()) == 5
    assert (shown["run"]["round"], shown["totals"]["replies"]) == (30, 90)
    assert shown["totals"]["seconds"]["evaluation"] == pytest.approx(45.0)


def test_runs_of_a_folder_the_newest_first(tmp_path):
    for name in ("old", "new"):
        finished_run(tmp_path / name)
    assert [path.name for path in newest_runs(tmp_path)] == ["new", "old"]
    report(tmp_path / "old")
    assert newest_runs(tmp_path)[0].name == "new", "whoever looks at a run does not make it newer"
    assert newest_runs(tmp_path / "old") == [tmp_path / "old"]
    assert newest_runs(tmp_path / "nothing") == []
    with pytest.raises(LedgerError):
        report(tmp_path)
