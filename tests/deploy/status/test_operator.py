import ssl
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest

from deploy.status.operator import operators_page
from fedtune_strategies.errors import ConfigError
from tests.deploy.status.runs import finished_run


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path))
    finished_run(tmp_path / "runs/first")
    return tmp_path / "server"


def test_on_loopback_it_asks_for_the_token_too(folder):
    """Another account of the machine reaches loopback as the operator does."""
    with operators_page(folder, "127.0.0.1:0") as url:
        assert url.startswith("http://127.0.0.1:")
        place, _, token = url.partition("#token=")
        for path in ("report.json", "metrics"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(place + path, timeout=10)
        request = urllib.request.Request(place + "report.json", headers={"Authorization": f"Bearer {token}"})
        assert b"first" in urllib.request.urlopen(request, timeout=10).read()


def test_beyond_it_has_the_server_s_certificate_and_a_token_that_stays(folder):
    tokens = []
    for _ in range(2):
        with operators_page(folder, "0.0.0.0:0") as url:
            parts = urlsplit(url)
            assert parts.scheme == "https" and parts.hostname != "0.0.0.0"
            tokens.append(parts.fragment.removeprefix("token="))
            request = urllib.request.Request(f"https://localhost:{parts.port}/report.json")
            request.add_header("Authorization", f"Bearer {tokens[-1]}")
            trusted = ssl.create_default_context(cafile=folder / "keys/ca.crt")
            assert b"first" in urllib.request.urlopen(request, timeout=10, context=trusted).read()
    assert tokens[0] == tokens[1] and len(tokens[0]) >= 32
    assert (folder / "status.token").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("where", ["9096", "host:", ":9096", "127.0.0.1:99999"])
def test_an_address_that_is_none(folder, where):
    with pytest.raises(ConfigError, match="host:port"), operators_page(folder, where):
        pass
