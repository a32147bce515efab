import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from deploy.common.certificates import AUTHORITY_LIFETIME, SERVER_LIFETIME, node_key, server_files
from fedtune_strategies.errors import LinkError
from fedtune_strategies.folders import MARK


def handshake(files, server_name, authority=None):
    """One TLS handshake over a socket pair, verified as a node verifies it."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(files.certificate, files.key)
    client_context = ssl.create_default_context(cafile=authority or files.authority)
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    client_side, server_side = socket.socketpair()

    def serve():
        try:
            server_context.wrap_socket(server_side, server_side=True).close()
        except OSError:
            server_side.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client_context.wrap_socket(client_side, server_hostname=server_name) as connection:
            return connection.version()
    finally:
        thread.join(10)


@pytest.mark.parametrize("name", ["localhost", "127.0.0.1", "::1", "fleet.example.org", "10.0.0.7"])
def test_a_node_trusts_the_server_under_each_of_its_names(tmp_path, name):
    files = server_files(tmp_path, ["fleet.example.org", "10.0.0.7"])
    assert handshake(files, name) == "TLSv1.3"


def test_a_node_refuses_another_name_and_another_authority(tmp_path):
    files = server_files(tmp_path / "ours")
    other = server_files(tmp_path / "theirs")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(files, "elsewhere.example.org")
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(files, "localhost", authority=other.authority)


def test_only_the_owner_can_read_the_files(tmp_path):
    folder = tmp_path / "keys"
    server_files(folder)
    node_key(folder, "node-0")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    names = {"ca.crt", "ca.key", "server.crt", "server.key", "node-0", "node-0.pub", MARK}
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()} == dict.fromkeys(names, 0o600)


def test_files_are_reused(tmp_path):
    server_files(tmp_path, ["a.example.org"])
    node_key(tmp_path, "node-0")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    server_files(tmp_path, ["a.example.org"])
    server_files(tmp_path)
    node_key(tmp_path, "node-0")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_new_name_renews_the_certificate_and_keeps_the_old_names_and_the_authority(tmp_path):
    files = server_files(tmp_path, ["a.example.org"])
    authority = files.authority.read_bytes()
    files = server_files(tmp_path, ["b.example.org"])
    assert files.authority.read_bytes() == authority
    assert handshake(files, "a.example.org") == handshake(files, "b.example.org") == "TLSv1.3"


@pytest.mark.parametrize(
    ("lifetime", "file"), [(SERVER_LIFETIME, "server.crt"), (AUTHORITY_LIFETIME, "ca.crt")], ids=["server", "authority"]
)
def test_expired_is_refused_in_one_line_that_names_file_and_day(tmp_path, lifetime, file):
    server_files(tmp_path)
    later = datetime.now(UTC) + lifetime + timedelta(days=1)
    with pytest.raises(LinkError, match=f"{file} expired on 20") as caught:
        server_files(tmp_path, now=later)
    assert "\n" not in str(caught.value) and "remove" in str(caught.value)


def test_a_clock_that_is_behind_is_named(tmp_path):
    server_files(tmp_path)
    with pytest.raises(LinkError, match="check this machine's clock"):
        server_files(tmp_path, now=datetime.now(UTC) - timedelta(days=2))


@pytest.mark.parametrize("file", ["ca.crt", "server.crt"])
def test_damage_is_named(tmp_path, file):
    server_files(tmp_path)
    (tmp_path / file).write_bytes(b"-----BEGIN NOTHING-----")
    with pytest.raises(LinkError, match=f"{file} cannot be read"):
        server_files(tmp_path)


def test_a_certificate_of_another_authority_is_refused(tmp_path):
    server_files(tmp_path / "ours")
    theirs = server_files(tmp_path / "theirs")
    (tmp_path / "ours" / "server.crt").write_bytes(theirs.certificate.read_bytes())
    with pytest.raises(LinkError, match=r"not signed by the ca\.crt beside it"):
        server_files(tmp_path / "ours")


def test_node_keys_differ_and_are_nist_curves_in_openssh_format(tmp_path):
    pairs = [node_key(tmp_path, name) for name in ("node-0", "node-1")]
    privates = [load_ssh_private_key(pair.private.read_bytes(), None) for pair in pairs]
    assert all(isinstance(key.curve, ec.SECP384R1) for key in privates)
    publics = [load_ssh_public_key(pair.public.read_bytes()) for pair in pairs]
    assert [key.public_key() for key in privates] == publics
    assert publics[0] != publics[1]


def test_a_damaged_node_key_is_named(tmp_path):
    node_key(tmp_path, "node-0").private.write_text("not a key")
    with pytest.raises(LinkError, match="node-0 cannot be read"):
        node_key(tmp_path, "node-0")
