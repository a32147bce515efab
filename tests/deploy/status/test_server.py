import contextlib
import gzip
import json
import os
import socket
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deploy.common import processes, web
from deploy.common.certificates import server_files
from deploy.status import server as server_module
from deploy.status.page import write_page
from deploy.status.server import serve_page
from fedtune_strategies.errors import ConfigError, PortError
from tests.deploy.status.runs import begin, finished_run, play, pro_state

ALLOWED = {"Authorization": "Bearer sesame"}


def page(folder, *where, **files):
    return serve_page(folder, "sesame", *where, **files)


def get(url, path="", headers=ALLOWED, context=None):
    request = urllib.request.Request(url.partition("#")[0] + path, headers=dict(headers))
    try:
        with urllib.request.urlopen(request, timeout=10, context=context) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def answers(url, trusted):
    with contextlib.suppress(OSError):
        return get(url.replace("127.0.0.1", "localhost"), "healthz", context=trusted)[0] == 200
    return False


def test_a_run_is_followed_and_sent_only_when_it_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "FRESH_SECONDS", 0.0)
    ledger = begin(tmp_path / "run")
    with page(tmp_path) as url:
        status, headers, body = get(url, "report.json")
        assert status == 200 and json.loads(body)["runs"][0]["run"]["round"] == 0
        assert get(url, "report.json", {**ALLOWED, "If-None-Match": headers["ETag"]})[0] == 304
        play(ledger, 1)
        status, changed, body = get(
            url, "report.json", {**ALLOWED, "If-None-Match": headers["ETag"], "Accept-Encoding": "gzip"}
        )
        assert status == 200 and json.loads(gzip.decompress(body))["runs"][0]["run"]["round"] == 1
        assert changed["ETag"] != headers["ETag"]
        finished_run(tmp_path / "another")
        assert len(json.loads(get(url, "report.json")[2])["runs"]) == 2
    ledger.close()


def test_neither_torch_nor_flower_is_needed_to_show_a_run_and_its_panel(tmp_path):
    ledger = begin(tmp_path, "fedkseed-pro", **{"fedkseed.seeds": 4})
    play(ledger, 1, blob=pro_state({"fedkseed.seeds": 4}, [0.0, 10.0, 10.0, 0.0], [1, 1, 1, 0]))
    ledger.close()
    code = (
        "import sys, pathlib, deploy.status.server, deploy.status.report as document, server_app.run_view as fold\n"
        "assert document.report(fold.RunView.of(pathlib.Path(sys.argv[1])))['panel']\n"
        "assert not {'torch', 'flwr'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(tmp_path)], check=True, timeout=60)


def test_a_folder_without_runs_waits_for_one(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "FRESH_SECONDS", 0.0)
    with page(tmp_path) as url:
        assert json.loads(get(url, "report.json")[2])["runs"] == []
        finished_run(tmp_path / "run")
        assert len(json.loads(get(url, "report.json")[2])["runs"]) == 1


def test_who_has_no_token_sees_no_run(tmp_path):
    finished_run(tmp_path / "run")
    with page(tmp_path) as url:
        assert url.endswith("/#token=sesame")
        for path in ("report.json", "metrics"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}, {"Cookie": "sesame"}):
                status, _, body = get(url, path, headers)
                assert status == 401 and b"run" not in body
            assert get(url, f"{path}?token=sesame", {})[0] == 401, "a token in an address ends in logs"
            assert get(url, path, {"Authorization": "Bearer sesame"})[0] == 200
        assert get(url, "", {})[0] == get(url, "healthz", {})[0] == 200
        assert b"alice" not in get(url)[2]


def test_nothing_can_be_written_or_reached_beside_the_run(tmp_path):
    finished_run(tmp_path / "run")
    with page(tmp_path / "run") as url:
        for path in ("ledger.sqlite", "../run/ledger.sqlite", "%2e%2e/", "report.json/..", "healthz/x"):
            assert get(url, path)[0] == 404
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            request = urllib.request.Request(url + "report.json", method=method, data=b"x")
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(request, timeout=10)
            assert caught.value.code == 405
        headers = get(url)[1]
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("silent", [False, True], ids=["in a request", "before the handshake"])
def test_whoever_holds_the_line_is_cut_off_and_others_are_served(tmp_path, monkeypatch, silent):
    monkeypatch.setattr(web, "REQUEST_SECONDS", 0.5)
    monkeypatch.setattr(web, "MAX_REQUESTS", 2)
    files = server_files(tmp_path / "keys")
    trusted = ssl.create_default_context(cafile=files.authority)
    secrets = {"certificate": files.certificate, "key": files.key} if silent else {}
    with page(tmp_path, **secrets) as url:
        address = ("127.0.0.1", urlsplit(url).port)
        idle = [socket.create_connection(address, timeout=10) for _ in range(2)]
        for one in idle:
            one.sendall(b"" if silent else b"GET /healthz HTTP/1.1\r\n")
        time.sleep(0.2)
        third = socket.create_connection(address, timeout=10)
        assert third.recv(100) == b"", "all slots are taken"
        assert all(one.recv(100) == b"" for one in idle), "they were cut off"
        for one in (*idle, third):
            one.close()
        processes.wait_until(lambda: answers(url, trusted), 10.0, lambda: "the slots came not back")


def test_over_tls_and_a_port_that_is_taken(tmp_path):
    files = server_files(tmp_path / "keys")
    trusted = ssl.create_default_context(cafile=files.authority)
    with page(tmp_path, "127.0.0.1", 0, certificate=files.certificate, key=files.key) as url:
        address = f"https://localhost:{urlsplit(url).port}/"
        assert get(address, "healthz", context=trusted)[0] == 200
        with pytest.raises(PortError, match="cannot listen"), page(tmp_path, "127.0.0.1", urlsplit(url).port):
            pass
    broken = {"certificate": files.certificate, "key": files.authority}
    with pytest.raises(ConfigError, match="certificate"), page(tmp_path, **broken):
        pass


def test_metrics_are_those_of_the_ledger(tmp_path):
    finished_run(tmp_path / "run", "fedcybgd", block=3)
    with page(tmp_path) as url:
        _, headers, body = get(url, "metrics")
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    samples = {
        (one.name, *(one.labels[key] for key in sorted(one.labels) if key != "run")): one.value
        for family in text_string_to_metric_families(body.decode())
        for one in family.samples
    }
    assert samples["fedtune_rounds_total",] == 3
    assert samples["fedtune_eval_loss",] == 1.0
    assert samples["fedtune_payload_bytes_total", "down"] == 9000
    assert samples["fedtune_node_payload_bytes_total", "up", "bob"] == 300
    assert samples["fedtune_phase_seconds_total", "evaluation"] == 4.5
    assert samples["fedtune_run_state", "finished"] == 1 and samples["fedtune_run_state", "running"] == 0
    assert samples["fedtune_node_state", "alice", "present"] == 1
    assert samples["fedtune_node_peak_memory_bytes", "carol"] == 10**8


def test_a_container_is_healthy_while_its_page_answers_plain_or_not(tmp_path):
    def code(port):
        environment = os.environ | {"FEDTUNE_STATUS": f"127.0.0.1:{port}"}
        return subprocess.run([sys.executable, "deploy/docker/server-healthy.py"], env=environment).returncode

    finished_run(tmp_path)
    with page(tmp_path) as url:
        port = urlsplit(url).port
        assert code(port) == 0
    assert code(port) != 0


def test_a_ledger_that_cannot_be_read_is_a_row_beside_the_others(tmp_path):
    finished_run(tmp_path / "good")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/ledger.sqlite").write_bytes(b"no database at all" * 100)
    with page(tmp_path) as url:
        status, _, body = get(url, "healthz")
        assert status == 200 and b"1 runs can be read, 1 not" in body and str(tmp_path).encode() not in body
        runs = {one["run"]["name"]: one["run"] for one in json.loads(get(url, "report.json")[2])["runs"]}
        assert runs["good"]["state"] == "finished" and runs["good"]["round"] == 3
        assert runs["bad"]["state"] == "unreadable" and "ledger.sqlite" in runs["bad"]["message"]
        assert get(url, "metrics")[0] == 200
    write_page(tmp_path, tmp_path / "page.html")
    assert "unreadable" in (tmp_path / "page.html").read_text()
