import contextlib
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch

from fedtune_strategies.errors import LedgerError, ResourceError
from server_app.ledger import Ledger
from server_app.ledger_file import INLINE_BYTES


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
    assert (first.body, ledger.payload(first), first.round) == ({"loss": 2.5}, b"\x00\xff", 1)
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
    with pytest.raises(LedgerError, match="another process"):
        Ledger(tmp_path)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    # What was confirmed is there; the chain of hashes is whole.
    ledger = Ledger(tmp_path)
    rounds = [record.round for record in ledger.records()]
    assert rounds == list(range(len(rounds))) and len(rounds) > confirmed
    ledger.append("round", round=len(rounds))
    ledger.close()


def fill(folder, count, size=3):
    """Write some records; returns the SQLite file."""
    ledger = Ledger(folder)
    for number in range(1, count + 1):
        ledger.append("round", round=number, node="n", body={"k": 1}, blob=b"a" * size)
    ledger.close()
    return folder / "ledger.sqlite"


def change(path, statement, *values):
    with sqlite3.connect(path) as db:
        db.execute(statement, values)
    db.close()


def rounds(folder):
    ledger = Ledger.read(folder)
    found = [record.round for record in ledger.records("round")]
    ledger.close()
    return found


CHANGES = {"time": 1.0, "kind": "reply", "round": 7, "node": "m", "body": '{"k":2}', "blob": b"abd", "file": "zz"}


@pytest.mark.parametrize("column", CHANGES)
def test_a_changed_row_before_good_ones_is_found_and_cut_only_on_demand(tmp_path, column):
    path = fill(tmp_path, 5)
    change(path, f"UPDATE records SET {column} = ? WHERE seq = 2", CHANGES[column])
    line = "damaged after record 1 .*3 good ones follow.*fedtune ledger cut"
    for _ in range(2):  # an attempt changes nothing
        with pytest.raises(LedgerError, match=line):
            Ledger(tmp_path)
    Ledger(tmp_path, cut_anywhere=True).close()
    assert rounds(tmp_path) == [1]


@pytest.mark.parametrize("column", [*CHANGES, "hash"])
def test_a_damaged_tail_is_cut_back_with_a_message_and_kept(tmp_path, column, caplog):
    path = fill(tmp_path, 5)
    change(path, f"UPDATE records SET {column} = ? WHERE seq = 5", CHANGES.get(column, b"?"))
    ledger = Ledger(tmp_path)
    assert "damaged after record 4 (1 record lost)" in caplog.text and "ledger.damaged-1.sqlite" in caplog.text
    assert ledger.last("cut").body["after"] == 4
    ledger.append("round", round=5)
    ledger.close()
    assert rounds(tmp_path) == [1, 2, 3, 4, 5]
    assert Ledger.read(tmp_path).damage() is None
    with sqlite3.connect(tmp_path / "ledger.damaged-1.sqlite") as kept:
        assert kept.execute("SELECT count(*) FROM records").fetchone() == (5,)
    kept.close()


@pytest.mark.parametrize(("removed", "left"), [(4, [1, 2, 3]), (5, [1, 2, 3, 4])])
def test_missing_records_are_noticed(tmp_path, removed, left, caplog):
    change(fill(tmp_path, 5), "DELETE FROM records WHERE seq = ?", removed)
    Ledger(tmp_path).close()
    assert rounds(tmp_path) == left
    told = f"ends with record {left[-1]}, though 1 more" if removed == 5 else f"damaged after record {left[-1]}"
    assert told in caplog.text


def test_an_older_copy_that_was_put_back_is_told_apart_from_damage_and_continues(tmp_path, caplog):
    path = fill(tmp_path, 3)
    older = path.read_bytes()
    fill(tmp_path, 5)
    path.write_bytes(older)
    with contextlib.closing(Ledger.read(tmp_path)) as ledger:
        found = ledger.damage()
    assert found.ends_early and "an older copy was put in its place" in str(found) and "damaged" not in str(found)
    Ledger(tmp_path).close()
    assert rounds(tmp_path) == [1, 2, 3] and "an older copy" in caplog.text
    with contextlib.closing(Ledger.read(tmp_path)) as ledger:
        assert ledger.damage() is None


@pytest.mark.parametrize("part", [0.25, 0.5, 0.75, 0.95])
def test_a_file_cut_short_or_overwritten_gives_back_its_good_records(tmp_path, part, caplog):
    for damage in ("short", "overwritten"):
        folder = tmp_path / damage
        path = fill(folder, 60, size=1500)
        whole = path.read_bytes()
        at = int(len(whole) * part) // 4096 * 4096
        path.write_bytes(whole[:at] if damage == "short" else whole[:at] + b"\xa5" * 4096 + whole[at + 4096 :])
        try:
            Ledger(folder).close()
        except LedgerError as error:  # good records follow, or none is left
            assert damage == "overwritten" or part < 0.3, error
            continue
        found = rounds(folder)
        assert found == list(range(1, len(found) + 1)) and 60 * (part - 0.3) < len(found) < 60
        assert f"going on from record {len(found)}" in caplog.text


def test_a_lost_log_is_noticed(tmp_path, caplog):
    writer = script(f"""
        import os
        ledger = Ledger(Path({str(tmp_path)!r}))
        for number in range(1, 9):
            ledger.append("round", round=number)
        os._exit(0)
    """)
    writer.wait(60)
    log = tmp_path / "ledger.sqlite-wal"
    log.write_bytes(log.read_bytes()[:-5000])
    Ledger(tmp_path).close()
    assert f" record {len(rounds(tmp_path))}" in caplog.text and len(rounds(tmp_path)) < 8


def test_a_ledger_with_nothing_whole_is_refused(tmp_path):
    path = fill(tmp_path, 3)
    change(path, "UPDATE records SET hash = x'00'")
    with pytest.raises(LedgerError, match=r"first record on.*backup"):
        Ledger(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(LedgerError, match=r"first record on.*backup"):
        Ledger(tmp_path)


def test_another_format_is_refused_by_one_line(ledger):
    ledger.close()
    with sqlite3.connect(ledger.folder / "ledger.sqlite") as db:
        db.execute("PRAGMA user_version = 1")
    db.close()
    with pytest.raises(LedgerError, match=r"format 1.*use the matching release"):
        Ledger(ledger.folder)


def test_records_written_together_are_all_there_or_none(ledger):
    ledger.append("start")
    with pytest.raises(KeyError), ledger.together():
        ledger.append("reply", node="a")
        raise KeyError
    with ledger.together():
        ledger.append("reply", node="b")
        assert [one.kind for one in Ledger.read(ledger.folder).records()] == ["start"]
        ledger.append("reply", node="c")
    ledger.append("round")
    assert [one.node for one in Ledger.read(ledger.folder).records("reply")] == ["b", "c"]
    assert Ledger.read(ledger.folder).damage() is None


def test_a_long_payload_is_a_file(ledger):
    long = b"x" * (INLINE_BYTES + 1)
    record = ledger.append("reply", blob=long)
    assert ledger.payload(record) == long
    assert [name for _, name in ledger.files()] == [record.file]
    assert ledger.payload(ledger.append("reply", blob=long[1:])) == long[1:]
    ledger.close()
    Ledger(ledger.folder).close()
    (ledger.folder / "files" / f"{record.file}.safetensors").write_bytes(b"y")
    with pytest.raises(LedgerError, match="damaged"):
        Ledger.read(ledger.folder).payload(record)


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


def test_nobody_sees_a_ledger_that_is_being_made(tmp_path):
    """Readers look all the time: there is none, or there is a whole one."""
    folders, told, done = [tmp_path / str(number) for number in range(40)], Counter(), threading.Event()

    def look():
        while not done.is_set():
            for folder in folders:
                try:
                    Ledger.read(folder).close()
                    told["whole"] += 1
                except LedgerError as error:
                    told["none" if "no ledger in" in str(error) else str(error)] += 1

    reader = threading.Thread(target=look)
    reader.start()
    for folder in folders:
        Ledger(folder).close()
    done.set()
    reader.join()
    assert set(told) <= {"whole", "none"}


def test_a_ledger_whose_making_was_cut_off_is_made_anew(tmp_path, monkeypatch):
    def cut_off(*paths):
        raise OSError("cut off")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", cut_off)
        with pytest.raises(ResourceError, match="cut off"):
            Ledger(tmp_path)
    with pytest.raises(LedgerError, match="no ledger in"):
        Ledger.read(tmp_path)
    ledger = Ledger(tmp_path)
    ledger.append("start")
    ledger.close()
    assert [record.kind for record in Ledger.read(tmp_path).records()] == ["start"]
    assert not list(tmp_path.glob("*.partial*"))


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
