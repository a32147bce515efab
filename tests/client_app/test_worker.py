"""The resident worker as real processes, beside a process that stands for the SuperNode."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import psutil
import pytest
import torch

from client_app import worker, worker_client
from client_app.worker_client import WorkerSpec, ask_worker, running_worker, runtime_folder
from fedtune_strategies.errors import DataError, LinkError, ResourceError
from fedtune_strategies.fedkseed.messages import SeedTask
from fedtune_strategies.fedkseed.packing import pack
from fedtune_strategies.folders import make_folder, remove_folder
from fedtune_strategies.protocol import messages as protocol
from tests.conftest import write_rows

NODE_ID = 1
HELLO = ("hello", protocol.encode(protocol.Hello(protocol.PROTOCOL_VERSION, "abcd")))


@pytest.fixture
def host(monkeypatch, tmp_path):
    """A process that stands for the SuperNode."""
    # Unix sockets have short names, shorter than pytest's folders.
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"/tmp/fedtune-test-{tmp_path.name[-8:]}-{psutil.Process().pid}")
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    monkeypatch.setattr(worker_client, "_host_process", lambda: psutil.Process(process.pid))
    yield process
    process.kill()
    process.wait()
    wait_until(lambda: not list(Path(worker_client.os.environ["XDG_RUNTIME_DIR"]).glob("*/*")))


@pytest.fixture
def spec(settings, tmp_path):
    own = {"name": "node-0", "data": str(write_rows(tmp_path / "data.jsonl", 9)), "folder": str(tmp_path / "own")}
    return WorkerSpec(settings, own, NODE_ID)


def wait_until(condition, seconds=15):
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, "waited too long"
        time.sleep(0.05)


def ask(spec, kind=HELLO[0], payload=HELLO[1], timeout=60):
    return protocol.decode(*ask_worker(spec, kind, payload, timeout))


def gone(process):
    # A worker that this process started stays a zombie until it is waited for.
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def worker_of(host):
    return running_worker(runtime_folder(psutil.Process(host.pid), NODE_ID))[0]


def test_life_of_a_worker(host, spec, tmp_path):
    root = runtime_folder(psutil.Process(host.pid), NODE_ID).parent
    stale, strange = root / "999999999-1234567890", root / "999999998-1234567890"
    # The second as another release might name it, of a process that is there.
    other_release = make_folder(root / f"{os.getpid()}-1")
    make_folder(stale)
    (stale / "spec.json").write_text("{}")
    strange.mkdir(exist_ok=True)
    reply = ask(spec)
    assert (reply.node, reply.num_examples) == ("node-0", 9)
    assert not stale.exists(), "what a SuperNode that is gone left behind stays for ever"
    assert strange.exists() and other_release.exists(), "a folder without our mark, or whose owner lives, was removed"
    strange.rmdir()
    remove_folder(other_release)
    first = worker_of(host)
    folder = runtime_folder(psutil.Process(host.pid), NODE_ID)
    assert folder.stat().st_mode & 0o777 == 0o700
    beside = runtime_folder(psutil.Process(host.pid), NODE_ID + 1)
    assert beside != folder, "two nodes under one process end each other's worker"
    remove_folder(beside)

    # It stays for the next task, and the answer comes without a new start.
    start = time.monotonic()
    ask(spec)
    assert worker_of(host).pid == first.pid and time.monotonic() - start < 5

    # Killed, it is replaced; another configuration, and it is replaced too.
    first.kill()
    assert ask(spec).num_examples == 9
    second = worker_of(host)
    assert second.pid != first.pid
    other = replace(spec, run_config=spec.run_config | {"train.seed": 5})
    ask(other)
    third = worker_of(host)
    assert third.pid != second.pid
    wait_until(lambda: gone(second))

    # A task that takes too long ends it; nothing hangs.
    endless = replace(other, run_config=other.run_config | {"train.local-steps": 100_000})
    nothing = torch.empty(0, dtype=torch.uint8)
    change = pack(np.zeros(64, dtype=np.int32))
    task = SeedTask(1, 0, change, 2.0**-20, nothing, nothing.to(torch.int16), 1e-3, 1e-3, np.inf)
    ask(endless)
    third = worker_of(host)
    with pytest.raises(LinkError, match=r"round\.deadline"):
        ask(endless, task.kind, protocol.encode(task), timeout=1)
    wait_until(lambda: gone(third))

    # It ends with its SuperNode, even if that was killed.
    ask(spec)
    last = worker_of(host)
    host.kill()
    host.wait()
    wait_until(lambda: gone(last))
    wait_until(lambda: not folder.exists())


def test_bad_data_is_a_failure_and_mended_data_is_read(host, spec, tmp_path):
    data = Path(spec.node_config["data"])
    good = data.read_text()
    data.write_text(good + "{broken\n")
    failure = ask(spec)
    assert isinstance(failure, protocol.Failure)
    assert failure.exit_code == DataError.exit_code and "the line is in the node's log" in failure.message
    assert "broken" not in failure.message and str(data.parent) not in failure.message
    data.write_text(good)
    assert ask(spec).num_examples == 9
    # Foreign bytes are refused by the worker, which stays.
    failure = ask(spec, "seed-task", b"junk")
    assert isinstance(failure, protocol.Failure) and "damaged" in failure.message


def test_a_path_too_long_for_a_socket_is_one_line(host, spec, monkeypatch, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(ResourceError, match="shorter path"):
        patch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("long" * 20)))
        ask(spec)


def test_a_message_above_grpcs_limit_passes_between_messenger_and_worker_in_pieces(monkeypatch, tmp_path):
    limits = [("grpc.max_receive_message_length", 1500), ("grpc.max_send_message_length", 1500)]
    monkeypatch.setattr(worker_client, "PIECE_BYTES", 1000)

    class Echo:
        def do(self, kind, payload):
            return kind[::-1], payload[::-1]

    server = grpc.server(ThreadPoolExecutor(1), options=limits)
    server.add_generic_rpc_handlers((worker._handlers(Echo(), None),))
    server.add_insecure_port(f"unix:{tmp_path}/s")
    server.start()
    payload = bytes(range(256)) * 50
    with grpc.insecure_channel(f"unix:{tmp_path}/s", options=limits) as channel:
        do = channel.stream_stream(f"/{worker_client.SERVICE}/{worker_client.DO}")
        for sent in (payload, payload[:1000], b""):
            answer = worker_client.joined(do(worker_client.pieces("kind", sent), timeout=20))
            assert answer == ("dnik", sent[::-1])
    server.stop(None)


def test_the_messenger_imports_no_torch():
    code = "import sys, client_app.app; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
