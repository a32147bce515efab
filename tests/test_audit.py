"""The look for known vulnerabilities: says when it was none, and accepts nothing without a reason."""

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture
def audit():
    path = Path(__file__).resolve().parents[1] / ".ci" / "audit.py"
    spec = importlib.util.spec_from_file_location("audit", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_where_no_advisories_come_the_gate_says_so_and_passes(audit, monkeypatch, capsys):
    monkeypatch.setattr(audit, "KNOWN", "http://127.0.0.1:9/nothing")
    assert audit.main() == 0
    assert capsys.readouterr().out == (
        "audit: no advisories from pypi.org here, so known vulnerabilities were not looked for\n"
    )


def test_what_pip_audit_finds_fails_the_gate_unless_it_is_accepted(audit, monkeypatch, tmp_path):
    program = tmp_path / "bin" / "pip-audit"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ncase "$*" in *"--ignore-vuln PYSEC-1"*) exit 0;; *) exit 1;; esac\n')
    program.chmod(0o700)
    monkeypatch.setattr(audit, "reachable", lambda: True)
    monkeypatch.setattr(audit, "TOOL", tmp_path)
    assert audit.main() == 1
    monkeypatch.setattr(audit, "accepted", lambda text: ["PYSEC-1"])
    assert audit.main() == 0


def test_an_accepted_advisory_needs_a_reason(audit):
    assert audit.accepted("# why\n\nPYSEC-1 not reached from here\n") == ["PYSEC-1"]
    with pytest.raises(SystemExit, match="PYSEC-2 has no reason"):
        audit.accepted("PYSEC-2\n")
