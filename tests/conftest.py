"""Settings and a tiny federation that several rooms test with."""

import json
import os

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

import hypothesis
import pytest
import torch

from fedtune_strategies.installed import own_methods
from fedtune_strategies.method import register_messages
from fedtune_strategies.run_config import defaults
from tests.models import CONFIGS, make_model, make_tokenizer

torch.set_num_threads(1)
# A busy machine is slow now and then: that is no failure.
hypothesis.settings.register_profile("patient", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("patient")
quick = hypothesis.settings(max_examples=30, deadline=None)

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run"]


def write_rows(path, count, shift=0):
    """Prompt/completion rows over the tiny tokenizer's words."""
    rows = [
        {
            "prompt": " ".join(WORDS[(i + shift + j) % len(WORDS)] for j in range(4)) + " ",
            "completion": WORDS[(i * 3 + shift) % len(WORDS)],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LONGEST = ("test_faults.py", "test_machines.py")  # minutes each


def pytest_collection_modifyitems(items):
    """Begin with the longest: a worker that came to them last would leave the other without work."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def messages():
    """Make all methods' messages known, as server and nodes do for the method of their run."""
    for name in own_methods():
        register_messages(name)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folder of a random Llama of a few thousand parameters with its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    make_model(CONFIGS["llama"]).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


OWN = {
    "fedkseed": {"fedkseed.seeds": 64, "train.local-steps": 6, "train.lr": 3e-4},
    "fedkseed-pro": {"fedkseed.seeds": 64, "train.local-steps": 6, "train.lr": 3e-4},
    # Exact changes can be compared.
    **{key: {"train.local-steps": 3, "train.upload": "float32"} for key in ("fedcybgd", "fedavg", "fedit")},
}


class Settings(dict):
    """A run config whose method can be exchanged: ``settings | {"method.name": ...}`` brings its test keys."""

    def __or__(self, changes):
        name = changes.get("method.name", self["method.name"])
        kept = dict(self)
        if name != self["method.name"]:
            own = {key for keys in OWN.values() for key in keys} | {"train.local-steps"}
            kept = {k: v for k, v in self.items() if k in defaults(name) and k not in own}
            kept |= OWN.get(name, {"train.local-steps": 3})
        return Settings({**kept, **changes})

    __ior__ = __or__


@pytest.fixture
def settings(tiny_llama, tmp_path):
    """A run config for a federation of three nodes, and their data files."""
    held_out = write_rows(tmp_path / "held_out.jsonl", 12, shift=5)
    shared = {
        "method.name": "fedkseed",
        "model.name": str(tiny_llama),
        "train.seq-length": 32,
        "train.batch-size": 2,
        "num-server-rounds": 3,
        "strategy.min-nodes": 3,
        "eval.data": str(held_out),
        "eval.answers": 2,
        "eval.max-new-tokens": 4,
        "run.dir": str(tmp_path / "run"),
    }
    return Settings(shared | OWN["fedkseed"])


@pytest.fixture
def data_files(tmp_path):
    """Data file of each of three nodes, by name."""
    return {f"node-{i}": write_rows(tmp_path / f"node_{i}.jsonl", 10 + i, shift=i) for i in range(3)}
