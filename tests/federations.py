"""A federation in memory, made of the nodes that run on real machines."""

from pathlib import Path

import pytest

from client_app.node import Node
from deploy.testing import Killed, killed_after
from fedtune_strategies.testing import InMemoryGrid
from server_app.ledger import Ledger
from server_app.run import execute


def make_nodes(settings, data_files, **own):
    """Make a node for each data file; ids are small numbers.

    `own` are keys of the nodes' own configuration; each node has a folder in `folder`.
    """
    folders = {name: {"folder": f"{own['folder']}/{name}"} if "folder" in own else {} for name in data_files}
    return {
        number: Node(settings, {"name": name, "data": str(path), **own, **folders[name]}, number)
        for number, (name, path) in enumerate(data_files.items(), start=1)
    }


def make_grid(nodes):
    """Make a grid over nodes."""
    return InMemoryGrid({number: node.handle for number, node in nodes.items()})


def run_with_restarts(settings, data_files, **own):
    """Run a whole federation in memory whose workers are restarted before every task."""
    nodes = make_nodes(settings, data_files, **own)

    def restarted_for_each_task(number):
        def handle(kind, payload):
            nodes[number] = make_nodes(settings, data_files, **own)[number]
            return nodes[number].handle(kind, payload)

        return handle

    execute(InMemoryGrid({number: restarted_for_each_task(number) for number in nodes}), settings, run_id=1)


def run(settings, data_files, **own):
    """Run a whole federation in memory; returns the ledger, open for reading."""
    execute(make_grid(make_nodes(settings, data_files, **own)), settings, run_id=1)
    return Ledger.read(_folder(settings))


def final_state(settings):
    """Return the last round's stored state and files: equal bytes mean equal models."""
    ledger = Ledger.read(_folder(settings))
    rounds = list(ledger.records("round"))
    return rounds[-1].round, ledger.payload(rounds[-1]), [record.body["files"] for record in rounds]


def assert_resumed_alike(settings, data_files, folder, first=1):
    """Run again, to the end of round `first` and then on: it must end in the bits of the run that was not stopped."""
    resumed = settings | {"run.dir": str(folder / "resumed")}
    run(resumed | {"num-server-rounds": first}, data_files)
    run(resumed, data_files)
    assert final_state(resumed) == final_state(settings)


def assert_resumes_exactly(settings, data_files, folder, first=2):
    """Run, then kill the server after every record from `first` on: each resumed run must end in the same bits."""
    run(settings, data_files)
    records = sum(1 for _ in Ledger.read(_folder(settings)).records())
    for last in range(first, records):
        resumed = settings | {"run.dir": str(folder / f"killed-{last}")}
        nodes = make_nodes(resumed, data_files)
        with pytest.raises(Killed), killed_after(last):
            execute(make_grid(nodes), resumed, run_id=1)
        execute(make_grid(nodes), resumed, run_id=2)
        assert final_state(resumed) == final_state(settings), f"killed after record {last}"
        replies = [(record.round, record.node) for record in Ledger.read(_folder(resumed)).records("reply")]
        assert len(replies) == len(set(replies)), "a reply was counted twice"


def _folder(settings):
    return Path(settings["run.dir"])
