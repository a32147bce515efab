import json
import urllib.error
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from client_app.stats import VARIABLE, Stats
from client_app.worker import Service
from client_app.worker_client import WorkerSpec
from deploy.monitoring.node import node_page
from fedtune_strategies.errors import ConfigError
from fedtune_strategies.protocol import messages as protocol


def samples(url, folder):
    request = urllib.request.Request(url + "metrics")
    request.add_header("Authorization", f"Bearer {(folder / 'metrics.token').read_text()}")
    text = urllib.request.urlopen(request, timeout=10).read().decode()
    return {
        (one.name, *one.labels.values()): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }


def test_a_worker_tells_its_owner_what_it_does(settings, data_files, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "facts.json"))
    with node_page(tmp_path, "127.0.0.1:0") as url:
        assert urllib.request.urlopen(url + "healthz", timeout=10).status == 200
        assert samples(url, tmp_path) == {("fedtune_worker_up",): 0}
        own = {"name": "alice", "data": str(data_files["node-0"]), "folder": str(tmp_path / "own")}
        service = Service(WorkerSpec(settings, own, 1))
        hello = protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, fingerprint=""))
        _, answer = service.do("hello", hello)
        service.do("nonsense", b"")
        shown = samples(url, tmp_path)
    assert shown["fedtune_worker_up",] == 1
    assert (shown["fedtune_worker_tasks_total",], shown["fedtune_worker_failures_total",]) == (2, 1)
    assert shown["fedtune_worker_payload_bytes_total", "down"] == len(hello)
    assert shown["fedtune_worker_payload_bytes_total", "up"] >= len(answer)
    assert shown["fedtune_worker_peak_memory_bytes",] > 10**7


def test_facts_of_a_worker_that_is_gone_do_not_count(tmp_path):
    (tmp_path / "facts.json").write_text(json.dumps({"pid": 2**22 + 1}))
    with node_page(tmp_path, "127.0.0.1:0") as url:
        assert samples(url, tmp_path) == {("fedtune_worker_up",): 0}


def test_a_file_that_cannot_be_written_hurts_no_task(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nothing" / "facts.json"))
    facts = Stats()
    facts.note("hello", "hello-reply", 1, 1, 0.1)
    facts.note("hello", "hello-reply", 1, 1, 0.1)
    assert facts.counts["tasks"] == 2


def test_a_token_is_asked_for_on_loopback_too(tmp_path):
    with node_page(tmp_path, "127.0.0.1:0") as url, pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url + "metrics", timeout=10)
    assert (tmp_path / "metrics.token").stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="host:port"), node_page(tmp_path, "everywhere"):
        pass
    with node_page(tmp_path, "") as url:
        assert url == ""
