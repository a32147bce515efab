"""Which app bundles may run: FedTune's own app, and no file that could be executed."""

from __future__ import annotations

import io
import tomllib
import zipfile
import zlib

from fedtune_strategies.errors import ConfigError

COMPONENTS = {"serverapp": "server_app.app:app", "clientapp": "client_app.app:app"}
FILES = {"pyproject.toml", "LICENSE", ".info/CONTENT"}
DAMAGED = (zipfile.BadZipFile, zlib.error, KeyError, TypeError, ValueError, NotImplementedError, RuntimeError)
LARGEST = 1 << 20  # bytes, unpacked; ours has 10 kB


def check_bundle(content: bytes) -> None:
    """Look into an app bundle before anything of it is written.

    Raises `ConfigError`: it holds another file than a project file and its licence, or names another app.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as bundle:
            entries = bundle.infolist()
            names = [entry.filename for entry in entries]
            if foreign := sorted({*names} - FILES):
                raise ConfigError(
                    f"refused an app bundle that carries {foreign[0]!r}: only the FedTune that is installed here runs."
                )
            if len(names) > len({*names}) or sum(entry.file_size for entry in entries) > LARGEST:
                raise ConfigError("refused an app bundle that holds a file twice, or too much.")
            project = tomllib.loads(bundle.read("pyproject.toml").decode())
            app = project["tool"]["flwr"]["app"]
            named = (app["publisher"], project["project"]["name"], app["components"])
    except DAMAGED as error:
        raise ConfigError(f"refused an app bundle that cannot be read ({type(error).__name__}).") from None
    if named != ("fedtune", "fedtune", COMPONENTS):
        raise ConfigError("refused an app that is not FedTune's: only the FedTune that is installed here runs.")
