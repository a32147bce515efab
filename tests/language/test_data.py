import csv
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from fedtune_strategies.errors import DataError
from fedtune_strategies.language.data import FORMATS as DATA_FORMATS
from fedtune_strategies.language.data import Row, read_rows, rows_from


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def user(text):
    return [{"role": "user", "content": text}]


CHAT = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
ANSWER = {"role": "assistant", "content": "hello"}

FORMATS = {
    "text": ({"text": "once"}, Row(None, "once")),
    "messages": ({"messages": [*CHAT, ANSWER]}, Row(CHAT, "hello", ("hello",))),
    "prompt-completion": ({"prompt": "2+2=", "completion": "4"}, Row("2+2=", "4", ("4",))),
    "dolly": (
        {"instruction": "who?", "context": "Ada.", "response": "Ada", "category": "qa"},
        Row(user("who?\n\nAda."), "Ada", ("Ada",)),
    ),
    "alpaca": (
        {"instruction": "who?", "input": "", "output": "Ada", "text": "all of it"},
        Row(user("who?"), "Ada", ("Ada",)),
    ),
    "natural-instructions": (
        {"definition": ["name it"], "input": "x", "output": ["a", "b"]},
        Row(user("name it\n\nx"), "a", ("a", "b")),
    ),
}


@pytest.mark.parametrize("format", FORMATS)
def test_each_format_by_name_and_by_its_columns(tmp_path, format):
    record, row = FORMATS[format]
    path = write_jsonl(tmp_path / "data.jsonl", [record, record])
    assert read_rows(path) == read_rows(path, format) == [row, row]


def test_conversational_prompt_and_completion():
    records = [("row 1", {"prompt": CHAT, "completion": [ANSWER]})]
    assert rows_from(records) == [Row(CHAT, "hello", ("hello",))]


def test_natural_instructions_without_definition_and_with_one_answer():
    assert rows_from([("row 1", {"input": "x", "output": "y"})]) == [Row(user("x"), "y", ("y",))]


RECORDS = [{"instruction": "say, «hi»\nnow", "response": "hé"}, {"instruction": "b", "response": "2"}]


def write_csv(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["instruction", "response"])
        writer.writeheader()
        writer.writerows(RECORDS)


WRITERS = {
    "data.jsonl": lambda path: write_jsonl(path, RECORDS),
    "data.json": lambda path: path.write_text(json.dumps(RECORDS, indent=1)),
    "data.csv": write_csv,
    "data.parquet": lambda path: pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path),
    "folder": lambda path: Dataset.from_list(RECORDS).save_to_disk(path),
    "split-folder": lambda path: DatasetDict(train=Dataset.from_list(RECORDS)).save_to_disk(path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_reads_the_same(tmp_path, name):
    WRITERS[name](tmp_path / name)
    rows = read_rows(tmp_path / name)
    assert rows == [Row(user(record["instruction"]), record["response"], (record["response"],)) for record in RECORDS]


def test_task_file_of_natural_instructions(tmp_path):
    task = {"Definition": ["name it"], "Instances": [{"id": "1", "input": "x", "output": ["a", "b"]}]}
    (tmp_path / "task.json").write_text(json.dumps(task))
    assert read_rows(tmp_path / "task.json") == [Row(user("name it\n\nx"), "a", ("a", "b"))]


def test_blank_lines_and_byte_order_mark_are_skipped(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n{"text": "b"}\n')
    assert [row.response for row in read_rows(path)] == ["a", "b"]


GOOD = '{"prompt": "a", "completion": "b"}\n'

BAD_FILES = {
    "empty.jsonl": ("", "holds no rows"),
    "blank.jsonl": ("\n\n", "holds no rows"),
    "cut.jsonl": (GOOD + '{"prompt": "a", "compl', "line 2: not valid JSON"),
    "latin.jsonl": (GOOD.encode() + b'{"text": "\xe9"}', "line 2: not valid JSON"),
    "list.jsonl": (GOOD + "[1]\n", "line 2: a row must be an object with named columns, not list"),
    "columns.jsonl": (
        '{"question": "a", "reply": "b"}',
        "line 1: columns question, reply fit no format; accepted: mess",
    ),
    "later.jsonl": (
        GOOD + "\n" + '{"prompt": "a"}\n',
        "line 3: format 'prompt-completion' needs the columns prompt, co",
    ),
    "number.jsonl": (
        GOOD + '{"prompt": "a", "completion": 3}',
        "line 2: column 'completion' must be a string, not int",
    ),
    "null.jsonl": (
        '{"prompt": null, "completion": "b"}',
        "line 1: column 'prompt' must be a non-empty list of messages",
    ),
    "silent.jsonl": ('{"prompt": "a", "completion": " "}', "line 1: the response is empty"),
    "mute.jsonl": ('{"prompt": "", "completion": "b"}', "line 1: the prompt is empty"),
    "role.jsonl": ('{"messages": [{"role": "user", "content": "a"}]}', "must be the assistant's, not the user's"),
    "alone.jsonl": ('{"messages": [{"role": "assistant", "content": "a"}]}', "holds only the assistant's answer"),
    "shape.jsonl": ('{"messages": [{"from": "user"}]}', "line 1: each message in 'messages' needs a string 'role'"),
    "answers.jsonl": ('{"input": "a", "output": []}', "line 1: column 'output' must be a string or a non-empty list"),
    "unasked.jsonl": ('{"instruction": "", "response": "a"}', "columns 'instruction' and 'context' are both empty"),
    "cut.json": ('[{"text": "a"},\n {"tex', "line 2: not valid JSON"),
    "empty.json": ("", "holds no rows"),
    "lines.json": (GOOD, "must hold a list of rows, not dict"),
    "number.json": ('[{"text": 1}]', "row 1: column 'text' must be a string, not int"),
    "ragged.csv": ("prompt,completion\na,b\nc\n", "line 3: not as many values"),
    "wide.csv": ("prompt,completion\na,b,c\n", "line 2: not as many values"),
    "quote.csv": ('prompt,completion\n"a,b\n', "not valid CSV"),
    "header.csv": ("prompt,completion\n", "holds no rows"),
    "text.parquet": ("prompt", "not a readable Parquet file"),
    "data.xlsx": ("prompt", "unknown kind of data file; accepted: .jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_gives_one_line_with_its_place(tmp_path, name):
    content, message = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as caught:
        read_rows(path)
    line = str(caught.value)
    assert line.startswith(str(path)) and message in line and "\n" not in line


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl: no such data file; accepted: .jsonl"):
        read_rows(tmp_path / "none.jsonl")


def test_unknown_format(tmp_path):
    with pytest.raises(DataError, match=r"unknown data format 'doly'; accepted: auto, messages"):
        read_rows(write_jsonl(tmp_path / "data.jsonl", RECORDS), "doly")


def test_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(DataError, match=r"not a folder written by Dataset.save_to_disk"):
        read_rows(tmp_path)


def test_dataset_without_train_split(tmp_path):
    DatasetDict(test=Dataset.from_list(RECORDS)).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match="holds the splits test, none named train"):
        read_rows(tmp_path / "data")


def test_examples_of_the_guide_are_read(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    lines = re.findall(r"```jsonl\n(.*?)```", guide, re.DOTALL)
    assert len(lines) == len(FORMATS)
    for name, line in zip(DATA_FORMATS, lines, strict=True):
        (tmp_path / "data.jsonl").write_text(line)
        assert read_rows(tmp_path / "data.jsonl") == read_rows(tmp_path / "data.jsonl", name)
        assert f"| `{name}` |" in guide
