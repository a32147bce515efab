"""Everything that can be wrong on a device owner's machine, looked at one by one, with what to do about it."""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import psutil

from deploy.common.address import split_address
from deploy.common.checks import Check, check
from deploy.common.paths import home
from deploy.common.units import size
from deploy.owner.join import Membership, ask
from fedtune_strategies.config.node import NONE, NodeConfig
from fedtune_strategies.errors import ConfigError, LinkError, ResourceError, TermsError

PACKAGES = ("flwr", "torch", "transformers", "grpcio", "numba")
OPTIONAL = {"numba": "rebuilding the model will be slow: pip install numba"}
CLOCK = 60.0  # seconds by which clocks may differ
LEAST_DISK, LEAST_MEMORY = 2 * 10**9, 10**9


def examine(address: str, authority: str | None, own: NodeConfig) -> Iterator[Check]:
    """Look at everything, in the order in which it is best to fix; what is not given is not looked at.

    `authority` is the PEM certificate that the server's must descend from; None where it is not known yet.
    """
    yield check("python", _python)
    yield check("packages", _packages)
    yield check("memory", _memory)
    yield check("gpu", lambda: _gpu(own.device))
    yield check("disk", _disk)
    usable = ""
    if own.model:
        model = check("model", lambda: _model(own.model))
        yield model
        usable = own.model if model.ok else ""
    if own.data:
        yield check("data", lambda: _data(own, usable))
    if not address:
        return
    reached = check("address", lambda: _reach(address))
    yield reached
    if reached.ok:
        yield check("certificate", lambda: _certificate(address, authority))
        server = check("server", lambda: _server(address, authority))
        yield server
        if server.ok:
            yield check("clock", lambda: _clock(address, authority))


def examine_membership(membership: Membership) -> Iterator[Check]:
    """Look at a federation that this machine joined."""
    authority = membership.authority.read_text() if membership.authority.exists() else None
    yield from examine(membership.address, authority, membership.node_config())
    yield check("agreement", lambda: _agreement(membership))


def _agreement(membership: Membership) -> str:
    history = membership.history
    if waiting := history.waiting():
        raise TermsError(f"a run waits for you, {'; '.join(waiting['reasons'])}: `fedtune join --agree` shows it")
    terms = history.agreement(membership.node_config().terms).terms
    if terms.methods == NONE:
        return "to no run yet: you are asked when one begins"
    return f"{terms.methods}, {history.spent().replies} answers given"


def _python() -> str:
    return f"{sys.version.split()[0]}, {sys.executable}"


def _packages() -> str:
    found = [f"fedtune {version('fedtune')}"]
    for name in PACKAGES:
        try:
            have = version(name)
        except PackageNotFoundError:
            if name not in OPTIONAL:
                raise ConfigError(f"{name} is not installed: pip install fedtune again") from None
            found.append(f"no {name} ({OPTIONAL[name]})")
            continue
        found.append(f"{name} {have}")
    return ", ".join(found)


def _memory() -> str:
    free, total = psutil.virtual_memory().available, psutil.virtual_memory().total
    if free < LEAST_MEMORY:
        raise ResourceError(f"{size(free)} of {size(total)} are free, even small models need 1 GB: end other programs")
    return f"{size(free)} of {size(total)} free, {os.cpu_count()} cores"


def _gpu(device: str) -> str | None:
    import torch

    if not torch.cuda.is_available():
        if device.startswith("cuda"):
            raise ResourceError(
                f"torch sees no GPU, but the node's device is {device!r}: repair the driver, or take 'cpu'"
            )
        return None
    free, total = torch.cuda.mem_get_info(device if device.startswith("cuda") else 0)
    return f"{torch.cuda.get_device_name()}, {size(free)} of {size(total)} free"


def _disk() -> str:
    there = next(parent for parent in [home(), *home().absolute().parents] if parent.exists())
    free = shutil.disk_usage(there).free
    if free < LEAST_DISK:
        raise ResourceError(f"{size(free)} free in {there}: make room, or set FEDTUNE_HOME to another disk")
    return f"{size(free)} free in {there}"


def _data(own: NodeConfig, model: str) -> str:
    from deploy.owner.data import read_data

    return f"{own.data}: {read_data(own, model)[1]}"


def _model(model: str) -> str:
    from fedtune_strategies.language.model import check_model
    from fedtune_strategies.language.model_files import count_parameters, weight_files

    if model == "server":
        return "it comes from the server"
    folder, _ = check_model(model)
    return f"{model}: {count_parameters(weight_files(folder)) / 1e6:.1f} million parameters, {folder}"


def _reach(address: str) -> str:
    host, port = split_address(address)
    try:
        start = time.perf_counter()
        with socket.create_connection((host, port), 10.0) as link:
            return f"{address} answers after {1000 * (time.perf_counter() - start):.0f} ms ({link.getpeername()[0]})"
    except socket.gaierror:
        raise LinkError(f"no machine is called {host}: check the address, and DNS") from None
    except TimeoutError:
        raise LinkError(
            f"{address} is silent: a firewall on the way swallows TCP port {port}; ask for it to be opened"
        ) from None
    except OSError as error:
        raise LinkError(f"{address}: {error.strerror}: is the server running, and is this its port?") from None


def _certificate(address: str, authority: str | None) -> str | None:
    """Do what the SuperNode will do: TLS with the federation's authority and the server's name."""
    if authority is None:
        return None
    host, port = split_address(address)
    context = ssl.create_default_context(cadata=authority)
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host, port), 20.0) as plain,
            context.wrap_socket(plain, server_hostname=host) as link,
        ):
            expires = link.getpeercert()["notAfter"]  # type: ignore[index]
            return f"valid for {host} until {expires}, {link.version()}"
    except ssl.SSLCertVerificationError as error:
        raise LinkError(
            f"{error.verify_message}: if the operator made new certificates, ask for a new token; if it is not valid "
            "yet or expired, set this machine's clock"
        ) from None
    except OSError as error:
        raise LinkError(f"no TLS with {address} ({error}): is something else listening there, or in between?") from None


def _server(address: str, authority: str | None) -> str:
    facts = ask(address, {"do": "hello"}, authority)
    for name in ("fedtune", "flwr"):
        if facts[name] != version(name):
            raise LinkError(f"the server has {name} {facts[name]}, this machine {version(name)}: install the same")
    return f"a FedTune server of the same versions, fedtune {facts['fedtune']} on flwr {facts['flwr']}"


def _clock(address: str, authority: str | None) -> str:
    before = time.time()
    theirs = float(ask(address, {"do": "hello"}, authority)["time"])
    late = (before + time.time()) / 2 - theirs
    if abs(late) > CLOCK:
        raise LinkError(f"this clock is {late:+.0f} s off the server's: set it (certificates and tokens have dates)")
    return f"{abs(late):.1f} s off the server's"
