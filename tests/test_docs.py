"""What the documentation says, done."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

from deploy.cli import app
from fedtune_strategies.errors import FedTuneError
from fedtune_strategies.run_config import app_defaults
from fedtune_strategies.tiny.tasks import write_federation

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "LOG.md"], ids=lambda page: page.name)
def test_configuration_keys_in_backticks_exist(page):
    known = set(app_defaults())
    groups = {key.partition(".")[0] for key in known if "." in key}
    for key in re.findall(r"`([a-z]+\.[a-z-]+)(?: = [^`]*)?`", page.read_text()):
        if key.partition(".")[0] in groups - {"model", "run"}:
            assert key in known, f"{page.name}: {key}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "LOG.md"], ids=lambda page: page.name)
def test_commands_and_their_options_exist(page):
    text = re.sub(r"\\\n\s*", "", page.read_text())
    blocks = "\n".join(re.findall(r"^```\w*(?: \w+)?\n(.*?)^```$", text, re.M | re.S))
    lines = re.findall(r"^fedtune .*", blocks, re.M) + re.findall(r"`(fedtune [^`\n]+)`", text)
    for line in lines:
        command, words = typer.main.get_command(app), shlex.split(line.partition(" && ")[0], comments=True)[1:]
        while isinstance(command, click.Group) and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        known = {name for one in command.params for name in one.opts} | {"--help", "-h"}
        if not isinstance(command, click.Group) or command.name in ("nodes", "ledger"):
            assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, f"{page.name}: {line}"
        else:
            assert not words or words[0].startswith("-") or words[0].isupper(), f"{page.name}: {line}"


GUIDES = ("README.md", "docs/guide-operator.md", "docs/guide-device-owner.md", "docs/integrator.md")
# Run by deploy/local/test_demo and deploy/test_testing; the lines that install, by test_wheel.
ELSEWHERE = {"git clone", "make demo", "pip install", "pytest mine", "fedtune new"}


def test_every_command_of_readme_and_guides_is_run_by_a_test():
    """Blocks of kind operator, owner and terminal are run by deploy/test_machines; the README's have other values."""
    tried, shown = {}, []
    for page in GUIDES:
        text = re.sub(r"\\\n\s*", "", (ROOT / page).read_text())
        for kind, block in re.findall(r"^```(?:sh)? ?(\w*)\n(.*?)^```$", text, re.M | re.S):
            for line in re.split(r"\n| && ", block):
                words = shlex.split(line, comments=True) if "─" not in block else []
                if len(words) < 2 or words[0] == "cd":
                    continue
                name, options = " ".join(words[:2]), {word for word in words if word.startswith("--")}
                shown.append((name, options))
                if kind in ("operator", "owner", "terminal"):
                    tried.setdefault(name, set()).update(options)
    assert len(tried) == 5 and len(shown) > 12
    assert [name for name, options in shown if name not in ELSEWHERE and not options <= tried.get(name, set())] == []


@pytest.mark.slow
def test_the_federation_in_one_process_runs_as_shown(tmp_path, monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "integrator.md").read_text(), re.DOTALL)
    (snippet,) = [block for block in blocks if "execute(" in block]
    write_federation(tmp_path, 4)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "integrator.md", "exec"), {})
    assert (tmp_path / "out/trial/model/model.safetensors").is_file()


def test_every_exit_code_has_its_line():
    page = (ROOT / "docs" / "exit-codes.md").read_text()
    told = {int(code): name for code, name in re.findall(r"^\| (\d+) \| `(\w+)`", page, re.M)}
    assert told == {error.exit_code: error.__name__ for error in [FedTuneError, *FedTuneError.__subclasses__()]}


def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "guide-operator" / "index.html").exists()
