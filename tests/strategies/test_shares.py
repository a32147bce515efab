"""What a node's claims about itself may weigh."""

import math
import statistics
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune_strategies.fedavg.messages import ArraysReply
from fedtune_strategies.fedcybgd.messages import BlockReply
from fedtune_strategies.fedkseed.messages import GradientReply, SeedReply
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.strategy import LARGEST_SHARE, mean_loss, shares
from fedtune_strategies.testing import InMemoryGrid
from server_app.ledger import Ledger
from server_app.run import execute
from tests.federations import final_state, make_nodes

COUNTS = st.lists(st.integers(1, 10**9), min_size=1, max_size=12)


def replies(counts, losses=None):
    return [SimpleNamespace(num_examples=n, loss=loss) for n, loss in zip(counts, losses or counts, strict=True)]


@given(COUNTS)
def test_no_share_is_above_ten_medians_and_smaller_ones_are_exact(counts):
    found = shares(replies(counts), "examples")
    limit = LARGEST_SHARE * statistics.median_low(counts)
    assert found == [count if count <= limit else limit for count in counts]
    assert all(type(share) is int for share in found)
    assert shares(replies(counts), "equal") == [1] * len(counts)


@given(COUNTS, st.randoms())
def test_shares_do_not_depend_on_the_order_of_replies(counts, random):
    order = random.sample(range(len(counts)), len(counts))
    mixed = shares(replies([counts[i] for i in order]), "examples")
    assert mixed == [shares(replies(counts), "examples")[i] for i in order]


def test_of_two_nodes_neither_raises_the_limit_alone():
    assert shares(replies([5, 10**9]), "examples") == [5, 50]


def test_losses_that_are_no_numbers_are_left_out_of_the_mean():
    assert mean_loss(replies([1, 1, 1], [2.0, math.nan, 4.0]), [1, 7, 3]) == {"train/loss": 3.5}
    assert mean_loss(replies([1], [math.nan]), [1]) == {}


METHODS = {
    "fedkseed": {},
    "gradient": {"fedkseed.estimator": "gradient"},
    "fedavg": {},
    "fedcybgd": {"fedcybgd.structure": "averaged", "fedcybgd.nodes-per-round": 3, "strategy.weighting": "examples"},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_member_that_claims_a_billion_examples_weighs_ten_medians_and_its_loss_spoils_nothing(
    settings, data_files, method, tmp_path
):
    name = "fedkseed" if method == "gradient" else method
    settings |= {"method.name": name, "num-server-rounds": 1, "eval.answers": 0, "strategy.min-nodes": 3}
    settings |= METHODS[method]

    def ended(claim, loss, folder):
        own = settings | {"run.dir": str(tmp_path / folder)}

        def forge(node):
            def handle(kind, payload):
                kind, payload = node.handle(kind, payload)
                reply = protocol.decode(kind, payload)
                if isinstance(reply, SeedReply | GradientReply | ArraysReply | BlockReply):
                    reply = replace(reply, num_examples=claim, loss=loss)
                return kind, protocol.encode(reply)

            return handle

        nodes = make_nodes(own, data_files)
        handlers = {number: node.handle for number, node in nodes.items()} | {1: forge(nodes[1])}
        execute(InMemoryGrid(handlers), own, run_id=1)
        ledger = Ledger.read(Path(own["run.dir"]))
        return final_state(own), ledger.last("round").body["metrics"], list(ledger.records("reply", round=1))

    state, metrics, recorded = ended(10**9, math.nan, "attack")
    honest = [record.body["num_examples"] for record in recorded if record.node != "node-0"]
    capped, _, _ = ended(LARGEST_SHARE * max(honest), 1.0, "capped")
    assert len(recorded) == 3 and state == capped
    assert math.isfinite(metrics["train/loss"])
