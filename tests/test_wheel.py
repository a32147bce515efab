"""The wheel is whole, works where no clone is, and is what the documentation installs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("server_app/", "client_app/", "fedtune_strategies/", "deploy/")
BUILD = "import sys; from setuptools import build_meta; print(build_meta.build_wheel(sys.argv[1]))"
INSTALL = {
    page: re.findall(r"^```sh install\n(.*)\n```$", (ROOT / page).read_text(), re.M)
    for page in ("README.md", "docs/guide-device-owner.md")
}
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


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """All that is installed here but FedTune: so pip finds in a fresh environment what its lines would fetch."""
    folder = tmp_path_factory.mktemp("shared")
    for site in (Path(one) for one in sys.path if one.endswith("site-packages")):
        for file in site.iterdir():
            if "fedtune" not in file.name and not file.name.endswith(".pth") and not (folder / file.name).exists():
                (folder / file.name).symlink_to(file)
    return folder


def test_the_lines_that_install_work_in_fresh_environments_outside_a_clone(wheel, shared, tmp_path):
    shutil.copy(wheel, tmp_path)
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    settings = {"FEDTUNE_HOME": str(tmp_path / "home"), "PIP_NO_COMPILE": "1", "PYTHONPATH": ""}

    def done(*command):
        ended = subprocess.run(
            command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, timeout=300, check=False
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    for number, line in enumerate(INSTALL["README.md"]):
        environment = tmp_path / f"environment-{number}"
        done(sys.executable, "-m", "venv", "--without-pip", environment)
        (site,) = environment.glob("lib/python*/site-packages")
        (site / "shared.pth").write_text(str(shared))
        done(sys.executable, "-m", "pip", "--python", environment / "bin" / "python", *shlex.split(line)[1:])
        said = done(environment / "bin" / "fedtune", "--version")
        assert (
            said.split() == ["fedtune", wheel.name.split("-")[1]]
            and (site / "deploy" / "status" / "page.html").is_file()
        )
    planned = json.loads(done(environment / "bin" / "fedtune", "plan", "--measure", "0", "--format", "json"))
    assert "fedkseed" in {row["method"] for row in planned["methods"]}


def test_the_lines_that_install_name_this_wheel_and_the_tested_torch(wheel):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert set(INSTALL["docs/guide-device-owner.md"]) < set(INSTALL["README.md"])
    for line in INSTALL["README.md"]:
        torch, (name, extras) = re.search(r"torch==(\S+)", line)[1], re.search(r"'\./(\S+)\[(.*)\]'", line).groups()
        assert torch.removesuffix("+cpu") == pinned and name == wheel.name
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
        assert ("+cpu" in torch) == ("whl/cpu" in line) and "--constraint constraints.txt" in line


def test_a_clone_installs_the_same_torch_as_the_readme():
    made = set(re.findall(r"^TORCH := (.*)$", (ROOT / "Makefile").read_text(), re.M))
    assert made == {re.search(r"constraints.txt (.*torch==\S+) '", line)[1] for line in INSTALL["README.md"]}
