"""A test kit for tuning methods: a federation in one process, faults on demand, and what every method must stand.

    def test_my_method_survives(tmp_path):
        federation = Federation(tmp_path, {"method.name": "mine"})
        assert_resume_exact(federation)
        assert_dropout_safe(federation)
        assert_order_independent(federation)

Nodes, messages, ledger and export are those of a real run; only the network is missing, and the model is a random one
of a few thousand parameters, so that a whole run takes a fraction of a second.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import safetensors.torch
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from client_app.node import Node
from fedtune_strategies.config import Scalar
from fedtune_strategies.language.model_files import model_folder
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.run_config import defaults
from fedtune_strategies.testing import Handler, InMemoryGrid, Lost
from fedtune_strategies.tiny.tasks import node_rows
from server_app.ledger import Ledger, Record
from server_app.run import execute

_QUICK: dict[str, Scalar] = {
    "num-server-rounds": 3,
    "train.seq-length": 32,
    "train.batch-size": 2,
    "train.local-steps": 3,
    "round.deadline": 0.5,
    "round.node-wait": 5.0,
}


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes
    ----------
    node : int
        Number of the node, from 0.
    round : int
        The round whose tasks it concerns.
    kind : {"error", "lost", "restart"}
        The node's app crashes; its reply never arrives; its worker is new and holds the base model alone.
    """

    node: int
    round: int
    kind: Literal["error", "lost", "restart"]


class Federation:
    """A small federation in one process.

    Parameters
    ----------
    folder : Path
        Where model, data and runs are kept; a temporary one.
    settings : mapping of str to str, int, float or bool
        Run configuration beside the kit's own: ``method.name`` above all.
    nodes : int
        How many nodes there are; each has its own data.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Scalar], nodes: int = 3) -> None:
        self.folder = folder
        self.nodes = nodes
        self._running: dict[str, list[Handler]] = {}
        model = _write_model(folder / "model")
        known = defaults(str(settings.get("method.name", "")))
        quick = {key: value for key, value in _QUICK.items() if key in known}
        self.settings = quick | {"model.name": str(model), "strategy.min-nodes": nodes} | dict(settings)
        self.data = {f"node-{number}": folder / f"node_{number}.jsonl" for number in range(nodes)}
        for number, path in enumerate(self.data.values()):
            rows = node_rows(number, nodes, train_per_task=8, seed=0)
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def run(self, name: str, faults: Sequence[Fault] = (), *, reverse: bool = False, stop_after: int = 0) -> Ledger:
        """Run the federation to its end, or continue a run that was stopped.

        Parameters
        ----------
        name : str
            Name of the run: its folder.
        faults : sequence of Fault
            What goes wrong.
        reverse : bool
            Let the nodes be known, asked and heard in the opposite order.
        stop_after : int
            Stop the server as by kill -9 after so many records of the ledger; 0 for never.

        Returns
        -------
        Ledger
            The run's ledger, open for reading.

        Raises
        ------
        FedTuneError
            The run failed.
        """
        settings = self.settings | {"run.dir": str(self.folder / name)}
        if name not in self._running:  # nodes outlive a server that is stopped
            self._running[name] = [self._handler(settings, number, faults) for number in range(self.nodes)]
        numbered = list(enumerate(self._running[name], start=1))
        with killed_after(stop_after):
            grid = InMemoryGrid(dict(reversed(numbered) if reverse else numbered), newest_first=reverse)
            execute(grid, settings, run_id=1)
        return Ledger.read(self.folder / name)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        """Return the weights of the model that a finished run exported."""
        return safetensors.torch.load_file(self.folder / name / "model" / "model.safetensors")

    def _handler(self, settings: dict[str, Scalar], number: int, faults: Sequence[Fault]) -> Handler:
        def start() -> Node:
            name = f"node-{number}"
            return Node(settings, {"name": name, "data": str(self.data[name])}, number)

        node = start()

        def handle(kind: str, payload: bytes) -> tuple[str, bytes]:
            nonlocal node
            round = getattr(protocol.decode(kind, payload), "round", 0)
            kinds = {fault.kind for fault in faults if (fault.node, fault.round) == (number, round)}
            if "error" in kinds:
                raise RuntimeError("a fault of the test")
            if "lost" in kinds:
                raise Lost
            if "restart" in kinds:
                node = start()
            return node.handle(kind, payload)

        return handle


def assert_resume_exact(federation: Federation) -> None:
    """Stop the server after every record of the ledger in turn; each resumed run must end in the same bits."""
    records = sum(1 for _ in federation.run("undisturbed").records())
    for last in range(2, records):
        name = f"stopped-{last}"
        try:
            federation.run(name, stop_after=last)
        except Killed:
            federation.run(name)
        _assert_same(federation, "undisturbed", name, f"the server was stopped after record {last} and resumed")


def assert_dropout_safe(federation: Federation) -> None:
    """Lose a node in every round, each time another way; the run must end with a usable model of all its rounds."""
    rounds = int(federation.settings["num-server-rounds"])
    kinds: Iterator[Literal["error", "lost"]] = itertools.cycle(("error", "lost"))
    faults = [Fault(round % federation.nodes, round, next(kinds)) for round in range(1, rounds + 1)]
    ledger = federation.run("dropouts", faults)
    done = [record.round for record in ledger.records("round")]
    assert done == list(range(1, rounds + 1)), f"rounds {done} were committed, not 1 to {rounds}"
    broken = [name for name, value in federation.weights("dropouts").items() if not value.isfinite().all()]
    assert not broken, f"weights that are not finite after dropouts: {broken}"


def assert_order_independent(federation: Federation) -> None:
    """Reverse the order of nodes and replies, and restart a node in every round: the bits must stay the same."""
    federation.run("in-order")
    federation.run("reversed", reverse=True)
    _assert_same(federation, "in-order", "reversed", "nodes and replies came in another order")
    rounds = range(1, int(federation.settings["num-server-rounds"]) + 1)
    federation.run("restarted", [Fault(round % federation.nodes, round, "restart") for round in rounds])
    _assert_same(federation, "in-order", "restarted", "nodes were restarted")


def assert_same_over_the_network(federation: Federation) -> None:
    """Run it by ``fedtune serve``, ``join`` and ``run``: the bits must be those of the run in one process.

    These are real processes over gRPC, in which the method must be installed too. Takes about a minute.
    """
    from deploy.local.federation import federation as over_the_network

    federation.run("in-one-process")
    folder, patient = federation.folder / "over-the-network", {"round.deadline": 600.0, "round.node-wait": 600.0}
    with over_the_network(federation.folder / "processes", federation.data) as running:
        running.tune(federation.settings | patient | {"run.dir": str(folder)}, to_stderr=True)
    _assert_same(federation, "in-one-process", "over-the-network", "it ran over the network")


class Killed(BaseException):
    """Stands for kill -9: nothing may catch it."""


@contextmanager
def killed_after(count: int) -> Iterator[None]:
    """Raise `Killed` once a ledger has got its record of this number, counted from 1; never for 0."""
    append = Ledger.append

    def append_until(self: Ledger, kind: str, **facts: Any) -> Record:
        record = append(self, kind, **facts)
        if record.seq == count:
            raise Killed
        return record

    with mock.patch.object(Ledger, "append", append_until):
        yield


def _assert_same(federation: Federation, first: str, second: str, what: str) -> None:
    one, other = federation.weights(first), federation.weights(second)
    differing = [name for name in one if not torch.equal(one[name], other[name])]
    assert not differing, f"the model has other bits after {what}: {', '.join(differing[:3])}"


def _write_model(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(model_folder("fedtune-tiny"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
