"""``python -m deploy.flower.executor …``: Flower's executor, which starts the installed FedTune and nothing else.

It takes tasks with the secret that it shares with its SuperLink or SuperNode. A task's token goes to the task's process
by standard input: in its command, each account of the machine could read it, and answer in its place.
"""

from __future__ import annotations

import subprocess
import sys

from flwr.supercore.cli.flower_superexec import flower_superexec
from flwr.supercore.constant import TaskType
from flwr.supercore.superexec.executor import ExecutionSpec, LaunchResult

from deploy.flower.versions import replace
from fedtune_strategies.folders import keep_private

RUNS = {TaskType.SERVER_APP, TaskType.CLIENT_APP}


class InstalledApp:
    """Starts a process for each task; see Flower's ``Executor``."""

    def get_eligible_capacity(
        self, supported_task_types: set[TaskType], *, insecure: bool = False, root_certificates_path: str | None = None
    ) -> tuple[set[TaskType], set[str]]:
        """Take the tasks of ServerApps and ClientApps alone: agents and simulations would run what a bundle brings."""
        return supported_task_types & RUNS, set()

    def launch(self, spec: ExecutionSpec) -> LaunchResult:
        """Start a task."""
        quiet = subprocess.DEVNULL if spec.suppress_output else None
        command = [sys.executable, "-P", "-m", "deploy.flower.task", spec.task_type, spec.runtime_api_address]
        command += [str(spec.root_certificates_path), str(spec.parent_pid)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, text=True)
        assert process.stdin is not None
        with process.stdin as words:
            words.write(spec.token)
        return LaunchResult.accepted()

    def reconcile(self) -> None:
        """Nothing is kept between tasks."""

    def close(self) -> None:
        """Nothing is kept between tasks."""


if __name__ == "__main__":
    keep_private()
    replace("flwr.supercore.superexec.run_superexec", get_executor=lambda *_, **__: InstalledApp())
    flower_superexec()
