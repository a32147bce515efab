"""Ledgers as runs write them, made by hand."""

import numpy as np
import safetensors.torch

from deploy.status import report as document
from fedtune_strategies.fedkseed.pro import FedKSeedPro
from fedtune_strategies.run_config import defaults, parse
from server_app.ledger import Ledger
from server_app.run_view import RunView

NODES = ("alice", "bob", "carol")


def report(folder):
    """What the page shows of a run."""
    return document.report(RunView.of(folder))


def evaluation(round, answer):
    answers = [{"prompt": f"ask {i}", "reference": f" right {i}", "answer": f"{answer} {i}"} for i in range(3)]
    facts = {"eval/loss": 4.0 - round, "eval/perplexity": 9.0, "eval/rougeL": 0.1 + 0.2 * round, "seconds": 1.5}
    return facts | {"fingerprint": f"after-{round}", "answers": answers}


def reply(round, node, **facts):
    body = {"num_examples": 10, "loss": 3.0 / round, "bytes_up": 100, "bytes_down": 1000, "seconds": 2.0}
    return body | {"peak_memory": 10**8, "fingerprint": f"after-{round - 1}"} | facts


def begin(folder, method="fedkseed", rounds=3, **settings):
    """Write what a run writes before its first round; returns the open ledger."""
    ledger = Ledger(folder)
    config = defaults(method) | {"method.name": method, "num-server-rounds": rounds} | settings
    ledger.append("start", body={"config": config, "version": "0.1.0", "run_id": "7"})
    for node in NODES:
        ledger.append("joined", node=node, body={"reason": "joined with 10 examples"})
    ledger.append("evaluation", round=0, body=evaluation(0, "wrong"))
    return ledger


def play(ledger, round, asked=NODES, answering=None, blob=b"", **facts):
    """Write a round."""
    answering = asked if answering is None else answering
    ledger.append("asked", round=round, body={"nodes": dict.fromkeys(asked, 10)})
    for node in answering:
        ledger.append("reply", round=round, node=node, body=reply(round, node, **facts))
    body = {"metrics": {"train/loss": 3.0 / round}, "files": {}, "replies": list(answering)}
    ledger.append("round", round=round, body=body, blob=blob)
    ledger.append("evaluation", round=round, body=evaluation(round, "right"))


def finished_run(folder, method="fedkseed", rounds=3, **facts):
    ledger = begin(folder, method, rounds)
    for round in range(1, rounds + 1):
        play(ledger, round, **facts)
    ledger.append("finished", round=rounds, body={"model": str(folder / "model")})
    ledger.close()
    return folder


def pro_state(settings, sums, count):
    """What FedKSeed-Pro stores after a round with this history of its seeds."""
    strategy = FedKSeedPro(parse({"method.name": "fedkseed-pro"} | settings), {})
    strategy.sums, strategy.count = np.array(sums), np.array(count)
    return safetensors.torch.save(strategy.state().tensors)
