"""Read the records of data files as they stand: JSON, CSV, Parquet, plain text, folders of them; see docs/data.md."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import psutil

from fedtune_strategies.errors import DataError

Record = dict[str, Any]
Found = tuple[str, Record | ValueError]
"""Where a record stands (``"line 7"``), and the record, or what is wrong with that one alone."""

DATASET_FILES = ("dataset_info.json", "dataset_dict.json")
"""What marks a folder as written by ``Dataset.save_to_disk``."""

LISTS = ("data", "rows", "examples", "train")
"""Keys under which a JSON object may hold the list of its rows."""

ROW_BYTES = 500
"""Least memory of a row in Python, to refuse tables of too many rows before they are read."""

PARQUET_ROWS = 256


def scan(path: str | Path) -> Iterator[Found]:
    """Read all records of a file, a folder or a pattern such as ``notes-*.jsonl``, each with where it is.

    A ValueError stands for a record that is wrong where the rest can still be read; otherwise a DataError is raised.
    """
    path = Path(path).expanduser()
    if any((path / name).is_file() for name in DATASET_FILES):
        yield from _read_dataset(path)
        return
    files = _files(path)
    for file in files:
        for where, record in _read_file(file):
            yield (where if len(files) == 1 else f"{file.name}, {where}"), record


def _files(path: Path) -> list[Path]:
    """List the files that a path stands for, in the order of their names."""
    if path.is_file():
        return [path]
    if path.is_dir():
        inside = [file.relative_to(path) for file in path.rglob("*") if file.is_file() and _ending(file)[0] in READERS]
        found = [path / file for file in inside if not any(part.startswith((".", "_")) for part in file.parts)]
        # A folder from the Hub holds all splits.
        found = [file for file in found if file.name.startswith("train")] or found
        if len({_ending(file)[0] for file in found}) > 1:
            raise DataError(f"{path}: holds data files of several kinds; name one, or a pattern such as '*.jsonl'")
    else:
        found = [file for file in path.parent.glob(path.name) if file.is_file()]
        if not found:
            raise DataError(f"{path}: no such data file; {_accepted()}")
    if not found:
        raise DataError(f"{path}: holds no data files; {_accepted()}")
    return sorted(found)


def _accepted() -> str:
    return f"accepted: {', '.join(READERS)} files (also .gz and .zst), folders of them, and datasets folders"


def _ending(path: Path) -> tuple[str, str]:
    """Return the ending that says the kind, and that of a packed file or ``""``, in small letters."""
    endings = [suffix.lower() for suffix in path.suffixes]
    packed = endings.pop() if endings and endings[-1] in (".gz", ".zst") else ""
    return (endings[-1] if endings else ""), packed


def _read_file(path: Path) -> Iterator[Found]:
    kind, packed = _ending(path)
    if kind not in READERS or (packed and kind == ".parquet"):
        raise DataError(f"{path}: unknown kind of data file; {_accepted()}")
    if kind == ".parquet":
        yield from _read_parquet(path)
        return
    try:
        with _open(path, packed) as file:
            yield from READERS[kind](path, _lines(path, file))
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {_brief(error)}") from None


# --- Text --------------------------------------------------------------------------------------------------------


def _open(path: Path, packed: str) -> io.BufferedIOBase:
    if packed == ".gz":
        return gzip.open(path, "rb")
    if packed == ".zst":
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path}: to read .zst files: pip install zstandard; or unpack it") from None
        return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(path.open("rb"), closefd=True))
    return path.open("rb")


def _lines(path: Path, file: io.BufferedIOBase) -> Iterator[str]:
    """Yield decoded lines with their ends; refuse more of them than fits in memory, as a packed file may hold."""
    left = free = _free_memory()
    start = file.read(4)
    encoding = _encoding(start)
    source: Any = _Rewound(start, file)
    if encoding != "utf-8":
        source = io.TextIOWrapper(io.BufferedReader(source), encoding, newline="")
    number = 0
    while True:
        number += 1
        try:
            line = source.readline(left + 1)
            text = line.decode("utf-8") if isinstance(line, bytes) else line
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, line {number}: not {encoding.upper()} text ({_brief(error)}); save the file as UTF-8"
            ) from None
        if not text:
            return
        left -= len(line)
        if left < 0:
            raise DataError(f"{path}: unpacks to more than the {free / 1e9:.1f} GB of memory that are free")
        yield text.removeprefix("\ufeff") if number == 1 else text


class _Rewound(io.RawIOBase):
    """A stream whose first bytes were read already: packed streams cannot all seek."""

    def __init__(self, start: bytes, rest: io.BufferedIOBase) -> None:
        self._start, self._rest = start, rest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        part = self._start[: len(buffer)] or self._rest.read(len(buffer))
        self._start = self._start[len(part) :]
        buffer[: len(part)] = part
        return len(part)

    def readline(self, size: int | None = -1, /) -> bytes:
        start, self._start = self._start, b""
        if b"\n" in start:
            end = start.index(b"\n") + 1
            self._start = start[end:]
            return start[:end]
        return start + self._rest.readline(-1 if size is None else size)


def _encoding(start: bytes) -> str:
    """Tell UTF-16 and UTF-32 by their mark, or by the zero bytes of the Latin letters and signs of any data file."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if start[1::2] == b"\0\0":
        return "utf-16-le"
    return "utf-16-be" if start[::2] == b"\0\0" else "utf-8"


def _read_jsonl(path: Path, lines: Iterator[str]) -> Iterator[Found]:
    for number, line in enumerate(lines, start=1):
        if number == 1 and line.strip() in ("{", "["):  # objects spread over lines
            yield from _read_json(path, chain([line], lines))
            return
        if line.strip():
            yield f"line {number}", _parsed(line)


def _parsed(line: str) -> Record | ValueError:
    try:
        return _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        return error if isinstance(error, _TwiceError) else ValueError(f"not valid JSON: {_brief(error)}")


def _read_json(path: Path, lines: Iterator[str]) -> Iterator[Found]:
    """Read a list of rows, an object that holds one, or rows one after another."""
    text = "".join(lines)
    contents, position = [], _next(text, 0)
    while position < len(text):
        try:
            content, end = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            line = text.count("\n", 0, position) + 1
            raise DataError(f"{path}, line {line}: not valid JSON: {_brief(error)}") from None
        contents.append(content)
        position = _next(text, end)
    if len(contents) == 1:
        contents = _rows_of(contents[0])
    for number, record in enumerate(contents, start=1):
        yield f"row {number}", record


def _rows_of(content: Any) -> list[Any]:
    if not isinstance(content, dict):
        return content if isinstance(content, list) else [content]
    if "Instances" in content:  # a task file of Natural Instructions
        definition = content.get("Definition", "")
        instances = content["Instances"] if isinstance(content["Instances"], list) else [content["Instances"]]
        return [{"definition": definition} | one if isinstance(one, dict) else one for one in instances]
    return next((content[key] for key in LISTS if isinstance(content.get(key), list)), [content])


def _next(text: str, position: int) -> int:
    while position < len(text) and text[position].isspace():
        position += 1
    return position


def _read_csv(path: Path, lines: Iterator[str]) -> Iterator[Found]:
    csv.field_size_limit(sys.maxsize)
    skipped, head = next(((number, line) for number, line in enumerate(lines) if line.strip()), (0, ""))
    separator = max(",;\t", key=head.count)
    blanks = f"{separator} " in head
    reader = csv.reader(chain([head], lines), delimiter=separator, skipinitialspace=blanks, strict=True)
    names: list[str] = []
    after = 0
    try:
        for values in reader:
            line, after = skipped + after + 1, reader.line_num
            if not names:
                names = [name.strip() for name in values]
                if twice := sorted({name for name in names if name and names.count(name) > 1}):
                    raise DataError(f"{path}: column {twice[0]!r} stands twice in the header; rename one")
            elif len(values) == len(names):
                yield f"line {line}", dict(zip(names, values, strict=True))
            elif values:
                yield f"line {line}", ValueError("not as many values as the header has columns")
    except csv.Error as error:
        raise DataError(f"{path}, line {skipped + after + 1}: not valid CSV: {_brief(error)}") from None


def _read_text(path: Path, lines: Iterator[str]) -> Iterator[Found]:
    """Each paragraph, up to a blank line, is a text to learn."""
    paragraph: list[str] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield f"line {number - len(paragraph)}", {"text": "".join(paragraph).strip()}
            paragraph = []
    if paragraph:
        yield "the last paragraph", {"text": "".join(paragraph).strip()}


class _TwiceError(ValueError):
    """An object with a key twice, of which a plain parser would keep the second."""


def _object(pairs: Iterable[tuple[str, Any]]) -> Record:
    record: Record = {}
    for key, value in pairs:
        if key in record:
            raise _TwiceError(f"column {key[:50]!r} stands twice in the object; rename one")
        record[key] = value
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


# --- Tables ------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Iterator[Found]:
    import pyarrow.parquet

    free = _free_memory()
    try:
        schema = pyarrow.parquet.read_schema(path)
        if len(set(schema.names)) < len(schema.names):
            raise DataError(f"{path}: has two columns of one name; rename one")
        texts = [field.name for field in schema if pyarrow.types.is_string(field.type)]
        with pyarrow.parquet.ParquetFile(path, read_dictionary=texts) as file:
            groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
            _fits(path, max(sum(group.total_byte_size for group in groups), file.metadata.num_rows * ROW_BYTES), free)
            number, size = 0, 0
            for batch in file.iter_batches(PARQUET_ROWS):
                size += _unpacked(batch)
                _fits(path, size, free)
                for record in batch.to_pylist():
                    number += 1
                    yield f"row {number}", record
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {_brief(error)}") from None


def _unpacked(batch: Any) -> int:
    """Bytes of a batch once each row has its own text: a dictionary holds a text that comes often only once."""
    import pyarrow
    from pyarrow import compute

    size = int(batch.nbytes)
    for column in batch.columns:
        if pyarrow.types.is_dictionary(column.type):
            size += compute.sum(compute.binary_length(column.dictionary).take(column.indices)).as_py() or 0
    return size


def _fits(path: Path, size: int, free: int) -> None:
    if size > free:
        raise DataError(f"{path}: unpacks to {size / 1e9:.1f} GB, more than the {free / 1e9:.1f} GB that are free")


def _free_memory() -> int:
    return int(psutil.virtual_memory().available)


def _read_dataset(path: Path) -> Iterator[Found]:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a folder written by Dataset.save_to_disk: {_brief(error)}") from None
    if isinstance(dataset, DatasetDict):
        if "train" not in dataset:
            raise DataError(f"{path}: holds the splits {', '.join(dataset)}, none named train; name one split's folder")
        dataset = dataset["train"]
    for number, record in enumerate(dataset, start=1):
        yield f"row {number}", record


READERS: dict[str, Callable[[Path, Iterator[str]], Iterator[Found]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".txt": _read_text,
    ".parquet": lambda path, lines: _read_parquet(path),
}


def _brief(error: Exception) -> str:
    return str(error).partition("\n")[0]
