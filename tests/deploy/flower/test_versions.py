"""Flower's programs under our secrets, whatever the release; and that one without them is neither run nor published."""

import asyncio
import http.server
import ssl
import subprocess
import sys
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from client_app.stats import VARIABLE, stream_is_open
from deploy.common.certificates import server_files
from deploy.flower import supernode, versions
from deploy.flower.strangers import check_closed
from deploy.flower.versions import check_reaches, divided, replace
from fedtune_strategies.errors import ConfigError, LinkError

CONTROL, RUNTIME = "/v1/control/list-runs", "/v1/runtime/acquire-task"


def asked(port, path, kind="http"):
    """What the port for nodes, 9092, or another answers."""
    answers = []

    async def app(scope, receive, send):
        answers.append("SuperLink")

    async def send(message):
        answers.append(message.get("status"))

    scope = {"type": kind, "server": ("127.0.0.1", port), "path": path, "method": "POST", "headers": []}
    asyncio.run(divided(app, 9092, scope, None, send))
    return answers[0]


def test_the_nodes_port_answers_nodes_alone():
    assert asked(9092, "/v1/fleet/pull-messages") == "SuperLink"
    for path in (
        "/v1/control/list-runs",
        "/v1/runtime/acquire-task",
        "/",
        "/docs",
        "/v1/fleet",
        "//v1/fleet/x",
        "/health",
    ):
        assert asked(9092, path) == 404, path
        assert asked(8000, path) == "SuperLink"
    assert asked(9092, "", "lifespan") == "SuperLink"


def test_a_release_whose_insides_have_moved_is_not_run():
    with pytest.raises(ConfigError, match=r"cannot secure Flower .* has no load_doors"):
        replace("flwr.superlink.cli.flower_superlink", load_control_authn_plugin=None, load_doors=None)
    module = replace("flwr.superlink.cli.flower_superlink")
    assert module.load_control_authn_plugin is not None


@pytest.mark.parametrize("grpc", [True, False])
def test_a_node_says_that_its_release_does_not_reach_the_server(monkeypatch, grpc):
    monkeypatch.setattr(versions, "GRPC", grpc)
    ours, other = ("1.39.0", "1.42.0")[:: 1 if grpc else -1]
    check_reaches(ours)
    with pytest.raises(LinkError, match=rf"server has flwr {other}, .* install the server's release"):
        check_reaches(other)


def test_a_supernode_that_has_given_up_its_server_ends():
    """Its web server would keep the process there, and nobody would start it again."""
    code = (
        "import threading; from deploy.flower.supernode import ending;"
        "threading.Thread(target=threading.Event().wait).start();"
        "ending(lambda **_: 1 / 0)()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and "the SuperNode ends: ZeroDivisionError" in done.stdout, done.stderr


def test_a_supernode_looks_for_messages_less_often_while_there_is_a_stream(tmp_path, monkeypatch):
    slept = []
    monkeypatch.setenv(VARIABLE, str(tmp_path / "facts.json"))
    monkeypatch.setattr(supernode, "time", SimpleNamespace(monotonic=lambda: sum(slept), sleep=slept.append))

    def rests(seconds):
        slept.clear()
        supernode.rest(seconds)
        return sum(slept)

    assert rests(3.0) == 3.0
    with stream_is_open():
        assert rests(3.0) == supernode.LONG
        assert rests(0.5) == 0.5  # it waits for a reply that is due
    assert rests(3.0) == 3.0
    monkeypatch.delenv(VARIABLE)
    with stream_is_open():
        assert rests(3.0) == 3.0


@contextmanager
def superlink(tmp_path, answers):
    """A server that gives each path, or any, a status."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.send_response(answers.get(self.path, answers[""]))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_):
            pass

    files = server_files(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port, files.authority
        finally:
            server.shutdown()


@pytest.mark.parametrize("opened", [CONTROL, RUNTIME])
def test_a_superlink_that_lets_strangers_in_is_not_published(tmp_path, opened):
    with (
        superlink(tmp_path / "control", {"": 401}) as (control, authority),
        superlink(tmp_path / "control", {"": 404}) as (fleet, _),
        superlink(tmp_path / "control", {"": 401, opened: 200}) as (careless, _),
        superlink(tmp_path / "control", {"": 404, opened: 401}) as (mixed, _),
    ):
        check_closed(control, fleet, authority)
        for ports in ((careless, fleet), (control, mixed), (control, control)):
            with pytest.raises(LinkError, match="open to strangers"):
                check_closed(*ports, authority)
