import os
import secrets
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from deploy.common import processes
from fedtune_strategies.errors import LinkError, PortError

# Leaves a detached grandchild behind: another session, another parent, nothing to find it by but its token.
FORGETFUL = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"], start_new_session=True)
print("started", flush=True)
time.sleep(float(sys.argv[1]))
"""

# A launcher that is killed before it can stop anything.
LAUNCHER = """
import os, signal, sys, time
from pathlib import Path
from deploy.common import processes
signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job would have ignored
token, log, forgetful = sys.argv[1:]
with processes.watchdog(token):
    processes.start([sys.executable, "-c", forgetful, "300"], {**os.environ, processes.TOKEN: token}, Path(log))
    time.sleep(300)
"""


@pytest.fixture
def token():
    token = secrets.token_hex(16)
    yield token
    for process in processes.marked(token):
        process.kill()


def gone(token, timeout=15.0):
    deadline = time.monotonic() + timeout
    while processes.marked(token) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes.marked(token)


def wait_for(condition, timeout=15.0):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_sweep_finds_detached_grandchildren_and_nobody_else(token, tmp_path):
    log = tmp_path / "log"
    mine = processes.start([sys.executable, "-c", FORGETFUL, "0"], {**os.environ, processes.TOKEN: token}, log)
    other = processes.start([sys.executable, "-c", "import time; time.sleep(300)"], {**os.environ}, tmp_path / "other")
    assert mine.wait(20) == 0
    (orphan,) = processes.marked(token)
    assert orphan.ppid() != os.getpid()
    processes.sweep(token)
    assert gone(token, 0) and not orphan.is_running()
    assert other.poll() is None
    processes.stop([other])
    assert other.returncode == -signal.SIGTERM


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_a_launcher(token, tmp_path, how):
    log = tmp_path / "log"
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, token, log, FORGETFUL], stderr=subprocess.DEVNULL)
    wait_for(lambda: log.exists() and b"started" in log.read_bytes() and len(processes.marked(token)) == 2)
    launcher.send_signal(how)
    launcher.wait(20)
    assert gone(token)


def test_stop_kills_what_does_not_listen(tmp_path):
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(300)"
    )
    log = tmp_path / "log"
    process = processes.start([sys.executable, "-c", deaf], {**os.environ}, log)
    wait_for(lambda: log.read_bytes())
    processes.stop([process, psutil.Process(process.pid)], patience=0.2)
    assert process.returncode == -signal.SIGKILL


def test_termination_unwinds_the_stack(tmp_path):
    code = (
        "import time\nfrom deploy.common.processes import termination_as_exit\n"
        "try:\n    with termination_as_exit():\n        print('in', flush=True); time.sleep(300)\n"
        "finally:\n    print('out', flush=True)"
    )
    log = tmp_path / "log"
    process = processes.start([sys.executable, "-c", code], {**os.environ}, log)
    wait_for(lambda: log.read_text() == "in\n")
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert log.read_text() == "in\nout\n"


def test_what_nohup_started_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with processes.termination_as_exit():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_port_in_use_is_named():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert processes.answers(port)
        with pytest.raises(PortError, match=f"127.0.0.1:{port} .*choose another"):
            processes.check_port("127.0.0.1", port)
    assert not processes.answers(port)
    processes.check_port("127.0.0.1", port)


def test_free_ports_can_be_bound_and_lie_below_outgoing_connections():
    ports = [processes.free_port() for _ in range(20)]
    assert all(20_000 <= port < 32_000 for port in ports)
    assert len(set(ports)) > 15
    for port in set(ports):
        processes.check_port("127.0.0.1", port)


def test_wait_until_gives_up_with_the_given_line():
    answers = iter([False, False, True])
    processes.wait_until(lambda: next(answers), 5.0, lambda: "never", pause=0.0)
    with pytest.raises(LinkError, match=r"^the node sleeps within 0 s$"):
        processes.wait_until(lambda: False, 0.0, lambda: "the node sleeps", pause=0.0)


def test_tail_is_one_line_without_colours(tmp_path):
    log = tmp_path / "log"
    assert processes.tail(log) == "(no log)"
    log.write_text("")
    assert processes.tail(log) == "(empty)"
    log.write_text("\n".join(["old", "one", "", "\x1b[92mtwo\x1b[0m   three", "four"]))
    assert processes.tail(log, 3) == "one / two three / four"


def test_a_long_log_is_moved_while_its_process_appends(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "LOG_BYTES", 5)
    log = tmp_path / "one.log"
    with log.open("ab", buffering=0) as stream:
        stream.write(b"before\n")
        processes.rotate(log)
        stream.write(b"now\n")
        processes.rotate(log)
    assert log.read_bytes() == b"now\n" and log.with_suffix(".previous").read_bytes() == b"before\n"
