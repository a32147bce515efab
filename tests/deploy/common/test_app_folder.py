import tomllib
from pathlib import Path

from deploy.common.app_folder import write_app


def test_it_is_the_app_of_the_checkout(tmp_path):
    written = tomllib.loads((write_app(tmp_path / "app", {"method.name": "fedcybgd"}) / "pyproject.toml").read_text())
    checkout = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    for key in ("publisher", "components"):
        assert written["tool"]["flwr"]["app"][key] == checkout["tool"]["flwr"]["app"][key]
    config = written["tool"]["flwr"]["app"]["config"]
    assert config["method"]["name"] == "fedcybgd" and "fedcybgd" in config and "fedkseed" not in config
    for key in ("name", "version"):
        assert written["project"][key] == checkout["project"][key]
