"""Whose scalar stands on which seed: the server and the node know it, the other members do not."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch

from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fedkseed.seed_draws import check_secret, draw_seeds, seed_key
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.run_config import parse
from server_app.replay import replay
from tests.federations import run

UNIFORM = np.empty(0, dtype=np.int16)
K, TAU = 4096, 12


def play(settings, data_files, key):
    """Run one round; return node 1's reply, and what theta shows of its scalars to whoever knows a secret."""
    settings |= {"num-server-rounds": 1, "fedkseed.seeds": K, "train.local-steps": TAU, "fedkseed.theta-bits": 24}
    ledger, config = run(settings, data_files, **{"draw-key": key}), parse(settings)
    theta = safetensors.torch.load(ledger.payload(next(iter(ledger.records("round")))))["theta"].numpy()
    replies = [protocol.decode("seed-reply", ledger.payload(record)) for record in ledger.records("reply")]
    (answer,) = [reply for reply in replies if reply.node == "node-1"]
    scale = -config.train.lr * answer.num_examples / sum(reply.num_examples for reply in replies)
    return answer, lambda secret: theta[draw_seeds(seed_key(config, 1, "node-1", secret), TAU, K, UNIFORM)] / scale


def test_theta_shows_a_node_s_scalars_to_none_but_the_server(settings, data_files):
    answer, shown = play(settings, data_files, key="known to the node")
    assert np.isclose(shown(answer.key), answer.scalars, rtol=0.05).sum() >= TAU - 2, "the server adds them up"
    for guess in ("", "known to the node", "0" * 32):  # what another member could try
        assert (shown(guess) == 0).sum() >= TAU - 2
    replay(Path(settings["run.dir"]))  # the ledger has all that makes the model


def test_a_public_key_shows_them_to_all(settings, data_files):
    answer, shown = play(settings, data_files, key="public")
    assert not answer.key and np.isclose(shown(""), answer.scalars, rtol=0.05).sum() >= TAU - 2


def test_where_all_nodes_draw_alike_no_secret_is_sent(settings, data_files):
    answer, _ = play(settings | {"strategy.aggregation": "fedmedian"}, data_files, key="known to the node")
    assert not answer.key


@pytest.mark.parametrize("secret", ["a", "A" * 32, "0" * 33, "x" * 10_000, "0" * 31 + "\n"])
def test_a_secret_of_another_form_is_refused(secret):
    with pytest.raises(ProtocolError, match="32 hexadecimal"):
        check_secret(secret)


def test_pro_runs_with_fewer_seeds_than_a_node_draws(settings, data_files):
    settings |= {"method.name": "fedkseed-pro", "fedkseed.seeds": 2, "num-server-rounds": 3}
    ledger = run(settings, data_files)
    assert [record.round for record in ledger.records("round")] == [1, 2, 3] and ledger.last("finished")
