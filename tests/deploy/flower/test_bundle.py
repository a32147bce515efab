"""Which bundles a task may run."""

import io
import zipfile

import pytest
from flwr.cli.build import build_fab_from_disk

from deploy.common.app_folder import write_app
from deploy.flower.bundle import LARGEST, check_bundle
from fedtune_strategies.errors import ConfigError


@pytest.fixture
def project(tmp_path):
    return (write_app(tmp_path / "app", {}) / "pyproject.toml").read_text()


def packed(**files):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, text in files.items():
            bundle.writestr(name.replace("_", "."), text)
    return content.getvalue()


def test_what_fedtune_submits_may_run(tmp_path, project):
    check_bundle(build_fab_from_disk(tmp_path / "app"))
    check_bundle(packed(pyproject_toml=project, LICENSE="…"))


def test_nothing_else_may(project):
    with pytest.raises(ConfigError, match=r"carries 'a\.py'"):
        check_bundle(packed(pyproject_toml=project, a_py=""))
    with pytest.raises(ConfigError, match=r"carries 'sitecustomize\.py'"):
        check_bundle(packed(pyproject_toml=project, sitecustomize_py=""))
    for text in (
        project.replace("client_app.app:app", "os:system"),
        project.replace("server_app.app:app", "server_app.run:execute"),
        project.replace('name = "fedtune"', 'name = "probe"'),
        project.replace('publisher = "fedtune"', 'publisher = "probe"'),
        project.replace("[tool.flwr.app.components]", '[tool.flwr.app.components]\nagentapp = "a:b"'),
    ):
        with pytest.raises(ConfigError, match="not FedTune's"):
            check_bundle(packed(pyproject_toml=text))
    with pytest.raises(ConfigError, match="too much"):
        check_bundle(packed(pyproject_toml=project, LICENSE=" " * LARGEST))


@pytest.mark.parametrize("content", [b"", b"PK", packed(), packed(LICENSE=""), packed(pyproject_toml="[")])
def test_what_cannot_be_read_is_refused(content):
    with pytest.raises(ConfigError, match="cannot be read"):
        check_bundle(content)


def test_half_a_bundle_is_refused(project):
    whole = packed(pyproject_toml=project)
    for end in range(0, len(whole), 97):
        with pytest.raises(ConfigError):
            check_bundle(whole[:end])
