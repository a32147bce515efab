"""The rules of docs/architecture.md: who imports whom, and who may name a method."""

import ast
import re
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from fedtune_strategies.installed import own_methods

ROOT = Path(__file__).parents[1]
PACKAGES = ("client_app", "server_app", "fedtune_strategies", "deploy")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
NAMES = [path.relative_to(ROOT).as_posix() for path in MODULES]
MAY_IMPORT_FLOWER = re.compile(
    r"fedtune_strategies/(protocol/(records|flower)|admission|fleet|stream/grid|testing|strategy|aggregators|fed\w+/.*)\.py|"
    r"client_app/app\.py|server_app/(app|run|rounds|replay)\.py|deploy/.*"
)
MATHEMATICS = ("seed_space", "seed_gradient", "zeroth_order", "blocks", "language")
SIDES = ("operator", "owner", "local")


@cache
def tree(name):
    return ast.parse((ROOT / name).read_text())


@cache
def imported(name):
    """Modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


KNOWN = {name.removesuffix("/__init__.py").removesuffix(".py").replace("/", "."): name for name in NAMES}


def at_import(name):
    """Modules that are imported when a module is: not those within functions, or for type checkers alone."""
    found, statements = set(), list(tree(name).body)
    while statements:
        node = statements.pop()
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {one if one in KNOWN else node.module for one in inner}
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.dump(node.test):
            statements += node.body + node.orelse
        elif isinstance(node, ast.Try | ast.With):
            statements += node.body
    return found


@pytest.mark.parametrize("name", NAMES)
def test_imports_keep_to_the_rules(name):
    packages = {module.partition(".")[0] for module in imported(name)}
    if name.startswith("fedtune_strategies/"):
        assert not packages & {"client_app", "server_app", "deploy"}
    if name.startswith("client_app/"):
        assert not packages & {"server_app", "deploy"}
    if name.startswith("server_app/"):
        assert not packages & {"client_app", "deploy"}
    if not MAY_IMPORT_FLOWER.fullmatch(name):
        assert "flwr" not in packages


@pytest.mark.parametrize("room", [*SIDES, "common"])
def test_no_side_of_deploy_reaches_into_another(room):
    for path in sorted((ROOT / "deploy" / room).glob("*.py")):
        modules = imported(path.relative_to(ROOT).as_posix())
        rooms = {module.split(".")[1] for module in modules if module.startswith("deploy.")}
        assert not rooms & {*SIDES} - {room}
        assert room != "common" or rooms <= {"common"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.split("/")[1] in MATHEMATICS])
def test_mathematics_takes_tensors_and_numbers(name):
    assert not any(module.startswith("fedtune_strategies.config") for module in imported(name))
    assert not any(re.match(r"fedtune_strategies\.fed\w+", module) for module in imported(name))


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("fedtune_strategies/config/")])
def test_a_configuration_is_declared_without_any_method(name):
    assert not any(module.startswith("fedtune_strategies.method") for module in imported(name))


def folder(name):
    """The method folder of a module, empty for none."""
    found = re.match(r"fedtune_strategies/(fed\w+)/", name)
    return found[1] if found else ""


@pytest.mark.parametrize("name", NAMES)
def test_no_module_outside_a_method_s_folder_imports_it(name):
    methods = {match[1] for module in imported(name) if (match := re.match(r"fedtune_strategies\.(fed\w+)", module))}
    assert methods <= {folder(name)}


# What else these words mean: Flower's strategy, the demo's list, the run that is made when no method is named.
OTHER_MEANINGS = {
    "fedtune_strategies/config/sections.py": {"fedavg", "fedkseed"},
    "deploy/local/demo.py": {"fedkseed", "fedkseed-pro", "fedcybgd"},
    "deploy/commands/demo.py": {"fedkseed", "fedkseed-pro", "fedcybgd"},
}


@pytest.mark.parametrize("name", [name for name in NAMES if not folder(name)])
def test_no_method_is_named_outside_its_folder(name):
    words = {
        word
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for word in re.findall(r"[\w-]+", node.value)
        if not re.search(r"\s", node.value.strip())  # prose may say FedKSeed; a value or a key may not
    }
    assert words & {*own_methods()} <= OTHER_MEANINGS.get(name, set())


def test_no_import_goes_round_in_a_circle():
    graph = {module: {one for one in at_import(name) if one in KNOWN} - {module} for module, name in KNOWN.items()}
    while free := [module for module, needs in graph.items() if not needs]:
        graph = {module: needs - {*free} for module, needs in graph.items() if module not in free}
    assert not graph, f"these import each other: {sorted(graph)}"


def test_every_package_that_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = {re.split(r"[^\w.-]", line)[0].replace("-", "_").lower() for line in project["dependencies"] + extras}
    roots = {module.partition(".")[0].lower() for name in NAMES for module in imported(name)}
    assert roots - {name.lower() for name in sys.stdlib_module_names} - {*PACKAGES} - {"grpc"} <= declared
    assert "grpcio" in declared


def test_no_private_flower_module_on_the_nodes_path():
    for name in ("client_app/app.py", "fedtune_strategies/protocol/records.py"):
        assert {module for module in imported(name) if re.fullmatch(r"flwr(\.[a-z_]+)*", module)} <= {
            "flwr.app", "flwr.clientapp"
        }  # fmt: skip
