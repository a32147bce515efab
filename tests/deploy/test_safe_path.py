"""A user's files with the names of our packages, in the folder where a command is typed, are never run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from deploy.common.flower_cli import flower_environment

ROOT = Path(__file__).parents[2]
FEDTUNE = str(Path(sys.executable).parent / "fedtune")


@pytest.fixture
def hostile(tmp_path):
    for name in ("deploy", "client_app", "server_app", "fedtune_strategies", "flwr", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file ran')")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        [FEDTUNE, "--help"],
        [FEDTUNE, "config", "rounds"],
        [sys.executable, "-P", "-m", "deploy.common.watchdog", "no-such-token"],
    ],
)
def test_a_command_runs_what_is_installed(hostile, command):
    done = subprocess.run(command, cwd=hostile, input=b"", capture_output=True, timeout=60, check=False)
    assert done.returncode == 0 and b"wrong file" not in done.stdout + done.stderr


def test_flowers_programs_find_the_installed_apps(hostile, tmp_path):
    code = "import client_app.app, server_app.app; print(client_app.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=hostile, env=flower_environment(tmp_path), capture_output=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0 and str(hostile).encode() not in done.stdout, done.stderr[-300:]


def test_every_module_that_is_started_is_started_so():
    for package in ("client_app", "server_app", "deploy"):
        for path in (ROOT / package).rglob("*.py"):
            assert not re.search(r'executable, "-m"', path.read_text()), path


def test_proxy_exceptions_of_either_spelling_are_kept(tmp_path, monkeypatch):
    monkeypatch.setitem(os.environ, "no_proxy", "intranet.example")
    monkeypatch.delitem(os.environ, "NO_PROXY", raising=False)
    environment = flower_environment(tmp_path)
    assert environment["no_proxy"] == environment["NO_PROXY"] == "intranet.example,localhost,127.0.0.1,::1"
