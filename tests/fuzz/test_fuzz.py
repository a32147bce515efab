"""Bytes and values that nobody should send: each is read, or refused by one clear line; memory stays bounded.

The runs here are short; ``FUZZ_RUNS=1000000 pytest tests/fuzz`` is the long form.
"""

import os
import pickle
import sqlite3
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune_strategies.config import Config
from fedtune_strategies.config.node import parse_node
from fedtune_strategies.errors import ConfigError, DataError, FedTuneError, LedgerError, ProtocolError
from fedtune_strategies.fedkseed.packing import unpack
from fedtune_strategies.installed import own_methods
from fedtune_strategies.language import data_files
from fedtune_strategies.language.data import read_rows
from fedtune_strategies.language.data_files import READERS
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.records import from_record
from fedtune_strategies.run_config import keys, parse
from server_app.ledger import Ledger
from tests.fuzz.guided import explore
from tests.protocol.test_messages import EXAMPLES

RUNS = int(os.environ.get("FUZZ_RUNS", "1500"))
MEMORY = 64 * 2**20

JSONL = [
    b'{"prompt": "a", "completion": "b"}\n',
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n',
    b'{"input": "a", "output": ["b"], "definition": ["c"]}\n',
    b'{"instruction": "a", "context": "c", "response": "b"}\n',
    b'{"text": "a"}\n',
]
GOOD = {
    ".jsonl": JSONL,
    ".json": [b"[" + JSONL[0] + b"]", b'{"Definition": ["a"], "Instances": [{"input": "a", "output": ["b"]}]}'],
    ".csv": [b'prompt,completion\na,"b, c"\n', b"text\na\n"],
}


def one_line(error):
    assert "\n" not in str(error) and len(str(error)) < 2000


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message.kind)
def test_messages(message):
    def target(payload):
        try:
            assert type(protocol.decode(message.kind, payload)) is type(message)
        except ProtocolError as error:
            one_line(error)

    lines, memory = explore(target, [protocol.encode(message)], RUNS // 5, ["protocol/wire"])
    assert lines > 15 and memory < MEMORY


def test_packed_numbers():
    def target(data):
        try:
            unpack(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0), 100)
        except ProtocolError as error:
            one_line(error)

    from fedtune_strategies.fedkseed.packing import pack

    seeds = [pack(np.arange(100, dtype=np.int32)).numpy().tobytes()]
    assert explore(target, seeds, RUNS, ["fedkseed/packing"])[1] < MEMORY


@pytest.mark.parametrize("suffix", GOOD)
def test_data_files(tmp_path, suffix):
    path = tmp_path / f"data{suffix}"

    def target(data):
        path.write_bytes(data)
        try:
            assert all(row.response for row in read_rows(path))
        except DataError as error:
            one_line(error)

    lines, memory = explore(target, GOOD[suffix], RUNS // 2, ["language/data"])
    assert lines > 30 and memory < MEMORY


def test_parquet_files(tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a"] * 9, "completion": ["b"] * 9}), path)

    def target(data):
        path.write_bytes(data)
        try:
            read_rows(path)
        except DataError as error:
            one_line(error)

    assert explore(target, [path.read_bytes()], RUNS // 5, ["language/data"])[1] < MEMORY


def test_a_small_file_that_unpacks_to_more_than_memory_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.parquet"
    table = pyarrow.table({"text": ["x" * 2**20] * 64})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert path.stat().st_size < 2**20
    monkeypatch.setattr(data_files, "_free_memory", lambda: 2**20)
    with pytest.raises(DataError, match=r"unpacks to .* GB, more than the .* free"):
        read_rows(path)


def test_archives_are_never_unpickled(tmp_path):
    """A pickle that would run code, in every place that takes a file or bytes."""

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    bomb = pickle.dumps(Bomb())
    for suffix in (*READERS, ".pkl", ".npy", ".bin", ".pt"):
        path = tmp_path / f"data{suffix}"
        path.write_bytes(bomb)
        with pytest.raises(DataError):
            read_rows(path)
    for stype in ("numpy.ndarray", "pickle", "torch"):
        record = RecordDict(
            {
                "fedtune": ConfigRecord({"kind": "kept"}),
                "blob": ArrayRecord({"blob": Array("object", (1,), stype, bomb)}),
            }
        )
        with pytest.raises(ProtocolError):
            from_record(record)
    with pytest.raises(ProtocolError):
        protocol.decode("kept", bomb)
    assert not (tmp_path / "ran").exists()


def test_a_header_that_claims_more_than_it_holds_costs_nothing():
    for header in (
        b'[0,["f64",[1099511627776]]]',
        b'[0,["u8",[0,9999999999999999999999]]]',
        b'[0,["u8",[-1]]]',
        b"[" * 10**5,
    ):
        with pytest.raises(ProtocolError):
            protocol.decode("model-chunk", len(header).to_bytes(4, "little") + header)
    with pytest.raises(ProtocolError):
        protocol.decode("ack", (2**32 - 1).to_bytes(4, "little") + b'["n",1')


def test_ledgers(tmp_path):
    ledger = Ledger(tmp_path / "good")
    for number in range(1, 6):
        ledger.append("round", round=number, node="n", body={"files": {}}, blob=b"abc")
    ledger.close()
    good = (tmp_path / "good" / "ledger.sqlite").read_bytes()

    def target(data):
        with tempfile.TemporaryDirectory(dir=tmp_path) as folder:
            path = Path(folder) / "ledger.sqlite"
            path.write_bytes(data)
            for writable in (False, True):
                try:
                    found = Ledger(Path(folder), writable=writable)
                    try:
                        if not writable:
                            found.damage()
                        list(found.records())
                        found.last("round")
                    finally:
                        found.close()
                except (LedgerError, FedTuneError) as error:
                    one_line(error)
            assert {one.name for one in path.parent.parent.iterdir()} <= {"good", path.parent.name}

    lines, memory = explore(target, [good], RUNS // 5, ["server_app/ledger_file", "server_app/ledger"])
    assert lines > 80 and memory < MEMORY


@pytest.mark.parametrize("writable", [False, True])
def test_a_ledger_whose_schema_is_no_text(tmp_path, writable):
    Ledger(tmp_path).close()
    (tmp_path / "ledger.head").unlink(missing_ok=True)
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(path.read_bytes().replace(b"TABLE records", b"TAB\x8bE records"))
    with pytest.raises(LedgerError) as refused:
        list(Ledger(tmp_path, writable=writable).records())
    one_line(refused.value)


def test_a_ledger_with_foreign_values_in_its_columns(tmp_path):
    for column, value in (("body", "[1"), ("body", "7"), ("time", "x"), ("file", "../../x"), ("round", b"\0")):
        folder = tmp_path / f"{column}-{len(str(value))}"
        ledger = Ledger(folder)
        ledger.append("round", round=1)
        ledger.close()
        with sqlite3.connect(folder / "ledger.sqlite") as db:
            db.execute(f"UPDATE records SET {column} = ?", (value,))
        db.close()
        with pytest.raises(LedgerError):
            Ledger(folder)
        reader = Ledger.read(folder)
        with pytest.raises(LedgerError):
            for record in reader.records():
                reader.payload(record)
            list(reader.files())
            raise LedgerError("only read")


NAMES = [key.name for method in own_methods() for key in keys(method)]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.binary(max_size=5),
    st.sampled_from(["(" * 500, "fedcybgd", "fedit", "nan", "int8", "drop:99", "prune:2", "../x", 0, -1, 2**70, 1e308]),
    st.lists(st.integers(), max_size=2),
)  # fmt: skip


@settings(max_examples=max(200, RUNS // 5))
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=12), VALUES, max_size=4))
def test_configurations(flat):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert isinstance(parse(flat), Config)
        except ConfigError as error:
            one_line(error)


@given(st.dictionaries(st.sampled_from(["name", "data", "format", "model", "device", "x"]), VALUES, max_size=4))
def test_node_configurations(flat):
    try:
        assert parse_node(flat).data
    except ConfigError as error:
        one_line(error)
