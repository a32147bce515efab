"""A server that is killed in a round in which a node fails, too: the resumed run is the undisturbed one."""

import random

import pytest

from deploy.testing import Fault, Federation, Killed
from server_app.ledger import Ledger

RUNS = {
    "gradient": {"method.name": "fedkseed", "fedkseed.estimator": "gradient", "fedkseed.seeds": 256},
    "zeroth order": {"method.name": "fedkseed", "fedkseed.estimator": "two-sided", "fedkseed.seeds": 64},
    "fedavg": {"method.name": "fedavg"},
    "sequential": {"method.name": "fedcybgd"},
    "parallel": {"method.name": "fedcybgd", "fedcybgd.structure": "parallel", "fedcybgd.nodes-per-round": 2},
}
FAULTS = {
    "error": [Fault(0, 2, "error"), Fault(1, 1, "error")],
    "lost": [Fault(1, 2, "lost")],
    "restart": [Fault(0, 2, "restart"), Fault(2, 1, "restart")],
}


def outcome(ledger):
    """What a run came to: its models, and whose replies are in them."""
    rounds = list(ledger.records("round"))
    return [(ledger.payload(one), one.body["files"], sorted(one.body["replies"])) for one in rounds]


def killed_and_resumed(federation, faults, last):
    name = f"killed-{last}"
    with pytest.raises(Killed):
        federation.run(name, faults, stop_after=last)
    return federation.run(name, faults)


def check(federation, faults, points=None):
    """Kill the server after some records, all by default."""
    undisturbed = federation.run("undisturbed", faults)
    expected, records = outcome(undisturbed), sum(1 for _ in undisturbed.records())
    chosen = range(2, records) if points is None else random.Random(records).sample(range(3, records), points)
    for last in chosen:
        resumed = killed_and_resumed(federation, faults, last)
        told = f"killed after record {last}: {Ledger.read(resumed.folder).folder}"
        assert outcome(resumed) == expected, told
        replies = [(one.round, one.node) for one in resumed.records("reply")]
        assert len(replies) == len(set(replies)), told


def make(folder, method, fault):
    # A lost reply costs a deadline, which must be long for a busy machine.
    deadline = 4.0 if fault == "lost" else 60.0
    own = {"num-server-rounds": 2, "round.deadline": deadline, "strategy.min-nodes": 2}
    return Federation(folder, RUNS[method] | own)


# Losing a node does the same to all methods but those that give its block to another.
CASES = [(m, f) for m in RUNS for f in FAULTS if f != "lost" or m in ("zeroth order", "sequential")]


@pytest.mark.parametrize(("method", "fault"), CASES)
def test_a_server_killed_in_a_round_with_a_failing_node_resumes_to_the_same_run(method, fault, tmp_path):
    check(make(tmp_path, method, fault), FAULTS[fault], points=1)
