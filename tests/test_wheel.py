"""The wheel is whole, works where no clone is, and is what the documentation installs."""

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("server_app/", "client_app/", "fedtune_strategies/", "deploy/")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
# What starts containers and services: it is used from a clone.
FROM_A_CLONE = tuple(f"deploy/{name}/" for name in ("compose", "docker", "kubernetes", "systemd"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    subprocess.run(["git", "checkout-index", "--all", f"--prefix={source}/"], cwd=ROOT, check=True)
    subprocess.run([sys.executable, "-c", BUILD, str(out)], cwd=source, check=True, capture_output=True, timeout=200)
    (file,) = out.glob("*.whl")
    return file


def test_the_wheel_holds_every_file_of_the_packages(wheel):
    tracked = subprocess.run(["git", "ls-files", *PACKAGES], cwd=ROOT, check=True, capture_output=True, text=True)
    held = set(zipfile.ZipFile(wheel).namelist())
    assert [
        name for name in tracked.stdout.splitlines() if not name.startswith(FROM_A_CLONE) and name not in held
    ] == []


def test_the_wheel_works_outside_a_clone(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    script = (
        "import deploy.cli, deploy.status.page, sys\n"
        f"assert deploy.cli.__file__.startswith({str(site)!r}), deploy.cli.__file__\n"
        "assert '<script>' in deploy.status.page.render(None)\n"
        "deploy.cli.main()"
    )
    environment = os.environ | {"PYTHONPATH": str(site), "PYTHONSAFEPATH": "1", "FEDTUNE_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", "--measure", "0", "--format", "json"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fedkseed" in {row["method"] for row in json.loads(done.stdout)["methods"]}


def test_the_lines_that_install_name_this_wheel_and_the_tested_torch(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    pages = [ROOT / "README.md", ROOT / "docs" / "guide-device-owner.md"]
    lines = [line for page in pages for line in re.findall(r"^```sh install\n(.*)\n```$", page.read_text(), re.M)]
    assert len(lines) == 3
    for line in lines:
        torch, (name, extras) = re.search(r"torch==(\S+)", line)[1], re.search(r"'\./(\S+)\[(.*)\]'", line).groups()
        assert torch.removesuffix("+cpu") == pinned and name == wheel.name
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
        assert ("+cpu" in torch) == ("whl/cpu" in line) and "--constraint constraints.txt" in line
