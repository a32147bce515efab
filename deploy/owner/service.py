"""A node as a systemd service of its user: it starts with the machine and is started again when it ends."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from deploy.common.join_token import check_address
from deploy.common.paths import home
from deploy.owner.join import Membership
from fedtune_strategies.errors import ConfigError
from fedtune_strategies.protocol.door import check_name

UNIT = """[Unit]
Description=FedTune node {name} at {address}
Wants=network-online.target
After=network-online.target

[Service]
ExecStart="{python}" -m deploy.cli join --name "{folder}"
Environment="FEDTUNE_HOME={home}"
Restart=always
RestartSec=5
# Nothing on this machine but FedTune's own folder is written.
NoNewPrivileges=true
ProtectSystem=strict
PrivateTmp=true
ReadWritePaths="{home}"

[Install]
WantedBy=default.target
"""


def unit_file(membership: Membership) -> Path:
    """Where the unit of a membership is."""
    check_name(membership.name)
    check_address(membership.address)
    config = Path(os.environ.get("XDG_CONFIG_HOME", "~/.config")).expanduser()
    return config / "systemd" / "user" / f"fedtune-{membership.folder.name}.service"


def install(membership: Membership) -> list[str]:
    """Write, enable and start the unit; returns lines for the user."""
    file, text = unit_file(membership), unit_text(membership)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    if not _systemctl("daemon-reload") or not _systemctl("enable", "--now", file.name):
        return [f"Wrote {file}.", f"Here no systemd answers; where one does: systemctl --user enable --now {file.name}"]
    return [
        f"Wrote and started {file}.",
        f"What it does: journalctl --user -u {file.name} -f",
        "To run it while you are not logged in: loginctl enable-linger",
    ]


def unit_text(membership: Membership) -> str:
    """The unit of a membership."""
    return UNIT.format(
        name=membership.name,
        address=membership.address,
        folder=membership.folder.name,
        python=_quoted(sys.executable),
        home=_quoted(str(home().resolve())),
    )


def _quoted(path: str) -> str:
    """Write a path as it stands between quotes in a unit."""
    if not path.isprintable():
        raise ConfigError(f"{path!r} cannot stand in a systemd unit: choose a FEDTUNE_HOME of printable characters")
    for special, written in (("\\", "\\\\"), ('"', '\\"'), ("%", "%%")):
        path = path.replace(special, written)
    return path


def remove(membership: Membership) -> None:
    """Stop and remove the unit, where there is one."""
    file = unit_file(membership)
    if file.exists():
        _systemctl("disable", "--now", file.name)
        file.unlink()
        _systemctl("daemon-reload")


def _systemctl(*arguments: str) -> bool:
    if not shutil.which("systemctl"):
        return False
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = ["systemctl", "--user", *arguments]
        return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
    return False
