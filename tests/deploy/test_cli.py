import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import version

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from deploy.cli import app
from deploy.commands.configuration import with_run_config
from deploy.common import processes
from deploy.local import demo
from fedtune_strategies.errors import ConfigError, PortError, ResourceError
from fedtune_strategies.run_config import app_defaults, as_toml, defaults, keys


def call(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("command", [(), ("demo",), ("config",), ("version",)])
def test_help_teaches(command):
    code, out, _ = call(*command, "--help")
    assert code == 0 and "Usage" in out and len(out) > 200


def test_config_lists_every_key_with_default_and_help():
    code, out, _ = call("config")
    assert code == 0
    text = " ".join(out.split())
    for key in keys():
        assert f"{key.name} = " in text and " ".join(key.help.split()) in text


def test_config_as_toml_is_what_flower_takes():
    assert call("config", "--toml", "--method", "fedcybgd") == (0, as_toml(defaults("fedcybgd")), "")


def test_config_writes_its_table_and_nothing_else(tmp_path):
    project = tmp_path / "pyproject.toml"
    before = "[tool.a]\nx = 1\n\n[tool.flwr.app.config]\nold = 1\n\n# --- next ---\n\n[tool.b]\ny = 2\n"
    project.write_text(before)
    assert call("config", "--write", str(project))[0] == 0
    once = project.read_text()
    parsed = tomllib.loads(once)["tool"]
    assert parsed["a"] == {"x": 1} and parsed["b"] == {"y": 2} and "# --- next ---" in once
    assert flat(parsed["flwr"]["app"]["config"]) == app_defaults()
    assert with_run_config(once, as_toml(app_defaults())) == once


def flat(table, prefix=""):
    pairs = {}
    for key, value in table.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return pairs


def test_a_project_without_the_table_is_refused():
    with pytest.raises(ConfigError, match="no line"):
        with_run_config("[project]\n", "")


def test_an_error_is_one_line_with_its_own_exit_code(monkeypatch):
    def fail(**_):
        raise PortError("port 1 is taken: choose another")

    monkeypatch.setattr(demo, "run_demo", fail)
    assert call("demo") == (PortError.exit_code, "", "fedtune: port 1 is taken: choose another\n")
    assert call("config", "no-such-key") == (
        ConfigError.exit_code, "", "fedtune: no key contains 'no-such-key': `fedtune config` shows all of them.\n"
    )  # fmt: skip


def test_ctrl_c_exits_with_130(monkeypatch):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run_demo", interrupt)
    assert call("demo") == (130, "", "fedtune: stopped\n")


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    code, _, error = call("demo", "--out", str(tmp_path / "file" / "out"))
    assert code == ResourceError.exit_code and str(tmp_path / "file") in error and error.count("\n") == 1


def test_two_demos_do_not_share_a_folder(tmp_path):
    with FileLock(tmp_path / ".lock"):
        code, _, error = call("demo", "--out", str(tmp_path))
    assert code == ResourceError.exit_code and "another demo is writing" in error


def test_an_unknown_method_is_refused_before_anything_starts(tmp_path):
    code, _, error = call("demo", "--methods", "fedkseed,magic", "--out", str(tmp_path / "out"))
    assert code == ConfigError.exit_code and "unknown method 'magic': choose from gradient, fedkseed" in error
    assert not (tmp_path / "out").exists()


def test_settings_are_read_as_toml_and_checked_before_anything_starts(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(demo, "run_demo", lambda **given: seen.update(given["changes"]))
    assert (
        call("demo", "--set", "train.lr=1e-4", "--set", "model.dtype=bfloat16", "--set", "num-server-rounds = 3")[0]
        == 0
    )
    assert seen == {"train.lr": 1e-4, "model.dtype": "bfloat16", "num-server-rounds": 3}
    monkeypatch.undo()
    for setting, line in [
        ("train.lr=-1", "'train.lr'"),
        ("no-key=1", "unknown key"),
        ("oops", "key=value"),
        ("run.dir=/", "--out"),
    ]:
        code, _, error = call("demo", "--out", str(tmp_path / "out"), "--set", setting)
        assert code == ConfigError.exit_code and line in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


COMPLETE = """eval "$(fedtune --show-completion)"
COMP_WORDS=(fedtune %s) COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_fedtune_completion fedtune; echo "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(("typed", "offered"), [("nod", "nodes"), ("nodes approve --form", "--format")])
def test_bash_completes_what_is_typed(typed, offered):
    environment = os.environ | {"PATH": processes.environment_path()}
    command = ["bash", "-c", COMPLETE % typed]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == [offered] and not done.stderr


def test_the_installed_command_works():
    command = [sys.executable, "-c", "from deploy.cli import main; main()", "version"]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert re.search(r"^fedtune +\d", out, re.M) and re.search(rf"^flwr +{version('flwr')}$", out, re.M)
