"""A real pretrained model on real data: stories260K on four nodes' share of Dolly."""

from pathlib import Path

import pytest

from server_app.ledger import Ledger
from server_app.run import execute
from tests.federations import make_grid, make_nodes

SHARED = Path(__file__).parents[3] / "shared" / "data"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason="needs the development data in ../shared/data"),
]


OWN = {
    "fedkseed": {"fedkseed.seeds": 1024, "train.local-steps": 25, "train.lr": 2e-4},
    "fedcybgd": {"train.local-steps": 20, "fedcybgd.order": "descending"},
}


@pytest.mark.parametrize("method", ["fedkseed", "fedcybgd"])
def test_stories260k_learns_dolly_on_four_nodes(tmp_path, method):
    dolly = SHARED / "dolly15k"
    rows = (dolly / "databricks-dolly-15k.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "held_out.jsonl").write_text("".join(rows[-80:]))
    files = {}
    for number in range(4):
        files[f"node-{number}"] = tmp_path / f"{number}.jsonl"
        files[f"node-{number}"].write_text("".join(rows[number * 1500 : number * 1500 + 200]))
    settings = {
        "method.name": method,
        "model.name": str(SHARED / "models" / "stories260K-hf"),
        "num-server-rounds": 6,
        "strategy.min-nodes": 4,
        "train.seq-length": 128,
        "train.batch-size": 8,
        "eval.data": str(tmp_path / "held_out.jsonl"),
        "eval.every": 6,
        "eval.answers": 0,
        "run.dir": str(tmp_path / "run"),
    }
    settings |= OWN[method]
    execute(make_grid(make_nodes(settings, files)), settings, run_id=1)
    losses = [record.body["eval/loss"] for record in Ledger.read(tmp_path / "run").records("evaluation")]
    assert losses[0] == pytest.approx(4.3, abs=0.2)
    assert losses[-1] < losses[0] - 0.2
