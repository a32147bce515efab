"""The rules of docs/architecture.md about who imports whom."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("client_app", "server_app", "fedtune_strategies", "deploy")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
MAY_IMPORT_FLOWER = (
    "fedtune_strategies/protocol/records.py",
    "fedtune_strategies/protocol/flower.py",
    "fedtune_strategies/admission.py",
    "fedtune_strategies/fleet.py",
    "fedtune_strategies/testing.py",
    "fedtune_strategies/strategies/",
    "client_app/app.py",
    "server_app/app.py",
    "server_app/run.py",
    "server_app/rounds.py",
    "server_app/replay.py",
    "deploy/",
)


def imported(path):
    """Top-level names of what a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative import"
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_keep_to_the_rules(path):
    name, names = path.relative_to(ROOT).as_posix(), imported(path)
    if name.startswith("fedtune_strategies/"):
        assert not names & {"client_app", "server_app", "deploy"}
    if name.startswith("client_app/"):
        assert not names & {"server_app", "deploy"}
    if name.startswith("server_app/"):
        assert not names & {"client_app", "deploy"}
    if not name.startswith(MAY_IMPORT_FLOWER):
        assert "flwr" not in names


SIDES = ("operator", "owner", "local")


@pytest.mark.parametrize("room", [*SIDES, "plumbing"])
def test_no_side_of_deploy_reaches_into_another(room):
    for path in sorted((ROOT / "deploy" / room).glob("*.py")):
        modules = {node.module for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)}
        rooms = {module.split(".")[1] for module in modules if module and module.startswith("deploy.")}
        assert not rooms & {*SIDES} - {room}
        assert room != "plumbing" or rooms <= {"plumbing"}


def test_no_private_flower_module_on_the_nodes_path():
    for name in ("client_app/app.py", "fedtune_strategies/protocol/records.py"):
        modules = {
            node.module
            for node in ast.walk(ast.parse((ROOT / name).read_text()))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("flwr")
        }
        assert modules <= {"flwr.app", "flwr.clientapp"}
