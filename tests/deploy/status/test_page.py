import json
from html.parser import HTMLParser

import pytest
from typer.testing import CliRunner

from deploy.cli import app
from deploy.status.page import policy, write_page
from fedtune_strategies.errors import LedgerError
from tests.deploy.status.runs import begin, finished_run, play

VOID = {"meta", "link", "input", "path", "br", "img"}


class Page(HTMLParser):
    """Elements with their attributes, and the text of the data."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.data = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if self.open and self.open[-1][1].get("id") == "data":
            self.data += data


def written(folder, path):
    write_page(folder, path)
    return Page(path.read_text())


def test_the_file_holds_all_that_it_shows_and_loads_nothing(tmp_path):
    finished_run(tmp_path / "runs/first")
    finished_run(tmp_path / "runs/second", "fedcybgd", block=1)
    page = written(tmp_path / "runs", tmp_path / "out/page.html")
    assert {run["run"]["name"] for run in json.loads(page.data)["runs"]} == {"first", "second"}
    for tag, attributes in page.elements:
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:")), f"<{tag} {name}>"
    assert "default-src 'none'" in policy() and "unsafe" not in policy()


def test_names_and_answers_cannot_become_markup(tmp_path):
    ledger = begin(tmp_path / "run")
    hostile = '</script><script>alert(1)</script>@data@ "'
    play(ledger, 1, asked=(hostile,))
    ledger.close()
    page = written(tmp_path / "run", tmp_path / "page.html")
    assert hostile in {node["name"] for node in json.loads(page.data)["runs"][0]["nodes"]}
    assert sum(tag == "script" for tag, _ in page.elements) == 2
    assert not page.open


def test_everything_that_can_be_reached_has_a_name(tmp_path):
    finished_run(tmp_path / "run")
    page = written(tmp_path / "run", tmp_path / "page.html")
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = {"aria-label", "aria-labelledby"}
    for tag, attributes in page.elements:
        assert attributes.get("aria-labelledby", ids[0]) in ids
        if tag == "section" or attributes.get("role") == "region" or (tag == "button" and "aria-label" in attributes):
            assert named & set(attributes), f"<{tag}> has no name"
    html = next(attributes for tag, attributes in page.elements if tag == "html")
    assert html["lang"] == "en"


def test_no_run_is_one_line(tmp_path):
    with pytest.raises(LedgerError, match="no run in"):
        write_page(tmp_path, tmp_path / "page.html")


def test_the_command_writes_one_run_or_all_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    for name in ("first", "second"):
        finished_run(tmp_path / "runs" / name)
    for argument, names in (([str(tmp_path / "runs")], {"first", "second"}), (["first"], {"first"}), ([], {"second"})):
        path = tmp_path / "page.html"
        done = CliRunner().invoke(app, ["status", *argument, "--html", str(path)])
        assert done.exit_code == 0, done.output
        assert {run["run"]["name"] for run in json.loads(Page(path.read_text()).data)["runs"]} == names
