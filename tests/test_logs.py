import io
import json
import logging
import sys

import pytest

from fedtune_strategies.logs import about, json_handler
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
