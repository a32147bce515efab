"""Who may take part: invited by a token, waiting for the operator, a member with its key, or revoked."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from filelock import FileLock

from deploy.common.paths import private_folder, write_json
from fedtune_strategies.errors import ConfigError, LinkError, NodesError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
GONE = ("left", "revoked")
CURVES = ("secp256r1", "secp384r1", "secp521r1")


@dataclass(frozen=True)
class Member:
    """One node, as the operator knows it."""

    name: str
    # ``invited``, ``waiting`` (for approval), ``approved`` (its key is being registered), ``member``, ``left`` by its
    # own wish, or ``revoked``
    state: str
    secret_hash: str  # SHA-256 of the registration secret; the secret itself is kept nowhere
    expires: int  # when the token expires, seconds since the epoch
    public_key: str = ""  # OpenSSH public key, once the node has sent it
    node_id: int = 0  # Flower's id, once the key is registered

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the public key as people compare it: ``ab12 cd34 …``, 80 bits of it."""
        return key_fingerprint(self.public_key) if self.public_key else ""


class Members:
    """The members of a federation, in one file; every change is one locked transaction.

    `folder`: folder of the server's state.
    """

    def __init__(self, folder: Path) -> None:
        self._file = private_folder(folder) / "members.json"
        self._lock = FileLock(folder / "members.lock")

    def all(self) -> dict[str, Member]:
        """Every member by name."""
        if not self._file.exists():
            return {}
        return {name: Member(**facts) for name, facts in json.loads(self._file.read_text()).items()}

    def get(self, name: str) -> Member:
        """One member."""
        members = self.all()
        if name not in members:
            raise NodesError(f"no node {name!r}: `fedtune nodes` lists {', '.join(members) or 'none yet'}")
        return members[name]

    def knows(self, secret: bytes) -> bool:
        """Whether this secret was given out and not revoked."""
        return any(
            secrets.compare_digest(member.secret_hash, _hash(secret)) and member.state not in GONE
            for member in self.all().values()
        )

    def invite(self, name: str, lifetime: float) -> tuple[bytes, int]:
        """Make a registration secret for a name, and say when it expires; an earlier one of that name is void."""
        if not NAME.fullmatch(name):
            raise ConfigError(f"node name {name!r}: use letters, digits, dots, hyphens and underscores, at most 63")
        secret, expires = secrets.token_bytes(16), int(time.time() + lifetime)
        with self._changing() as members:
            if name in members and members[name].public_key and members[name].state not in GONE:
                raise NodesError(
                    f"node {name!r} has joined: `fedtune nodes revoke {name}` first, or choose another name"
                )
            members[name] = Member(name, "invited", _hash(secret), expires)
        return secret, expires

    def apply(self, secret: bytes, public_key: str, *, approval: bool, now: float | None = None) -> Member:
        """Take up a node's key under a secret. Asking again with the same key gives the same answer."""
        _check_key(public_key)
        with self._changing() as members:
            known = [member for member in members.values() if secrets.compare_digest(member.secret_hash, _hash(secret))]
            if not known or known[0].state in GONE:
                raise LinkError("the server does not know this join token (any more): ask the operator for another")
            member = known[0]
            if member.public_key and member.public_key != public_key:
                raise LinkError(
                    "this join token was used already, with another key: ask the operator for another, and tell them "
                    "if it was not you"
                )
            if not member.public_key:
                if (time.time() if now is None else now) > member.expires:
                    raise LinkError("this join token has expired: ask the operator for another")
                member = replace(member, public_key=public_key, state="waiting" if approval else "approved")
                members[member.name] = member
        return member

    def change(
        self, name: str, state: str, *, expected: tuple[str, ...], node_id: int | None = None, key: str = ""
    ) -> Member:
        """Move a member from an expected state to another; only while it has this key, where one is given."""
        with self._changing() as members:
            if name not in members or members[name].state not in expected or key not in ("", members[name].public_key):
                found = members[name].state if name in members else "unknown"
                raise NodesError(f"node {name!r} is {found}, not {' or '.join(expected)}: see `fedtune nodes`")
            member = replace(members[name], state=state)
            members[name] = member if node_id is None else replace(member, node_id=node_id)
        return members[name]

    @contextmanager
    def _changing(self) -> Iterator[dict[str, Member]]:
        with self._lock:
            members = self.all()
            yield members
            write_json(self._file, {name: asdict(member) for name, member in members.items()})


def key_fingerprint(public_key: str) -> str:
    """The first 80 bits of a key's SHA-256, in groups of four characters: short enough to be read out."""
    digest = hashlib.sha256(" ".join(public_key.split()[:2]).encode()).hexdigest()[:20]
    return " ".join(digest[i : i + 4] for i in range(0, 20, 4))


def admit(
    members: Members, member: Member, register: Callable[[str, str], int], unregister: Callable[[int], object]
) -> Member:
    """Register an approved member's key with the SuperLink; take it back if the member was revoked meanwhile.

    `register` takes key and name and gives Flower's id; registering again gives the same.
    """
    if member.state != "approved":
        return member
    node_id = register(member.public_key, member.name)
    try:
        return members.change(
            member.name, "member", expected=("approved", "member"), node_id=node_id, key=member.public_key
        )
    except NodesError:
        unregister(node_id)
        raise


def _hash(secret: bytes) -> str:
    return hashlib.sha256(secret).hexdigest()


def _check_key(public_key: str) -> None:
    try:
        key = load_ssh_public_key(public_key.encode())
    except (ValueError, UnicodeEncodeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise LinkError(
            "the node's public key is not an elliptic-curve key on a NIST curve: let `fedtune join` make it"
        )
