"""The test kit passes sound methods and catches broken ones; the example package is one of the sound."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deploy.new_method import write_method
from deploy.testing import (
    Fault,
    Federation,
    assert_dropout_safe,
    assert_order_independent,
    assert_resume_exact,
    assert_same_over_the_network,
)
from fedtune_strategies.errors import ConfigError, ResourceError
from fedtune_strategies.installed import installed_methods, points
from fedtune_strategies.method import Method
from fedtune_strategies.strategy import State

EXAMPLE = Path(__file__).parents[2] / "examples" / "signvote"


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Install a module's METHOD the way pip leaves it: an entry point beside the module."""

    def put(name, module, folder):
        info = tmp_path / "site" / f"{name}-0.1.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        (info / "entry_points.txt").write_text(f"[fedtune.methods]\n{name} = {module}:METHOD\n")
        monkeypatch.syspath_prepend(str(tmp_path / "site"))
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), str(folder)]))
        monkeypatch.delitem(sys.modules, module, raising=False)
        points.cache_clear()

    yield put
    monkeypatch.undo()
    points.cache_clear()


@pytest.fixture
def signvote(install, tmp_path):
    install("signvote", "signvote", EXAMPLE)
    import signvote

    settings = {"method.name": "signvote", "num-server-rounds": 2, "round.deadline": 0.2}
    return signvote, Federation(tmp_path / "federation", settings)


def test_the_example_learns(install, tmp_path):
    install("signvote", "signvote", EXAMPLE)
    settings = {"method.name": "signvote", "signvote.lr": 1e-2, "num-server-rounds": 16, "train.batch-size": 8}
    ledger = Federation(tmp_path / "federation", settings).run("run")
    losses = [record.body["loss"] for record in ledger.records("reply")]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_the_example_stands_what_a_method_must(signvote):
    _, federation = signvote
    assert_resume_exact(Federation(federation.folder / "two", federation.settings | {"strategy.min-nodes": 2}, nodes=2))
    assert_dropout_safe(federation)
    assert_order_independent(federation)


@pytest.mark.network
@pytest.mark.timeout(900)
def test_the_example_and_its_own_keys_work_on_a_real_federation(signvote):
    _, federation = signvote
    settings = federation.settings | {"signvote.lr": 1e-2, "strategy.min-nodes": 2}
    assert_same_over_the_network(Federation(federation.folder / "two", settings, nodes=2))


def test_a_new_method_stands_its_own_tests(install, tmp_path):
    write_method("fresh", tmp_path / "fresh")
    install("fresh", "fresh", tmp_path / "fresh")
    # Its two long ones are those that the example stands above.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not network and not killed", "."]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path / "fresh", env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout


def test_a_new_method_takes_no_name_or_folder_that_is_taken(tmp_path):
    for name in ("Fresh", "fresh-one", "import", "fedavg"):
        with pytest.raises(ConfigError):
            write_method(name, tmp_path / "fresh")
    with pytest.raises(ResourceError, match="is there already"):
        write_method("fresh", tmp_path)


@pytest.mark.parametrize("method", ["fedkseed-pro", "fedcybgd"])
def test_fedtunes_own_methods_stand_it_too(method, tmp_path):
    federation = Federation(tmp_path, {"method.name": method})
    assert_dropout_safe(federation)
    assert_order_independent(federation)


def test_a_strategy_that_forgets_its_state_is_caught(signvote, monkeypatch):
    module, federation = signvote
    federation = Federation(federation.folder / "two", federation.settings | {"strategy.min-nodes": 2}, nodes=2)
    monkeypatch.setattr(module.SignVote, "state", lambda self: State())
    with pytest.raises(AssertionError, match="stopped after record"):
        assert_resume_exact(federation)


def test_a_strategy_that_goes_by_the_first_reply_is_caught(signvote, monkeypatch):
    module, federation = signvote
    aggregate = module.SignVote.aggregate_train
    monkeypatch.setattr(
        module.SignVote, "aggregate_train", lambda self, round, replies: aggregate(self, round, list(replies)[:1])
    )
    with pytest.raises(AssertionError, match="another order"):
        assert_order_independent(federation)


def test_a_strategy_that_cannot_do_without_a_node_is_caught(signvote, monkeypatch):
    module, federation = signvote
    aggregate = module.SignVote.aggregate_train

    def insist(self, round, replies):
        replies = list(replies)
        arrays, metrics = aggregate(self, round, replies)
        if len(replies) < 3:
            self.current = {name: value * torch.nan for name, value in self.current.items()}
        return arrays, metrics

    monkeypatch.setattr(module.SignVote, "aggregate_train", insist)
    with pytest.raises(AssertionError, match="not finite"):
        assert_dropout_safe(federation)


def test_a_lost_reply_is_waited_for_no_longer_than_the_deadline(tmp_path):
    ledger = Federation(tmp_path, {"num-server-rounds": 1}).run("run", [Fault(1, 1, "lost")])
    assert {record.node for record in ledger.records("reply")} == {"node-0", "node-2"}


def test_a_method_that_is_not_installed_is_named(tmp_path):
    assert "signvote" not in installed_methods()
    with pytest.raises(ConfigError, match="'signvote'"):
        Federation(tmp_path, {"method.name": "signvote"}).run("run")


def test_keys_of_the_method_are_checked_by_it(signvote, tmp_path):
    module, _ = signvote
    assert isinstance(module.METHOD, Method)
    for keys, words in (({"signvote.lr": -1.0}, "above 0"), ({"signvote.rate": 1.0}, "unknown key 'signvote.rate'")):
        with pytest.raises(ConfigError, match=words):
            Federation(tmp_path / words[:3], {"method.name": "signvote", **keys}).run("run")
