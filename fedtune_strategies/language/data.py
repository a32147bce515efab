"""Turn an owner's records into rows of prompt and response.

Formats are TRL's (``text``, ``messages``, ``prompt``/``completion``), ShareGPT's ``conversations``, and those of Dolly,
Alpaca and Natural Instructions; `data_files` reads the files. See docs/data.md.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune_strategies.errors import DataError
from fedtune_strategies.language.data_files import Found, Record, scan
from fedtune_strategies.words import counted

Message = dict[str, Any]

SHOWN = 5
"""Bad rows that an error names; it counts all."""

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant"}
"""ShareGPT's names of who speaks."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and its response, before tokenisation."""

    # A string; or a conversation ``[{"role": …, "content": …}, …]`` that the response answers, with ``tool_calls``
    # where the assistant called tools; or None for plain text, all of which is learnt
    prompt: str | list[Message] | None
    response: str  # what the model is to learn to write
    references: tuple[str, ...] = ()  # All accepted answers, for Rouge-L. The response is among them.
    tools: list[Any] | None = None  # descriptions of the tools that the assistant may call, for the chat template


def read_rows(path: str | Path, format: str = "auto", columns: str = "", skip_bad: bool = False) -> list[Row]:
    """Read an owner's data: a file, a folder, a pattern, or what ``Dataset.save_to_disk`` wrote (docs/data.md).

    Format "auto" recognises one of `FORMATS` by the columns. `columns` says which of the file's columns is which of the
    format's, ``"prompt=question,completion=answer"``; capitals and outer blanks in names do not count. Bad rows make a
    DataError, which counts them and says of the first where they are and what is wrong, or with `skip_bad` a warning.
    """
    return rows_from(scan(path), format, str(path), columns, skip_bad)


def read_records(path: str | Path) -> Iterator[tuple[str, Record]]:
    """Read the records of a data file as they stand, each with where it is: ``"line 7"`` or ``"row 7"``."""
    for where, record in scan(path):
        if isinstance(record, ValueError):
            raise DataError(f"{path}, {where}: {record}")
        yield where, record


def rows_from(
    records: Iterable[Found], format: str = "auto", source: str = "data", columns: str = "", skip_bad: bool = False
) -> list[Row]:
    """Turn records of any accepted format into rows, as `read_rows`; `source` is named in errors."""
    if format != "auto" and format not in FORMATS:
        raise DataError(f"{source}: unknown data format {format!r}; accepted: auto, {', '.join(FORMATS)}")
    names = parse_columns(columns)
    rows: list[Row] = []
    bad: dict[str, list[str]] = {}  # what is wrong, and where first
    count = halves = 0
    for where, found in records:
        try:
            record = _tidied(found, names)
            if format == "auto":
                format = _recognise(record)
            row = _row(record, format)
        except (ValueError, RecursionError) as error:
            if count < SHOWN:
                bad.setdefault(str(error), []).append(where)
            count += 1
            continue
        halves += "\ufffd" in f"{row.prompt}{row.response}"
        rows.append(row)
    first = "; ".join(f"{', '.join(where)}: {error}" for error, where in bad.items())
    if count and not (skip_bad and rows):
        raise DataError(_refusal(source, first, count, count + len(rows)))
    if not rows:
        raise DataError(f"{source}: holds no rows; write at least one example into it")
    if count:
        log.warning("%s: %d bad rows are left out (%s)", source, count, first)
    if halves:
        log.warning("%s: %d rows hold characters that could not be read (U+FFFD)", source, halves)
    return rows


def parse_columns(columns: str) -> dict[str, str]:
    """Read ``"prompt=question,completion=answer"`` into the file's column for each of the format's, in lower case."""
    pairs = [part.partition("=") for part in columns.split(",") if part.strip()]
    names = {left.strip().casefold(): right.strip().casefold() for left, _, right in pairs}
    if not all(left and right for left, right in names.items()):
        raise DataError(f"columns {columns!r}: write them as prompt=question,completion=answer")
    return names


def _refusal(source: str, first: str, count: int, total: int) -> str:
    if count == 1:
        return f"{source}, {first}" + ("; correct it, or leave it out with 'skip-bad=true'" if total > 1 else "")
    more = f"; and {count - SHOWN} more" if count > SHOWN else ""
    advice = "correct them, or leave them out with 'skip-bad=true'" if count < total else "correct them"
    return f"{source}: {count} of {counted(total, 'row')} are bad, {first}{more}; {advice}"


def _row(record: Record, format: str) -> Row:
    needed, make = FORMATS[format]
    if any(name not in record for name in needed):
        raise ValueError(f"format {format!r} needs the columns {', '.join(needed)}, but found {_columns(record)}")
    row = make(record)
    if not row.response.strip():
        raise ValueError("the response is empty; remove the row or fill it in")
    return row


def _tidied(record: Record | ValueError, names: dict[str, str]) -> Record:
    """Return a record with names in small letters, the owner's columns under the format's names, nothing unreadable."""
    if isinstance(record, ValueError):
        raise record
    if not isinstance(record, dict):
        raise ValueError(f"a row must be an object with named columns, not {_kind(record)}")
    tidied: Record = {}
    for key, value in record.items():
        name = str(key).strip().casefold()
        if name in tidied:
            raise ValueError(f"column {name!r} stands twice; rename one")
        tidied[name] = _clean(value)
    if missing := [name for name in names.values() if name not in tidied]:
        raise ValueError(f"has no column {missing[0]!r}, but {_columns(tidied)}")
    return {ours: tidied[theirs] for ours, theirs in names.items()} or tidied


_HALF = re.compile("[\ud800-\udfff]")


def _clean(value: Any) -> Any:
    """Read NaN as missing, as pandas writes it, and half an emoji (a lone surrogate) as U+FFFD."""
    if isinstance(value, str):
        return _HALF.sub("\ufffd", value)
    if isinstance(value, float):
        return None if math.isnan(value) else value
    if isinstance(value, list):
        return [_clean(one) for one in value]
    if isinstance(value, dict):
        return {_clean(key): _clean(one) for key, one in value.items()}
    return value


# --- Formats: required columns, and what makes a row of a record -------------------------------------------------


def _messages(record: Record) -> Row:
    messages = _conversation(record, "messages")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"the last message must be the assistant's, not the {messages[-1]['role']}'s")
    if len(messages) == 1:
        raise ValueError("'messages' holds only the assistant's answer; it needs the message that it answers")
    return _answer(messages[:-1], messages[-1]["content"], record.get("tools"))


def _prompt_completion(record: Record) -> Row:
    if record["prompt"] == "":
        raise ValueError("the prompt is empty; text without a prompt belongs into a column 'text'")
    if isinstance(record["prompt"], str):
        return _answer(record["prompt"], _text(record, "completion"))
    messages = _conversation(record, "prompt") + _conversation(record, "completion")
    return _messages({"messages": messages, "tools": record.get("tools")})


def _conversations(record: Record) -> Row:
    return _messages({"messages": _conversation(record, "conversations"), "tools": record.get("tools")})


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
    "conversations": (("conversations",), _conversations),
    "prompt-completion": (("prompt", "completion"), _prompt_completion),
    "dolly": (("instruction", "response"), _dolly),
    "alpaca": (("instruction", "output"), _alpaca),
    "natural-instructions": (("input", "output"), _natural_instructions),
    "text": (("text",), _plain_text),
}


def _recognise(record: Record) -> str:
    for name, (columns, _) in FORMATS.items():
        if all(column in record for column in columns):
            return name
    accepted = "; ".join("+".join(columns) for columns, _ in FORMATS.values())
    raise ValueError(
        f"columns {_columns(record)} fit no format; accepted: {accepted}; or say which column is which, as in "
        "`fedtune join --columns prompt=question,completion=answer`"
    )


def _columns(record: Record) -> str:
    return " ".join(", ".join(map(str, record)).split())[:200] or "none"


def _answer(prompt: str | list[Message], response: str, tools: Any = None) -> Row:
    if isinstance(tools, str):  # a table holds them as JSON
        tools = json.loads(tools)
    return Row(prompt, response, (response,), tools or None)


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
    return [_message(message, column) for message in messages]


def _message(message: Any, column: str) -> Message:
    given = message if isinstance(message, dict) else {}
    role, content = given.get("role") or given.get("from"), given.get("content", given.get("value"))
    calls = given.get("tool_calls")
    if isinstance(content, list):
        content = "".join(map(_part, content))
    if content is None and calls:
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"each message in {column!r} needs a string 'role' and a string 'content'")
    extra = {key: given[key] for key in ("name", "tool_call_id") if given.get(key)}
    if calls:
        extra["tool_calls"] = [_call(call) for call in calls]
    return {"role": SPEAKERS.get(role, role), "content": content} | extra


def _part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    raise ValueError(f"a message holds a part of type {str(kind)[:30]!r}; only parts of type 'text' can be learnt")


def _call(call: Any) -> Any:
    """Chat templates take a call's arguments as an object; OpenAI's files hold them as JSON text."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise ValueError("each of a message's 'tool_calls' needs a 'function'")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = json.loads(arguments or "{}")
    return call | {"function": function | {"arguments": arguments}}


def _text(record: Record, column: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must be a string, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
