"""Look for known vulnerabilities in the versions of constraints.txt by pip-audit, where its database can be reached.

Exits with pip-audit's code if it finds one that `.ci/advisories` does not list; one line, and 0, without the database.
"""

import json
import subprocess
import sys
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / ".venv" / "audit"  # an environment of its own: what audits FedTune is no part of it
KNOWN = "https://pypi.org/pypi/setuptools/65.0.0/json"  # a version that has advisories: where none come, none are kept
TIMEOUT = 8.0


def reachable() -> bool:
    """Whether the package index answers with advisories; a mirror may have packages alone."""
    try:
        with urllib.request.urlopen(KNOWN, timeout=TIMEOUT) as answer:
            return bool(json.load(answer)["vulnerabilities"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def accepted(text: str) -> list[str]:
    """Return the advisories that are accepted; each line is one with its reason."""
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if bare := [line[0] for line in lines if len(line) < 2]:
        sys.exit(f".ci/advisories: {bare[0]} has no reason")
    return [line[0] for line in lines]


def main() -> int:
    """Audit; returns the exit code."""
    if not reachable():
        print("audit: no advisories from pypi.org here, so known vulnerabilities were not looked for")
        return 0
    program = TOOL / "bin" / "pip-audit"
    if not program.exists():
        venv.create(TOOL, with_pip=True)
        if subprocess.run([TOOL / "bin" / "pip", "install", "--quiet", "pip-audit"]).returncode:
            print("audit: pip-audit cannot be installed here, so known vulnerabilities were not looked for")
            return 0
    ignored = [word for name in accepted((ROOT / ".ci" / "advisories").read_text()) for word in ("--ignore-vuln", name)]
    command = [program, "--requirement", "constraints.txt", "--no-deps", "--disable-pip", "--progress-spinner=off"]
    return subprocess.run([*command, *ignored], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
