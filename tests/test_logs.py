import io
import json
import logging
import sys

import pytest

from fedtune_strategies.errors import ConfigError
from fedtune_strategies.logs import about, json_handler, script
from tests.federations import run


@pytest.fixture
def lines(monkeypatch):
    """Everything that FedTune logs, as JSON."""
    monkeypatch.setenv("FEDTUNE_LOG", "json")
    stream = io.StringIO()
    handler = json_handler(stream)
    logger = logging.getLogger("fedtune")
    before = logger.level
    logger.setLevel(logging.INFO)  # which also forgets what was found disabled before
    logger.addHandler(handler)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_a_script_says_what_happens_and_ends_with_the_line_and_the_code_of_an_error(monkeypatch, capsys):
    monkeypatch.delenv("FEDTUNE_LOG", raising=False)
    log, before = logging.getLogger("fedtune"), logging.getLogger("fedtune").handlers[:]
    with pytest.raises(SystemExit) as ended, script():
        log.info("round 1: 2 replies")
        raise ConfigError("train.lr is wrong")
    assert ended.value.code == ConfigError.exit_code and log.handlers == before
    assert capsys.readouterr().err == "round 1: 2 replies\nfedtune: train.lr is wrong\n"


def test_only_where_it_is_asked_for(monkeypatch):
    monkeypatch.delenv("FEDTUNE_LOG", raising=False)
    assert json_handler(sys.stderr) is None


def test_a_line_is_one_object_with_its_facts(lines):
    log = logging.getLogger("fedtune")
    with about(run="first", round=3):
        with about(node="alice") as facts:
            facts["round"] = 4
            log.warning("two\nlines of %s", "text")
        log.info("after", extra={"node": "bob"})
    try:
        raise ValueError("oh")
    except ValueError:
        log.exception("outside")
    first, second, third = lines()
    assert {key: first[key] for key in ("run", "round", "node", "level")} == {
        "run": "first", "round": 4, "node": "alice", "level": "warning",
    }  # fmt: skip
    assert first["message"] == "two\nlines of text" and first["time"].endswith("Z")
    assert (second["round"], second["node"]) == (3, "bob")
    assert "run" not in third and "ValueError: oh" in third["trace"]


def test_lines_of_a_run_name_run_round_and_node(lines, settings, data_files):
    run(settings, data_files)
    found = lines()
    assert {line["node"] for line in found if " joined with " in line["message"]} == set(data_files)
    rounds = [line for line in found if "held-out loss" in line["message"]]
    assert [line.get("round", 0) for line in rounds] == [0, 1, 2, 3]
    assert {line["run"] for line in rounds} == {"run"}
