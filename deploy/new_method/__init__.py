"""A new tuning method as its own package: strategy, node's side, tests; see docs/integrator.md."""

from __future__ import annotations

import keyword
import re
from importlib.resources import files
from pathlib import Path
from string import Template

from fedtune_strategies.errors import ConfigError, ResourceError
from fedtune_strategies.installed import installed_methods

# Template, and the name of the file that it becomes.
FILES = {"pyproject.txt": "pyproject.toml", "method.txt": "{name}.py", "test_method.txt": "test_{name}.py"}


def write_method(name: str, folder: Path) -> list[Path]:
    """Write the package of a method that takes local SGD steps, to be changed, into a new folder."""
    if not re.fullmatch("[a-z][a-z0-9]*", name) or keyword.iskeyword(name):
        raise ConfigError(f"{name!r} names no method: choose small letters and digits, a letter first")
    if name in installed_methods():
        raise ConfigError(f"a method '{name}' is installed already: choose another name")
    if folder.exists():
        raise ResourceError(f"{folder} is there already: choose another folder with --out")
    folder.mkdir(parents=True)
    written = []
    for template, file in FILES.items():
        text = Template((files("deploy.new_method") / template).read_text(encoding="utf-8"))
        path = folder / file.format(name=name)
        path.write_text(text.substitute(name=name, title=name.capitalize()), encoding="utf-8")
        written.append(path)
    return written
