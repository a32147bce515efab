"""What the images do, without a container engine: their entry scripts, in their environment and folders."""

import json
import shutil
import signal
import subprocess
import time

import pytest

from deploy.common import processes
from tests.conftest import write_rows
from tests.deploy.test_deployment import DEPLOY, environment

pytestmark = [pytest.mark.network, pytest.mark.timeout(600)]
PATIENCE = 180


class Container:
    """An image's entry point as a process, with the image's environment and a volume."""

    def __init__(self, folder, dockerfile, **settings):
        self.home, self.log = folder / "volume", folder / "log"
        self.home.mkdir(parents=True, exist_ok=True)
        bin = folder / "bin"
        bin.mkdir(exist_ok=True)
        for script in DEPLOY.glob("docker/*.sh"):
            shutil.copy(script, bin)
        image = environment(DEPLOY / "docker" / dockerfile)
        path = f"{bin}:{processes.environment_path()}"
        quiet = {"HOME": str(self.home), "FEDTUNE_HOME": str(self.home), "PATH": path, "OMP_NUM_THREADS": "1"}
        self.environment = image | quiet | settings
        entry = dockerfile.partition(".")[0].partition("-")[0] + "-entry.sh"
        with self.log.open("ab") as log:
            command = [str(bin / entry)]
            self.process = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
            )

    def run(self, *command):
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=PATIENCE)
        return done.returncode, done.stdout

    def wait(self, ready):
        limit = time.monotonic() + PATIENCE
        while not ready():
            assert self.process.poll() is None and time.monotonic() < limit, self.log.read_text()[-2000:]
            time.sleep(0.5)

    def stop(self):
        """End it as a container engine does."""
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


@pytest.fixture
def started():
    running = []
    yield lambda *args, **settings: running.append(Container(*args, **settings)) or running[-1]
    for container in reversed(running):
        if container.process.poll() is None:
            container.stop()


def test_a_server_and_a_node_as_their_images_run_them(started, tmp_path):
    fleet, status = processes.free_port(), processes.free_port()
    address = {"FEDTUNE_ADDRESS": f"localhost:{fleet}", "FEDTUNE_STATUS": f"0.0.0.0:{status}"}
    server = started(tmp_path / "server", "server.Dockerfile", **address)
    healthy = shutil.copy(DEPLOY / "docker/server-healthy.py", tmp_path)
    server.wait(lambda: server.run("python", str(healthy))[0] == 0)
    token = json.loads(server.run("fedtune", "nodes", "invite", "alice", "--format", "json")[1])["alice"]

    secret = tmp_path / "token"
    secret.write_text(token + "\n")
    data = write_rows(tmp_path / "data.jsonl", 8)
    given = {"FEDTUNE_DATA": str(data), "FEDTUNE_TOKEN_FILE": str(secret)}
    node = started(tmp_path / "node", "node-cpu.Dockerfile", **given)
    node.wait(lambda: "connected" in node.log.read_text())
    node.stop()

    # The token worked once; what joined is on the volume.
    secret.unlink()
    before = len(node.log.read_text())
    again = started(tmp_path / "node", "node-cpu.Dockerfile", **given)
    again.wait(lambda: "takes part" in again.log.read_text()[before:])
    again.stop()
    server.stop()
    keys = (server.home / "server/status.token").read_text()
    for container in (server, node):
        assert token not in container.log.read_text() and keys not in container.log.read_text(), "a secret in a log"
    assert server.run("python", str(healthy))[0] != 0
