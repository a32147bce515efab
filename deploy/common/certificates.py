"""The keys of a federation: a certificate authority, the server's certificate, and one key pair per node.

The server proves itself to nodes by a TLS certificate that the authority signed; a node proves itself to the server by
an elliptic-curve key that the operator registered. Private keys never leave the folder that they are made in.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deploy.common.paths import private_folder, write_private
from fedtune_strategies.errors import LinkError

AUTHORITY_LIFETIME = timedelta(days=3650)
# The longest that common TLS clients accept.
SERVER_LIFETIME = timedelta(days=825)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class ServerFiles:
    """What a SuperLink needs for TLS; nodes get a copy of ``authority`` and of nothing else."""

    authority: Path
    certificate: Path
    key: Path


@dataclass(frozen=True)
class NodeKey:
    """A node's key pair in OpenSSH format; the operator registers ``public``."""

    private: Path
    public: Path


def server_files(folder: Path, names: Sequence[str] = (), now: datetime | None = None) -> ServerFiles:
    """Make, or reuse, a certificate authority and a server certificate that it signed.

    `folder`: gets ``ca.crt``, ``ca.key``, ``server.crt`` and ``server.key``; made with mode 0700, files with mode 0600.
    `names`: host names and IP addresses by which nodes reach the server. The loopback names are always included. A name
        that the present certificate lacks makes a new server certificate; nodes keep trusting it, as the authority
        stays.
    `now`: the time to judge validity by, with time zone; the clock by default.
    Raises `LinkError`: a certificate has expired, is not valid yet, is damaged, or its key is missing.
    """
    now = now or datetime.now(UTC)
    private_folder(folder)
    files = ServerFiles(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    authority_key = folder / "ca.key"
    if not files.authority.exists():
        _make_authority(files.authority, authority_key, now)
    authority = _load_certificate(files.authority, now, f"remove {folder}, then give every node the new ca.crt")
    wanted = {*LOOPBACK, *names}
    if files.certificate.exists() and files.key.exists():
        certificate = _load_certificate(files.certificate, now, "remove this file; nodes need nothing new")
        _check_signed(files.certificate, certificate, authority)
        if wanted <= _names(certificate):
            return files
        wanted |= _names(certificate)
    _make_server(files, authority, _load_key(authority_key), wanted, now)
    return files


def node_key(folder: Path, name: str) -> NodeKey:
    """Make, or reuse, a node's key pair (P-384) as ``folder/name`` and ``folder/name.pub``."""
    private_folder(folder)
    pair = NodeKey(folder / name, folder / f"{name}.pub")
    if pair.private.exists():
        key = _load_node_key(pair.private)
    else:
        key = ec.generate_private_key(ec.SECP384R1())
        write_private(pair.private, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    write_private(pair.public, key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + b"\n")
    return pair


def _make_authority(certificate: Path, key_file: Path, now: datetime) -> None:
    key = ec.generate_private_key(ec.SECP384R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedTune federation authority")])
    builder = (
        _certificate(name, name, key.public_key(), now, AUTHORITY_LIFETIME)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    write_private(key_file, _key_bytes(key))
    write_private(certificate, builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM))


def _make_server(
    files: ServerFiles,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    names: set[str],
    now: datetime,
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "FedTune SuperLink")])
    lifetime = min(SERVER_LIFETIME, authority.not_valid_after_utc - now)
    builder = (
        _certificate(subject, authority.subject, key.public_key(), now, lifetime)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_general_name(name) for name in sorted(names)]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()), critical=False)
    )
    write_private(files.key, _key_bytes(key))
    write_private(files.certificate, builder.sign(authority_key, hashes.SHA384()).public_bytes(Encoding.PEM))


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, now: datetime, lifetime: timedelta
) -> x509.CertificateBuilder:
    # Valid from a little earlier, for nodes whose clock is behind.
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + lifetime)
    )


def _usage(*granted: str) -> x509.KeyUsage:
    kinds = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"]
    kinds += ["key_cert_sign", "crl_sign", "encipher_only", "decipher_only"]
    return x509.KeyUsage(**{kind: kind in granted for kind in kinds})


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _names(certificate: x509.Certificate) -> set[str]:
    alternatives = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = alternatives.get_values_for_type(x509.IPAddress)
    return {*alternatives.get_values_for_type(x509.DNSName), *map(str, addresses)}


def _load_certificate(file: Path, now: datetime, remedy: str) -> x509.Certificate:
    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError) as error:
        raise LinkError(f"certificate {file} cannot be read ({error}): {remedy}") from error
    if now > certificate.not_valid_after_utc:
        raise LinkError(f"certificate {file} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: {remedy}")
    if now < certificate.not_valid_before_utc:
        starts = certificate.not_valid_before_utc
        raise LinkError(
            f"certificate {file} is valid from {starts:%Y-%m-%d %H:%M} UTC only: check this machine's clock"
        )
    return certificate


def _check_signed(file: Path, certificate: x509.Certificate, authority: x509.Certificate) -> None:
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception as error:
        raise LinkError(f"certificate {file} was not signed by the ca.crt beside it: remove server.crt") from error


def _load_key(file: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise LinkError(f"the authority's key {file} cannot be read ({error}): restore it from a backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise LinkError(f"the authority's key {file} is not an elliptic-curve key: restore it from a backup")
    return key


def _load_node_key(file: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_ssh_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError) as error:
        raise LinkError(f"node key {file} cannot be read ({error}): remove it and register the new one") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise LinkError(f"node key {file} is not an elliptic-curve key: remove it and register the new one")
    return key


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
