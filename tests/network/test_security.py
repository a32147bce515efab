"""Who may not take part is refused, with a line that an operator or owner understands; and no secret shows anywhere."""

import contextlib
import datetime
import socket
import ssl
import time

import pytest

from deploy.common import processes
from deploy.common.certificates import node_key, server_files
from deploy.common.flower_cli import key_words
from deploy.flower import versions
from deploy.operator.serve import serving
from deploy.owner.doctor import examine
from deploy.owner.node import meanings
from fedtune_strategies.config.node import NodeConfig
from fedtune_strategies.folders import MARK

UTC = datetime.UTC


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder, events = tmp_path_factory.mktemp("server"), []
    port = processes.free_port()
    with serving(folder, address=f"localhost:{port}", listen="127.0.0.1", on_event=events.append) as running:
        running.events, running.port, running.folder = events, port, folder
        yield running


def node(server, tmp_path, name, authority, key):
    """Start a SuperNode; returns it and its log."""
    trust = ["--root-certificates", str(authority)] if authority else ["--insecure"]
    credential = ["--auth-supernode-private-key", str(key)] if key else []
    command = [
        "flower-supernode", *versions.SUPERNODE, "--superlink", f"localhost:{server.port}", "--host", "127.0.0.1",
        "--port", str(processes.free_port()), "--node-config", f'name="{name}" data="x"', *trust, *credential,
    ]  # fmt: skip
    log = tmp_path / f"{name}.log"
    return processes.start(command, server.control.environment, log), log


@pytest.mark.network
@pytest.mark.timeout(300)
def test_strangers_are_refused_and_no_secret_shows(server, tmp_path):
    keys, others = server.folder / "keys", tmp_path / "other"
    other = server_files(others)
    public = node_key(keys, "member").public
    node_id = server.control.register(public, "member")
    assert server.control.registered_keys() == {key_words(public.read_text()): node_id}
    member, _ = node(server, tmp_path, "member", server.authority, node_key(keys, "member").private)
    strangers = {
        "unregistered": (server.authority, node_key(others, "stranger").private),
        "without-a-key": (server.authority, None),
        "wrong-authority": (other.authority, node_key(keys, "member").private),
        "plain-text": (None, None),
    }
    started = {name: node(server, tmp_path, name, *trust) for name, trust in strangers.items()}
    try:
        limit = time.monotonic() + 120
        while "online" not in server.control.node_states().values():
            assert time.monotonic() < limit
        for name in ("unregistered", "without-a-key", "wrong-authority"):
            process, log = started[name]
            assert process.wait(max(1.0, limit - time.monotonic())) != 0, name
            assert any("the server refuses this node" in line for line in meanings(log.read_text())), log.read_text()
        while not any("speaks no TLS" in line for line in server.events):
            assert time.monotonic() < limit, server.events
            time.sleep(0.2)
        # Of all these one takes part.
        assert list(server.control.node_states().values()) == ["online"]
        assert member.poll() is None
        _no_secret_shows(server, tmp_path)
    finally:
        processes.stop([member, *(process for process, _ in started.values())])


def _no_secret_shows(server, tmp_path):
    secrets = [(server.folder / "executor.secret").read_text()]
    for file in (server.folder / "keys").iterdir():
        if file.suffix not in (".crt", ".pub") and file.name != MARK:
            secrets.append(file.read_text().splitlines()[1])
    shown = "".join(
        file.read_text(errors="replace") for file in [*server.folder.glob("logs/*"), *tmp_path.glob("*.log")]
    )
    for process in processes.marked(server.control.environment[processes.TOKEN]):
        with contextlib.suppress(processes.psutil.Error):
            shown += " ".join(process.cmdline())
    assert shown and not [secret for secret in secrets if secret in shown]
    secret_files = [server.folder / "executor.secret", *(server.folder / "keys").iterdir()]
    assert {file.stat().st_mode & 0o077 for file in secret_files} == {0}
    assert server.folder.stat().st_mode & 0o077 == 0


@pytest.mark.network
def test_the_published_port_offers_neither_control_nor_runtime(server):
    """An app that anybody could submit would run on all nodes: that interface must stay on loopback."""
    context = ssl.create_default_context(cafile=server.authority)
    context.set_alpn_protocols(["http/1.1"])
    request = b"POST /v1/control/list-runs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n"
    answer = b""
    with (
        contextlib.suppress(OSError),
        socket.create_connection(("localhost", server.port), 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as link,
    ):
        link.sendall(request)
        link.settimeout(5)
        answer = link.recv(4096)
    assert b"200" not in answer and b"run" not in answer


def test_an_expired_certificate_is_one_line_for_operator_and_owner(tmp_path):
    long_ago = datetime.datetime.now(UTC) - datetime.timedelta(days=4000)
    expired = server_files(tmp_path, now=long_ago)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(expired.certificate, expired.key)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        import threading

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    plain, _ = listener.accept()
                    with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as link:
                        link.recv(1)

        threading.Thread(target=serve, daemon=True).start()
        address = f"localhost:{listener.getsockname()[1]}"
        checks = {one.label: one for one in examine(address, expired.authority.read_text(), NodeConfig())}
    assert checks["certificate"].ok is False
    assert "expired" in checks["certificate"].detail and "\n" not in checks["certificate"].detail
