"""Tokens, members, the published port and the desk behind it, without Flower: its control interface is a stand-in."""

import asyncio
import base64
import contextlib
import json
import os
import socket
import ssl
import threading
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from deploy.cli import app
from deploy.common.certificates import node_key, server_files
from deploy.common.flower_cli import Control, key_words
from deploy.common.join_token import JOIN, JoinToken, authority_hash, decode_token
from deploy.common.tls_hello import protocols, server_name
from deploy.operator.alpn_router import Front, room_for
from deploy.operator.members import Members, admit
from deploy.operator.registration import PATIENCE, RegistrationServer, revoke
from deploy.owner import join as joining
from deploy.owner.join import (
    Membership,
    fetch_server_info,
    find_membership,
    is_redeemed,
    memberships,
    register,
    unregister,
)
from fedtune_strategies.errors import ConfigError, LinkError, NodesError, ProtocolError
from fedtune_strategies.folders import private_runtime_folder, remove_folder
from fedtune_strategies.stream.offer import new_name, socket_of

SECRET = bytes(range(16))


class FakeControl(Control):
    """Registers keys in a dict, and like Flower takes none again that it has known."""

    registered: dict = {}  # noqa: RUF012

    def register(self, public_key, name):
        key = public_key.read_text().strip()
        if key in self.registered.values():
            raise LinkError("flwr supernode failed: code 23: Public key already in use")
        node_id = 1000 + sum(isinstance(one, int) for one in self.registered) + 1
        self.registered |= {name: key, node_id: key}
        return node_id

    def unregister(self, node_id):
        self.registered["gone", node_id] = self.registered[node_id]
        self.registered[node_id] = None

    def registered_keys(self):
        return {key_words(key): one for one, key in self.registered.items() if isinstance(one, int) and key}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A desk behind a front on a free port; what it says is in ``desk.said``."""
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    FakeControl.registered = {}
    files = server_files(tmp_path / "keys")
    members = Members(tmp_path / "server")
    said = []
    desk = RegistrationServer(
        files,
        members,
        FakeControl(tmp_path, {}),
        offer=lambda: {"settings": {"method.name": "fedkseed"}},
        on_event=said.append,
    )
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def call(work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(10)

    fleet = socket.create_server(("127.0.0.1", 0))
    streams = private_runtime_folder(f"test-{os.getpid()}")
    front = Front(fleet.getsockname()[1], call(desk.open()), streams, said.append)
    call(front.open("127.0.0.1", 0))
    desk.said, desk.members, desk.files, desk.fleet, desk.streams = said, members, files, fleet, streams
    desk.port, desk.front = front._server.sockets[0].getsockname()[1], front
    yield desk
    call(front.close())
    call(desk.close())
    loop.call_soon_threadsafe(loop.stop)
    fleet.close()
    remove_folder(streams)


def token_for(desk, name, lifetime=60.0):
    secret, expires = desk.members.invite(name, lifetime)
    return JoinToken(f"localhost:{desk.port}", name, authority_hash(desk.files.authority.read_text()), secret, expires)


def membership(token):
    return Membership(token.name, token.address, "/data/notes.jsonl")


@given(
    st.from_regex(r"([a-z0-9][a-z0-9.-]{0,30}|\[[0-9a-f:]{2,39}\]):[0-9]{1,5}", fullmatch=True),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", fullmatch=True),
    st.binary(min_size=16, max_size=16),
    st.integers(0, 2**32 - 1),
)
def test_a_token_comes_back_as_it_was(address, name, secret, expires):
    token = JoinToken(address, name, bytes(32), secret, expires)
    assert decode_token(token.encode()) == token


def forged(name, address):
    """A token with a good check sum that `fedtune nodes invite` would never print."""
    token = object.__new__(JoinToken)
    fields = {"name": name, "address": address, "authority": bytes(32), "secret": SECRET, "expires": 2_000_000_000}
    token.__dict__.update(fields)
    return JoinToken.encode(token)


@pytest.mark.parametrize(
    ("name", "address"),
    [
        ("../../PLANTED/ok", "host:9092"),
        ("a\n[Service]\nExecStartPre=/bin/sh", "host:9092"),
        ("-rf", "host:9092"),
        ("", "host:9092"),
        ("alice", "../../PLANTED:9092"),
        ("alice", "host:9092\nExecStartPre=/bin/sh"),
        ("alice", "[/x]:9092"),
        ("alice", "\x1b[2K:9092"),
    ],
)
def test_a_token_whose_name_could_be_a_path_or_a_line_is_refused_by_both_sides(name, address, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDTUNE_HOME", str(tmp_path / "home"))
    data = tmp_path / "notes.jsonl"
    data.write_text('{"text": "a"}\n')
    with pytest.raises((LinkError, ProtocolError)):
        JoinToken(address, name, bytes(32), SECRET, 2_000_000_000)
    said = CliRunner().invoke(app, ["join", "-", "--data", str(data), "--yes"], input=forged(name, address) + "\n")
    assert said.exit_code in (LinkError.exit_code, ProtocolError.exit_code)
    assert said.stderr.count("\n") == 1 and said.stderr.strip().isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.jsonl"]


def test_a_token_cut_or_changed_is_refused_and_never_quoted():
    word = JoinToken("host:9092", "alice", bytes(32), SECRET, 2_000_000_000).encode()
    assert decode_token(f"  {word[:30]}\n{word[30:]} ").name == "alice"
    for broken in (
        word[:-1],
        word[:40] + ("A" if word[40] != "A" else "B") + word[41:],
        word + "AAAA",
        "fedtune1-",
        "x",
    ):
        with pytest.raises(LinkError) as error:
            decode_token(broken)
        assert broken == "x" or broken not in str(error.value)


def test_a_secret_is_in_no_representation():
    token = JoinToken("host:9092", "alice", bytes(32), SECRET, 1)
    assert SECRET.hex() not in repr(token) and repr(SECRET) not in repr(token)
    with pytest.raises(LinkError, match=r"expired 2\.0 hours"):
        token.check_time(now=7201)


def test_a_secret_works_once_for_one_key(tmp_path):
    members = Members(tmp_path)
    keys = [node_key(tmp_path / name, "key").public.read_text().strip() for name in ("one", "two")]
    secret, expires = members.invite("alice", 60)
    first = members.apply(secret, keys[0], approval=False)
    assert first.state == "approved" and members.apply(secret, keys[0], approval=False) == first
    with pytest.raises(LinkError, match="used already, with another key"):
        members.apply(secret, keys[1], approval=False)
    with pytest.raises(LinkError, match="does not know"):
        members.apply(SECRET, keys[1], approval=False)
    with pytest.raises(NodesError, match="has joined"):
        members.invite("alice", 60)
    secret, expires = members.invite("bob", 60)
    with pytest.raises(LinkError, match="expired"):
        members.apply(secret, keys[1], approval=False, now=expires + 1)
    newer, _ = members.invite("bob", 60)
    with pytest.raises(LinkError, match="does not know"):
        members.apply(secret, keys[1], approval=False)
    with pytest.raises(LinkError, match="not an elliptic-curve key"):
        members.apply(newer, "ssh-ed25519 AAAA", approval=False)
    assert members.apply(newer, keys[1], approval=True).state == "waiting"
    assert secret.hex() not in (tmp_path / "members.json").read_text()


@pytest.mark.parametrize("name", ["", "-x", "a/b", 'q"', "a" * 64, "a b"])
def test_names_that_are_no_plain_words_are_refused(tmp_path, name):
    with pytest.raises(ConfigError, match="node name"):
        Members(tmp_path).invite(name, 60)


def test_a_node_joins_and_leaves(desk, monkeypatch):
    token = token_for(desk, "alice")
    authority, server = fetch_server_info(token)
    assert server["offer"]["settings"] == {"method.name": "fedkseed"}
    mine = register(token, authority, membership(token))
    assert memberships() == [mine] == [find_membership("alice")]
    # The key that was registered is the public half of the one that this machine made; the private half is here alone.
    assert FakeControl.registered["alice"] == (mine.folder / "key.pub").read_text().strip()
    assert desk.members.get("alice").state == "member" and mine.key.stat().st_mode & 0o77 == 0
    # A reply lost on the way is asked for again, with the same answer.
    ask, lost = joining.ask, []

    def lossy(*request):
        answer = ask(*request)
        if not lost:
            lost.append(answer)
            raise joining.UnreachableError("no answer")
        return answer

    monkeypatch.setattr(joining, "ask", lossy)
    assert register(token, authority, mine) == mine and lost[0]["state"] == "member"
    unregister(mine)
    assert desk.members.get("alice").state == "left" and not mine.folder.exists()
    assert FakeControl.registered[1001] is None
    with pytest.raises(ConfigError, match="has joined no such federation"):
        find_membership(None)
    secrets = (token.encode(), token.secret.hex())
    assert not any(secret in line for line in desk.said for secret in secrets)
    assert [line.split()[1] for line in desk.said] == ["joined", "left"]


def test_a_node_waits_for_approval(desk, monkeypatch):
    desk._approval = True
    monkeypatch.setattr(joining, "APPROVAL_PAUSE", 0.05)
    token = token_for(desk, "alice")
    authority, _ = fetch_server_info(token)
    shown = []

    def approve(key):
        assert desk.members.get("alice").fingerprint == key and not FakeControl.registered
        shown.append(key)
        desk.members.change("alice", "approved", expected=("waiting",))

    register(token, authority, membership(token), approve)
    assert len(shown) == 1 and desk.members.get("alice").state == "member"


def test_a_server_that_did_not_make_the_token_gets_no_secret(desk, monkeypatch):
    token = replace(token_for(desk, "alice"), authority=bytes(32))
    sent = []
    ask = joining.ask
    monkeypatch.setattr(joining, "ask", lambda *request: sent.append(request[1]) or ask(*request))
    with pytest.raises(LinkError, match="not the server that made this token"):
        fetch_server_info(token)
    assert sent == [{"do": "hello"}]


def silent(desk, count, host):
    """Connections from an address of this machine that say hello to the desk, and nothing more."""
    opened, hello = [], hello_of([JOIN])
    for _ in range(count):
        one = socket.create_connection(("127.0.0.1", desk.port), 10, source_address=(host, 0))
        one.sendall(hello)
        opened.append(one)
    return opened


def ended(link):
    link.settimeout(30)
    with contextlib.suppress(ConnectionResetError):
        while link.recv(4096):
            pass
    return True


def test_two_thousand_silent_connections_keep_no_joiner_out_and_are_hung_up_on(desk):
    assert room_for(4096) >= 1024
    token = token_for(desk, "alice")
    opened = silent(desk, 2000, "127.0.0.2")
    assert len(desk.front._places) <= 1024, "an address has a quarter of all places"
    register(token, fetch_server_info(token)[0], membership(token))
    assert desk.members.get("alice").state == "member"
    assert all(ended(one) for one in opened)


def test_who_has_said_nothing_makes_way_also_for_one_from_the_same_address(desk):
    desk.front._most, desk.front._share = 8, 2
    opened = silent(desk, 8, "127.0.0.1")
    token = token_for(desk, "alice")
    register(token, fetch_server_info(token)[0], membership(token))
    assert sum(ended(one) for one in opened[:6]) == 6


def test_a_full_port_says_so_once(desk):
    desk.front._most = 1
    context = ssl.create_default_context(cafile=desk.files.authority)
    context.set_alpn_protocols([JOIN])
    with (
        socket.create_connection(("127.0.0.1", desk.port), 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as link,
    ):
        link.sendall(b"{")  # it has a place, and has not asked yet
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", desk.port), 10) as late:
                assert ended(late)
    assert [line for line in desk.said if "all are taken" in line and "--connections" in line] == desk.said


def test_where_all_places_are_taken_the_address_with_most_gives_one_to_another(desk):
    """Four addresses that complete TLS, and keep talking, could hold all places: they keep no joiner out."""
    desk.front._most, desk.front._share = 8, 4
    context = ssl.create_default_context(cafile=desk.files.authority)
    context.set_alpn_protocols([JOIN])
    token = token_for(desk, "alice")
    authority = fetch_server_info(token)[0]
    with contextlib.ExitStack() as stack:
        for host in ("127.0.0.2", "127.0.0.3"):
            for _ in range(4):
                plain = socket.create_connection(("127.0.0.1", desk.port), 10, source_address=(host, 0))
                link = stack.enter_context(context.wrap_socket(stack.enter_context(plain), server_hostname="localhost"))
                link.sendall(b"{")
        register(token, authority, membership(token))
    assert desk.members.get("alice").state == "member"


def test_sixteen_who_ask_nothing_delay_nobody(desk):
    """A request is answered when it is there; who has a connection and is silent takes no turn."""
    context = ssl.create_default_context(cafile=desk.files.authority)
    context.set_alpn_protocols([JOIN])
    with contextlib.ExitStack() as stack:
        for _ in range(20):
            plain = stack.enter_context(socket.create_connection(("127.0.0.1", desk.port), 10))
            stack.enter_context(context.wrap_socket(plain, server_hostname="localhost"))
        token, start = token_for(desk, "alice"), time.monotonic()
        fetch_server_info(token)
        assert time.monotonic() - start < PATIENCE / 2


def test_leaving_gets_one_answer_whether_the_name_is_known_or_not(desk):
    token = token_for(desk, "alice")
    register(token, fetch_server_info(token)[0], membership(token))
    forged = base64.b64encode(b"x").decode()
    said = [
        desk.answer(json.dumps({"do": "leave", "name": name, "time": int(time.time()), "signature": forged}).encode())
        for name in ("alice", "nobody", "../x")
    ]
    assert said[0] == said[1] == said[2] and "alice" not in str(said)


def test_a_revoked_node_that_is_invited_again_joins_with_another_key(desk):
    keys = []
    for _ in range(3):
        token = token_for(desk, "alice")
        mine = register(token, fetch_server_info(token)[0], membership(token))
        keys.append((mine.folder / "key.pub").read_text())
        assert register(token, desk.files.authority.read_text(), mine) == mine, "asking again changes nothing"
        assert (mine.folder / "key.pub").read_text() == keys[-1] and is_redeemed(mine, token)
        revoke(desk.members, desk._control, "alice")
        assert desk._control.registered_keys() == {}
    assert len(set(keys)) == 3


class Killed(BaseException):
    """Stands for kill -9."""


def approved(desk, tmp_path, name):
    """A member whose key is about to be registered."""
    key = node_key(tmp_path / "keys-of-nodes", name).public.read_text().strip()
    return desk.members.apply(desk.members.invite(name, 60)[0], key, approval=False)


def test_a_server_killed_between_flower_s_list_and_ours_knows_its_member_at_the_next_start(desk, tmp_path, monkeypatch):
    member = approved(desk, tmp_path, "alice")
    change = Members.change

    def killed(*_, **__):
        raise Killed

    monkeypatch.setattr(Members, "change", killed)
    with pytest.raises(Killed):
        admit(desk.members, member, desk._register, desk._control.unregister)
    monkeypatch.setattr(Members, "change", change)
    assert desk.members.get("alice").state == "approved"
    desk.reconcile()
    found = desk.members.get("alice")
    assert found.state == "member" and desk._control.registered_keys() == {key_words(member.public_key): found.node_id}
    desk.reconcile()
    assert desk.members.get("alice") == found, "once is enough"


def test_a_node_that_is_revoked_while_its_key_is_registered_stays_out(desk, tmp_path):
    member = approved(desk, tmp_path, "alice")

    def slow(key, name):
        node_id = desk._register(key, name)
        revoke(desk.members, desk._control, name)
        return node_id

    with pytest.raises(NodesError, match="revoked"):
        admit(desk.members, member, slow, desk._control.unregister)
    assert desk._control.registered_keys() == {} and desk.members.get("alice").state == "revoked"


def test_at_each_start_both_lists_become_equal(desk, tmp_path):
    """Revoked and then killed; known to Flower alone; known to us alone, as after a lost database."""
    for name in ("alice", "bob"):
        admit(desk.members, approved(desk, tmp_path, name), desk._register, desk._control.unregister)
    desk.members.change("alice", "revoked", expected=("member",))
    desk._control.register(node_key(tmp_path, "stray").public, "stray")
    desk.reconcile()
    bob = desk.members.get("bob")
    assert desk._control.registered_keys() == {key_words(bob.public_key): bob.node_id}
    FakeControl.registered.clear()
    desk.reconcile()
    bob = desk.members.get("bob")
    assert bob.state == "member" and desk._control.registered_keys() == {key_words(bob.public_key): bob.node_id}


def test_strangers_learn_nothing_and_cannot_end_memberships(desk, tmp_path):
    authority = desk.files.authority.read_text()
    address = f"localhost:{desk.port}"
    assert joining.ask(address, {"do": "hello", "secret": SECRET.hex()}, authority)["offer"] == {}
    token = token_for(desk, "alice")
    mine = register(token, authority, membership(token))
    stranger = node_key(tmp_path, "stranger").private
    stranger.replace(mine.key)
    with pytest.raises(LinkError, match="only the holder of a member's key"):
        unregister(mine)
    assert mine.folder.exists() and desk.members.get("alice").state == "member"
    for request in ({}, {"do": "join"}, {"do": "join", "secret": 1, "public_key": ""}, {"do": "leave", "name": "x"}):
        with pytest.raises((ProtocolError, NodesError)):
            joining.ask(address, request, authority)


@pytest.mark.parametrize("line", [b"", b"[]", b"\xff", b"{", b'{"do": "join", "secret": "zz", "public_key": ""}'])
def test_nonsense_is_answered_with_one_line(desk, line):
    answer = desk.answer(line)
    assert answer["error"] == ProtocolError.exit_code and "\n" not in answer["message"]


def test_an_old_leave_cannot_be_played_again(desk):
    token = token_for(desk, "alice")
    register(token, fetch_server_info(token)[0], membership(token))
    old = {
        "do": "leave",
        "name": "alice",
        "time": int(time.time()) - 3600,
        "signature": base64.b64encode(b"x").decode(),
    }
    assert "clocks" in desk.answer(json.dumps(old).encode())["message"]


def hello_of(alpn, name="localhost"):
    """The first bytes of a TLS client."""
    context = ssl.create_default_context()
    if alpn:
        context.set_alpn_protocols(alpn)
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize("alpn", [[], ["h2"], [JOIN], ["http/1.1", JOIN, "h2"]])
def test_the_protocols_of_a_client_are_read(alpn):
    hello = hello_of(alpn)
    assert protocols(hello) == alpn and server_name(hello) == "localhost"
    with pytest.raises(ValueError, match="no client hello"):
        protocols(b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00")


@given(st.binary(max_size=300))
def test_no_bytes_break_the_reader(noise):
    with contextlib.suppress(ValueError):
        assert isinstance(protocols(noise), list) and isinstance(server_name(noise), str)


def test_a_stream_is_found_by_its_name_and_by_no_other(desk):
    name = new_name()
    with socket.socket(socket.AF_UNIX) as stream:
        stream.bind(str(socket_of(desk.streams, name)))
        stream.listen()
        stream.settimeout(5)
        for asked, found in [(name, True), (new_name(), False)]:
            with socket.create_connection(("127.0.0.1", desk.port)) as node:
                node.settimeout(5)
                node.sendall(hello_of(["h2"], asked))
                if found:
                    arrived, _ = stream.accept()
                    with arrived:
                        assert server_name(arrived.recv(4096)) == name
                else:
                    with pytest.raises(ConnectionResetError):
                        node.recv(100)
    assert socket_of(desk.streams, "../../etc/passwd") is socket_of(desk.streams, "localhost") is None


def test_a_node_waits_for_a_superlink_that_is_started_again_and_is_not_told_that_tls_failed(desk, monkeypatch):
    """Flower's SuperNode gives up for ever at an end in the middle of the handshake; after a reset it tries again."""
    address, hello = desk.fleet.getsockname(), hello_of(["http/1.1"])
    desk.fleet.close()
    with socket.create_connection(("127.0.0.1", desk.port)) as node:
        node.sendall(hello)
        time.sleep(0.1)
        with socket.create_server(address) as again:
            again.settimeout(5)
            arrived, _ = again.accept()
            with arrived:
                assert arrived.recv(4096) == hello
    monkeypatch.setattr("deploy.operator.alpn_router.RESTART_SECONDS", 0.1)
    with socket.create_connection(("127.0.0.1", desk.port)) as node:
        node.sendall(hello)
        node.settimeout(5)
        with pytest.raises(ConnectionResetError):
            node.recv(100)


def test_the_port_shows_nodes_to_the_fleet_and_nobody_else(desk):
    with socket.create_connection(("127.0.0.1", desk.port)) as node:
        hello = hello_of(["h2"])
        node.sendall(hello[:7])
        time.sleep(0.05)
        node.sendall(hello[7:])
        desk.fleet.settimeout(5)
        arrived, _ = desk.fleet.accept()
        with arrived:
            got = b""
            while len(got) < len(hello):
                got += arrived.recv(4096)
            assert got == hello
    for noise in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", desk.port)) as stranger:
            stranger.settimeout(5)
            stranger.sendall(noise)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(100) == b""
    assert any("speaks no TLS" in line for line in desk.said)
