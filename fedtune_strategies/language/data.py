"""Read an owner's data file into rows of prompt and response.

Formats are TRL's (``text``, ``messages``, ``prompt``/``completion``) and those of Dolly, Alpaca and Natural
Instructions; files are JSONL, JSON, CSV, Parquet or a folder written by ``datasets``. See docs/data.md.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fedtune_strategies.errors import DataError

Record = dict[str, Any]
Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and its response, before tokenisation.

    Attributes
    ----------
    prompt : str, list of messages, or None
        A string; or a conversation ``[{"role": …, "content": …}, …]`` that the response answers; or None for plain
        text, all of which is learnt.
    response : str
        What the model shall learn to write.
    references : tuple of str
        All accepted answers, for Rouge-L. The response is among them.
    """

    prompt: str | list[Message] | None
    response: str
    references: tuple[str, ...] = ()


def read_rows(path: str | Path, format: str = "auto") -> list[Row]:
    """Read a data file.

    Parameters
    ----------
    path : str or Path
        A ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, or a folder written by ``Dataset.save_to_disk``.
    format : str
        ``"auto"`` recognises the format by the columns; otherwise one of `FORMATS`.

    Returns
    -------
    list of Row
        In the order of the file, never empty.

    Raises
    ------
    DataError
        The file is missing, empty or malformed, its columns fit no format, or a value is not a string or is empty.
        The message names the file and the line or row.
    """
    return rows_from(read_records(path), format, str(path))


def rows_from(records: Iterable[tuple[str, Record]], format: str = "auto", source: str = "data") -> list[Row]:
    """Turn records of any accepted format into rows.

    Parameters
    ----------
    records : iterable of (str, dict)
        Where each record stands (``"line 7"``), and the record.
    format : str
        As in `read_rows`.
    source : str
        Named in errors.

    Returns
    -------
    list of Row

    Raises
    ------
    DataError
        As `read_rows`.
    """
    if format != "auto" and format not in FORMATS:
        raise DataError(f"{source}: unknown data format {format!r}; accepted: auto, {', '.join(FORMATS)}")
    rows = []
    for where, record in records:
        if not isinstance(record, dict):
            raise DataError(f"{source}, {where}: a row must be an object with named columns, not {_kind(record)}")
        if format == "auto":
            format = _recognise(record, f"{source}, {where}")
        missing = [name for name in FORMATS[format][0] if name not in record]
        if missing:
            raise DataError(
                f"{source}, {where}: format {format!r} needs the columns {', '.join(FORMATS[format][0])}, "
                f"but found {_columns(record)}"
            )
        try:
            row = FORMATS[format][1](record)
            if not row.response.strip():
                raise ValueError("the response is empty; remove the row or fill it in")
        except ValueError as error:
            raise DataError(f"{source}, {where}: {error}") from None
        rows.append(row)
    if not rows:
        raise DataError(f"{source}: holds no rows; write at least one example into it")
    return rows


# --- Formats: required columns, and what makes a row of a record -------------------------------------------------


def _messages(record: Record) -> Row:
    messages = _conversation(record, "messages")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message must be the assistant's, not the {messages[-1]['role']}'s")
    if len(messages) == 1:
        raise ValueError("'messages' holds only the assistant's answer; it needs the message that it answers")
    return _answer(messages[:-1], messages[-1]["content"])


def _prompt_completion(record: Record) -> Row:
    if record["prompt"] == "":
        raise ValueError("the prompt is empty; text without a prompt belongs into a column 'text'")
    if isinstance(record["prompt"], str):
        return _answer(record["prompt"], _text(record, "completion"))
    return _messages({"messages": _conversation(record, "prompt") + _conversation(record, "completion")})


def _dolly(record: Record) -> Row:
    return _answer(_instruction(record, "instruction", "context"), _text(record, "response"))


def _alpaca(record: Record) -> Row:
    return _answer(_instruction(record, "instruction", "input"), _text(record, "output"))


def _natural_instructions(record: Record) -> Row:
    answers = record["output"] if isinstance(record["output"], list) else [record["output"]]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("column 'output' must be a string or a non-empty list of strings")
    definition = record.get("definition") or ""
    if isinstance(definition, list):
        definition = "\n".join(map(str, definition))
    prompt = _instruction({"definition": definition, "input": _text(record, "input")}, "definition", "input")
    return Row(prompt, answers[0], tuple(answers))


def _plain_text(record: Record) -> Row:
    return Row(None, _text(record, "text"))


# In the order in which "auto" tries them: Alpaca files often carry a `text` column too.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Record], Row]]] = {
    "messages": (("messages",), _messages),
    "prompt-completion": (("prompt", "completion"), _prompt_completion),
    "dolly": (("instruction", "response"), _dolly),
    "alpaca": (("instruction", "output"), _alpaca),
    "natural-instructions": (("input", "output"), _natural_instructions),
    "text": (("text",), _plain_text),
}


def _recognise(record: Record, where: str) -> str:
    for name, (columns, _) in FORMATS.items():
        if all(column in record for column in columns):
            return name
    accepted = "; ".join("+".join(columns) for columns, _ in FORMATS.values())
    raise DataError(f"{where}: columns {_columns(record)} fit no format; accepted: {accepted}")


def _columns(record: Record) -> str:
    return " ".join(", ".join(map(str, record)).split())[:200] or "none"


def _answer(prompt: str | list[Message], response: str) -> Row:
    return Row(prompt, response, (response,))


def _instruction(record: Record, task: str, context: str) -> list[Message]:
    # The context column may be absent, empty or null: not every instruction has one.
    parts = [_text(record, name) for name in (task, context) if record.get(name)]
    if not parts:
        raise ValueError(f"columns {task!r} and {context!r} are both empty")
    return [{"role": "user", "content": "\n\n".join(parts)}]


def _conversation(record: Record, column: str) -> list[Message]:
    messages = record[column]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"column {column!r} must be a non-empty list of messages, not {_kind(messages)}")
    for message in messages:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(f"each message in {column!r} needs a string 'role' and a string 'content'")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _text(record: Record, column: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must be a string, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


# --- Files -------------------------------------------------------------------------------------------------------


def read_records(path: str | Path) -> Iterator[tuple[str, Record]]:
    """Read the records of a data file as they stand.

    Parameters
    ----------
    path : str or Path
        As in `read_rows`.

    Returns
    -------
    iterator of (str, dict)
        Where each record stands in the file (``"line 7"``, ``"row 7"``), and the record.

    Raises
    ------
    DataError
        The file is missing or malformed, or of an unknown kind.
    """
    path = Path(path).expanduser()
    accepted = f"accepted: {', '.join(READERS)} files and datasets folders"
    if not path.exists():
        raise DataError(f"{path}: no such data file; {accepted}")
    if path.is_dir():
        return _read_datasets_folder(path)
    if path.suffix not in READERS:
        raise DataError(f"{path}: unknown kind of data file; {accepted}")
    return READERS[path.suffix](path)


def _read_jsonl(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line.decode("utf-8-sig"))
                except (ValueError, RecursionError) as error:
                    raise DataError(f"{path}, line {number}: not valid JSON: {_brief(error)}") from None


def _read_json(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig") or "[]")
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {_brief(error)}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {_brief(error)}") from None
    if isinstance(content, dict) and "Instances" in content:  # a task file of Natural Instructions
        definition = content.get("Definition", "")
        instances = content["Instances"] if isinstance(content["Instances"], list) else [content["Instances"]]
        content = [{"definition": definition} | one if isinstance(one, dict) else one for one in instances]
    if not isinstance(content, list):
        raise DataError(f"{path}: must hold a list of rows, not {_kind(content)}; one object per line is a .jsonl file")
    for number, record in enumerate(content, start=1):
        yield f"row {number}", record


def _read_csv(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for record in reader:
                if None in record or None in record.values():
                    raise DataError(f"{path}, line {reader.line_num}: not as many values as the header has columns")
                yield f"line {reader.line_num}", record
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{path}, line {reader.line_num + 1}: not valid CSV: {_brief(error)}") from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(path)
        size = sum(metadata.row_group(number).total_byte_size for number in range(metadata.num_row_groups))
        if size > (free := _free_memory()):
            raise DataError(f"{path}: unpacks to {size / 1e9:.1f} GB, more than the {free / 1e9:.1f} GB that are free")
        records = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise DataError(f"{path}: not a readable Parquet file: {_brief(error)}") from None
    for number, record in enumerate(records, start=1):
        yield f"row {number}", record


def _free_memory() -> int:
    return int(psutil.virtual_memory().available)


def _read_datasets_folder(path: Path) -> Iterator[tuple[str, Record]]:
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


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Record]]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _brief(error: Exception) -> str:
    return str(error).partition("\n")[0]
