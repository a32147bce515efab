"""Network namespaces as separate machines: each has its own addresses and loopback, and reaches the server alone."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

from deploy.common import processes
from tests.deploy import bad_link

SERVER = "10.77.0.1"


def available():
    """Why namespaces cannot be had here; empty where they can."""
    if os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        return "network namespaces need root and /dev/net/tun"
    name = f"ft{os.getpid()}probe"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
    return "" if done.returncode == 0 else f"no network namespaces here: {done.stderr.strip()}"


class Machines:
    """A server and nodes; the last node is behind the bad link."""

    def __init__(self, folder, nodes, token):
        self.folder, self.nodes, self.token = folder, nodes, token
        self.names = {name: f"ft{os.getpid()}{number}" for number, name in enumerate(["server", *nodes])}

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            for name, space in self.names.items():
                (self.folder / name).mkdir(exist_ok=True)
                ip("netns", "add", space)
                stack.callback(ip, "netns", "del", space)
                self.ip(name, "link", "set", "lo", "up")
            self.ip("server", "addr", "add", f"{SERVER}/32", "dev", "lo")
            for number, name in enumerate(self.nodes[:-1], start=1):
                self._wire(name, number)
            link = subprocess.Popen(
                [sys.executable, bad_link.__file__, self.names[self.nodes[-1]], self.names["server"]],
                stdout=subprocess.PIPE,
            )
            stack.callback(link.wait)
            stack.callback(link.kill)
            assert link.stdout.readline() == b"up\n"
            stack.callback(link.stdout.close)
            self._bad_wire(self.nodes[-1])
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_):
        self._stack.close()

    def ip(self, name, *arguments):
        ip("-n", self.names[name], *arguments)

    def environment(self, name):
        """A machine's environment: a home of its own."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("FEDTUNE", "FLWR"))}
        return kept | {
            "HOME": str(self.folder / name),
            "PATH": processes.environment_path(),
            "OMP_NUM_THREADS": "1",
            "NUMBA_NUM_THREADS": "1",
            processes.TOKEN: self.token,
        }

    def command(self, name, line):
        return ["ip", "netns", "exec", self.names[name], "sh", "-ec", f"cd; exec {line}"]

    def start(self, name, line, log):
        """Start a command that stays."""
        return processes.start(self.command(name, line), self.environment(name), self.folder / log)

    def call(self, name, line, timeout=300):
        """Run a command to its end; returns its code, its output and its errors."""
        done = subprocess.run(
            self.command(name, line), env=self.environment(name), capture_output=True, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    def _wire(self, name, number):
        ours, theirs = f"n{number}", f"10.77.{number}."
        spaces = self.names["server"], self.names[name]
        ip(*f"link add {ours} netns {spaces[0]} type veth peer name eth0 netns {spaces[1]}".split())
        self.ip("server", "addr", "add", f"{theirs}1/24", "dev", ours)
        self.ip("server", "link", "set", ours, "up")
        self.ip(name, "addr", "add", f"{theirs}2/24", "dev", "eth0")
        self.ip(name, "link", "set", "eth0", "up")
        self.ip(name, "route", "add", "default", "via", f"{theirs}1")

    def _bad_wire(self, name):
        self.ip("server", "addr", "add", f"{bad_link.OUTSIDE}/24", "dev", "slow")
        self.ip("server", "link", "set", "slow", "up")
        self.ip(name, "addr", "add", f"{bad_link.INSIDE}/24", "dev", "slow")
        self.ip(name, "link", "set", "slow", "up")
        self.ip(name, "route", "add", "default", "dev", "slow")


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
