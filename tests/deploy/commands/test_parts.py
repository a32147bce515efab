import json

from typer.testing import CliRunner

from deploy.cli import app


def call(*arguments):
    result = CliRunner().invoke(app, ["parts", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_table_of_the_embedded_model():
    code, out, _ = call("fedtune-tiny", "--method", "fedcybgd")
    assert code == 0
    assert "embedding" in out and "layer 3" in out


def test_other_blocks_as_json():
    options = ["--set", "fedcybgd.layers-per-block=4", "--set", "fedcybgd.train-embeddings=false", "--format", "json"]
    code, out, _ = call("fedtune-tiny", "--method", "fedcybgd", *options)
    found = json.loads(out)
    assert code == 0 and [block["name"] for block in found] == ["embedding", "layers 0-3", "norm"]
    assert [block["frozen"] for block in found] == [True, False, True]


def test_no_such_model():
    code, _, line = call("no/such-model", "--method", "fedcybgd")
    assert code == 12 and "no/such-model" in line


def test_a_method_that_trains_the_model_as_a_whole_has_none():
    code, _, line = call("fedtune-tiny", "--method", "fedavg")
    assert code == 10 and "as a whole" in line
