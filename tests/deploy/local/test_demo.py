"""`make demo`, short: real processes, one method, one round."""

import contextlib
import io
import json

import pytest
from rich.console import Console

from deploy.local.demo import run_demo
from server_app.ledger import Ledger


@pytest.mark.network
@pytest.mark.timeout(600)
def test_the_demo_tunes_over_real_processes_and_leaves_table_model_and_page(tmp_path):
    said, results = Console(file=io.StringIO(), width=80, color_system=None), []
    changes = {"num-server-rounds": 1, "train.local-steps": 2, "eval.answers": 2, "eval.max-examples": 16}
    run_demo(
        nodes=2, methods=["gradient"], model="fedtune-tiny", data=None, changes=changes, out=tmp_path / "demo",
        keep=False, console=said, on_results=results.extend,
    )  # fmt: skip
    assert "All 2 nodes are online" in said.file.getvalue() and "✓ gradient" in said.file.getvalue()
    (told,) = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert told["method"] == "gradient" and results[0].traffic.up > 2000 < results[0].peak_memory
    with contextlib.closing(Ledger.read(tmp_path / "demo" / "gradient")) as ledger:
        assert sorted(one.node for one in ledger.records("reply")) == ["node-0", "node-1"]
    assert (tmp_path / "demo" / "gradient" / "model" / "model.safetensors").is_file()
    assert (tmp_path / "demo" / "status.html").is_file()
