"""The Flower app of this installation, as the folder that ``flwr run`` wants: a project file and nothing else.

The code of ServerApp and ClientApp comes from what is installed on each machine, never from the app's bundle, so a
checkout is not needed to submit a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from fedtune_strategies.config import Scalar
from fedtune_strategies.run_config import as_toml, defaults


def write_app(folder: Path, settings: Mapping[str, Scalar]) -> Path:
    """Write the app's ``pyproject.toml`` for a run into a folder; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pyproject.toml").write_text(
        f"""[project]
name = "fedtune"
version = "{version("fedtune")}"
description = "The FedTune app; its code is what is installed"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "fedtune"

[tool.flwr.app.components]
serverapp = "server_app.app:app"
clientapp = "client_app.app:app"

[tool.flwr.app.config]
{as_toml(defaults(str(settings.get("method.name", "")), settings))}""",
        encoding="utf-8",
    )
    return folder
