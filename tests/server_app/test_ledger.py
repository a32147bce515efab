import signal
import sqlite3
import subprocess
import sys
import textwrap

import pytest
import torch

from fedtune_strategies.errors import LedgerError, ResourceError
from server_app.ledger import Ledger


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "run")
    yield ledger
    ledger.close()


def script(code):
    """Start a Python process with the ledger imported."""
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from pathlib import Path\nfrom server_app.ledger import Ledger\n" + textwrap.dedent(code),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_records_come_back_in_order_and_by_kind_and_round(ledger):
    ledger.append("start", body={"a": 1})
    ledger.append("reply", round=1, node="n", body={"loss": 2.5}, blob=b"\x00\xff")
    ledger.append("reply", round=2, node="m")
    assert [record.kind for record in ledger.records()] == ["start", "reply", "reply"]
    assert [record.node for record in ledger.records("reply")] == ["n", "m"]
    assert [record.node for record in ledger.records("reply", round=2)] == ["m"]
    assert [record.seq for record in ledger.records(after=1)] == [2, 3]
    first = next(ledger.records("reply"))
    assert (first.body, first.blob, first.round) == ({"loss": 2.5}, b"\x00\xff", 1)
    assert ledger.last("reply").node == "m"
    assert ledger.last("nothing") is None


def test_a_reader_follows_a_writer(ledger):
    reader = Ledger.read(ledger.folder)
    ledger.append("round", round=1)
    assert [record.round for record in reader.records("round")] == [1]
    ledger.append("round", round=2)
    assert [record.round for record in reader.records("round")] == [1, 2]
    reader.close()


def test_it_survives_reopening(tmp_path):
    for number in range(3):
        ledger = Ledger(tmp_path)
        ledger.append("round", round=number)
        ledger.close()
    assert [record.round for record in Ledger.read(tmp_path).records()] == [0, 1, 2]


def test_one_writer_at_a_time(ledger):
    with pytest.raises(LedgerError, match="another process"):
        Ledger(ledger.folder)


def test_a_killed_writer_leaves_lock_and_records_usable(tmp_path):
    writer = script(f"""
        ledger = Ledger(Path({str(tmp_path)!r}))
        for number in range(10**9):
            ledger.append("round", round=number, blob=b"x" * 1000)
            print(number, flush=True)
    """)
    for _ in range(20):
        confirmed = int(writer.stdout.readline())
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    # What was confirmed is there; the chain of hashes is whole.
    ledger = Ledger(tmp_path)
    rounds = [record.round for record in ledger.records()]
    assert rounds == list(range(len(rounds))) and len(rounds) > confirmed
    ledger.append("round", round=len(rounds))
    ledger.close()


@pytest.mark.parametrize("column", ["time", "kind", "round", "node", "body", "blob"])
def test_a_changed_row_is_found(tmp_path, column):
    ledger = Ledger(tmp_path)
    for number in range(3):
        ledger.append("round", round=number, node="n", body={"k": 1}, blob=b"abc")
    ledger.close()
    value = {"time": 1.0, "kind": "reply", "round": 7, "node": "m", "body": '{"k":2}', "blob": b"abd"}[column]
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.execute(f"UPDATE records SET {column} = ? WHERE seq = 2", (value,))
    db.close()
    with pytest.raises(LedgerError, match="record 2"):
        Ledger(tmp_path)


def test_a_removed_row_is_found(tmp_path):
    ledger = Ledger(tmp_path)
    for number in range(3):
        ledger.append("round", round=number)
    ledger.close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.execute("DELETE FROM records WHERE seq = 2")
    db.close()
    with pytest.raises(LedgerError, match="record 3"):
        Ledger(tmp_path)


def test_files_come_back_with_their_dtypes(ledger):
    tensors = {"a": torch.randn(3, 2), "b": torch.ones(2, dtype=torch.bfloat16)}
    name = ledger.put_file(tensors)
    again = ledger.get_file(name)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) and again[key].dtype == tensors[key].dtype for key in tensors)
    assert ledger.put_file(tensors) == name


def test_a_damaged_or_missing_file_is_found(ledger):
    name = ledger.put_file({"a": torch.zeros(4)})
    path = ledger.folder / "files" / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(LedgerError, match="damaged"):
        ledger.get_file(name)
    path.unlink()
    with pytest.raises(LedgerError, match="backup"):
        ledger.get_file(name)


def test_no_ledger_to_read(tmp_path):
    with pytest.raises(LedgerError, match=r"run\.dir"):
        Ledger.read(tmp_path / "none")


def test_a_file_that_is_no_ledger(tmp_path):
    (tmp_path / "ledger.sqlite").write_bytes(b"something else" * 100)
    with pytest.raises(LedgerError):
        Ledger(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    Ledger(tmp_path).close()
    with sqlite3.connect(tmp_path / "ledger.sqlite") as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(LedgerError, match="format 99"):
        Ledger(tmp_path)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    # A limit on the size of files stands in for a full disk: writes fail in the middle of the work.
    writer = script(f"""
        import resource, signal, sys
        from fedtune_strategies.errors import ResourceError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        ledger = Ledger(Path({str(tmp_path)!r}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        try:
            for number in range(10_000):
                ledger.append("round", round=number, blob=b"x" * 5_000)
                print(number, flush=True)
        except ResourceError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
    """)
    out, err = writer.communicate(timeout=60)
    assert writer.returncode == ResourceError.exit_code, err
    assert "free space" in err and len(err.strip().splitlines()) == 1
    written = len(out.split())
    ledger = Ledger(tmp_path)
    assert [record.round for record in ledger.records()] == list(range(written))
    ledger.append("round", round=written)
    ledger.close()


def test_a_full_disk_leaves_no_half_file(tmp_path):
    writer = script(f"""
        import resource, signal, sys, torch
        from fedtune_strategies.errors import ResourceError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        ledger = Ledger(Path({str(tmp_path)!r}))
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        try:
            ledger.put_file({{"a": torch.zeros(100_000)}})
        except ResourceError as error:
            sys.exit(error.exit_code)
    """)
    assert writer.wait(timeout=60) == ResourceError.exit_code
    assert list((tmp_path / "files").iterdir()) == []


def test_an_unwritable_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match=r"run\.dir"):
        Ledger(tmp_path / "file" / "run")
