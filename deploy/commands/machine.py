"""``fedtune version``."""

from __future__ import annotations

import platform
from importlib.metadata import version as installed_version

from deploy.commands.output import Format, FormatOption, console, show


def version(form: FormatOption = Format.text) -> None:
    """Show the versions that decide whether two machines can work together."""
    facts = {name: installed_version(name) for name in ("fedtune", "flwr", "torch", "transformers", "grpcio")}
    facts["python"] = platform.python_version()

    def as_text() -> None:
        for name, number in facts.items():
            console.print(f"{name:13}{number}")

    show(facts, form, as_text)
