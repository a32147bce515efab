"""The named configuration files of the papers' protocols."""

import tomllib
from pathlib import Path

import pytest

from fedtune_strategies.installed import own_methods
from fedtune_strategies.run_config import parse
from tests.test_config import flatten

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(CONFIGS.rglob("*.toml"))
FULL = [path for path in FILES if path.parent.name != "small"]


def load(path):
    return parse(flatten(tomllib.loads(path.read_text())))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_is_a_run_configuration(path):
    config = load(path)
    assert config.strategy.min_nodes > 1 and config.train.batch_size in (1, 2, 4)


@pytest.mark.parametrize("path", FULL, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_file_bears_the_name_of_its_method_and_the_published_protocol(path):
    config = load(path)
    assert config.method.name == path.stem and path.stem in own_methods()
    assert config.eval.data and config.eval.answers and config.train.batch_size == 1
    if path.stem == "fedcybgd":
        assert config.train.local_steps == 0
        return
    rounds, nodes = {"natural-instructions": (40, 738), "dolly": (60, 200)}[path.parent.name]
    assert (config.num_server_rounds, config.strategy.min_nodes, config.strategy.fraction_train) == (
        rounds,
        nodes,
        0.05,
    )
    if path.stem.startswith("fedkseed"):
        settings = config.fedkseed
        assert (config.train.local_steps, settings.eps, config.train.lr) == (200, 5e-4, 3e-7)
        assert settings.seeds == (1024 if path.stem == "fedkseed-pro" else 4096)
    else:
        assert config.train.local_steps == 200


def test_both_protocols_have_every_published_method():
    for protocol in ("natural-instructions", "dolly"):
        assert {"fedkseed", "fedkseed-pro", "fedzo", "fedit", "fedavg"} <= {
            p.stem for p in (CONFIGS / protocol).iterdir()
        }
