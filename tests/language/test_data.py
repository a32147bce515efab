import csv
import gzip
import json
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict

from fedtune_strategies.errors import DataError, ModelError
from fedtune_strategies.language import data_files
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
    "conversations": (
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        Row(user("hi"), "hello", ("hello",)),
    ),
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
    "latin.jsonl": (GOOD.encode() + b'{"text": "\xe9"}', "line 2: not UTF-8 text"),
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
    "listed.json": ("[[1]]", "row 1: a row must be an object with named columns, not list"),
    "twice.csv": ("prompt,completion,completion\na,b,c\n", "column 'completion' stands twice in the header"),
    "twice.jsonl": ('{"prompt": "a", "completion": "b", "completion": "c"}', "column 'completion' stands twice"),
    "capitals.jsonl": ('{"prompt": "a", "completion": "b", "Completion": "c"}', "column 'completion' stands twice"),
    "image.jsonl": (
        '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
        "a part of type 'image_url'",
    ),
    "windows.csv": (
        b"prompt,completion\n" + b"a,b\n" * 3000 + b"\x93hi\x94,b\n",
        "line 3002: not UTF-8 text",
    ),
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


def test_folder_without_data_files(tmp_path):
    with pytest.raises(DataError, match="holds no data files"):
        read_rows(tmp_path)


def test_dataset_without_train_split(tmp_path):
    DatasetDict(test=Dataset.from_list(RECORDS)).save_to_disk(tmp_path / "data")
    with pytest.raises(DataError, match="holds the splits test, none named train"):
        read_rows(tmp_path / "data")


def test_examples_of_the_guide_are_read(tmp_path):
    guide = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    lines = "".join(re.findall(r"```jsonl\n(.*?)```", guide, re.DOTALL)).splitlines()
    assert len(lines) == len(FORMATS)
    for name, line in zip(DATA_FORMATS, lines, strict=True):
        (tmp_path / "data.jsonl").write_text(line)
        assert read_rows(tmp_path / "data.jsonl") == read_rows(tmp_path / "data.jsonl", name)
        assert f"| `{name}` |" in guide


PLAIN = [Row("a", "b", ("b",)), Row("ö", "d", ("d",))]
LINES = '{"prompt": "a", "completion": "b"}\n{"prompt": "ö", "completion": "d"}\n'
SHEET = "Prompt; Completion \na;b\nö;d\n"

SAME = {
    "utf8.jsonl": LINES.encode(),
    "mark.jsonl": LINES.encode("utf-8-sig"),
    "utf16.jsonl": LINES.encode("utf-16"),
    "big-endian.jsonl": LINES.encode("utf-16-be"),
    "utf16.csv": SHEET.replace("; ", ";").encode("utf-16"),
    "semicolon.csv": SHEET.encode(),
    "tabs.csv": SHEET.replace("; ", "\t").replace(";", "\t").encode(),
    "tabs.TSV": SHEET.replace("; ", "\t").replace(";", "\t").encode(),
    "blanks.csv": SHEET.replace(";", ", ").encode(),
    "UPPER.JSONL": LINES.encode(),
    "lines.ndjson": LINES.encode(),
    "packed.jsonl.gz": gzip.compress(LINES.encode()),
    "packed16.csv.gz": gzip.compress(SHEET.encode("utf-16")),
    "lines.json": LINES.encode(),
    "spread.jsonl": LINES.replace("{", "{\n").encode(),
    "wrapped.json": ('{"data": [' + LINES.strip().replace("\n", ",") + "]}").encode(),
}


@pytest.mark.parametrize("name", SAME)
def test_encodings_separators_and_endings_read_the_same(tmp_path, name):
    (tmp_path / name).write_bytes(SAME[name])
    assert read_rows(tmp_path / name) == PLAIN


def test_a_folder_is_read_in_the_order_of_names_without_hidden_files(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [{"text": "2"}])
    write_jsonl(tmp_path / "a.jsonl", [{"text": "1"}])
    (tmp_path / "._a.jsonl").write_bytes(b"\0\1")
    (tmp_path / "README.md").write_text("about")
    assert [row.response for row in read_rows(tmp_path)] == ["1", "2"]
    assert [row.response for row in read_rows(tmp_path / "[ab].jsonl")] == ["1", "2"]


def test_of_a_hub_folder_only_the_training_split_is_read(tmp_path):
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        table = pyarrow.Table.from_pylist([{"text": split}])
        pyarrow.parquet.write_table(table, tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    assert [row.response for row in read_rows(tmp_path)] == ["train"]


def test_paragraphs_of_a_text_file_are_texts_to_learn(tmp_path):
    (tmp_path / "book.txt").write_text("one\ntwo\n\n\nthree\n")
    assert [row.response for row in read_rows(tmp_path / "book.txt")] == ["one\ntwo", "three"]


def test_nan_is_missing_and_half_an_emoji_is_replaced_and_counted(tmp_path, caplog):
    path = tmp_path / "data.jsonl"
    path.write_text('{"instruction": "hi \\ud83d", "input": NaN, "output": "ho"}\n')
    assert read_rows(path) == [Row(user("hi \ufffd"), "ho", ("ho",))]
    assert "1 rows hold characters" in caplog.text
    table = pyarrow.Table.from_pylist([{"instruction": "hi", "input": float("nan"), "output": "ho"}])
    pyarrow.parquet.write_table(table, tmp_path / "data.parquet")
    assert read_rows(tmp_path / "data.parquet") == [Row(user("hi"), "ho", ("ho",))]


def test_a_field_may_be_of_any_length(tmp_path):
    (tmp_path / "long.csv").write_text("prompt,completion\na," + "x" * 200_000 + "\n")
    assert len(read_rows(tmp_path / "long.csv")[0].response) == 200_000


def test_tool_calls_and_their_descriptions_reach_the_template():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "how "}, {"type": "text", "text": "warm?"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "assistant", "content": "4 degrees"},
    ]
    (row,) = rows_from([("line 1", {"messages": messages, "tools": [{"type": "function"}]})])
    assert row.prompt[0]["content"] == "how warm?" and row.tools == [{"type": "function"}]
    assert row.prompt[1]["tool_calls"][0]["function"]["arguments"] == {"x": 1}
    assert row.response == "4 degrees"


def test_the_owner_names_the_columns(tmp_path):
    path = write_jsonl(tmp_path / "data.jsonl", [{" Question": "a", "answer": "b", "text": "other"}])
    assert read_rows(path, columns="prompt=question, completion=Answer") == [Row("a", "b", ("b",))]
    with pytest.raises(DataError, match="has no column 'reply', but question, answer, text"):
        read_rows(path, columns="prompt=question,completion=reply")
    with pytest.raises(DataError, match="write them as prompt=question"):
        read_rows(path, columns="prompt")


def test_all_bad_rows_are_counted_and_left_out_by_the_owners_word(tmp_path, caplog):
    records = [{"prompt": "a", "completion": "" if i % 10 == 3 else "b"} for i in range(100)]
    path = write_jsonl(tmp_path / "data.jsonl", records)
    with pytest.raises(DataError, match=r"10 of 100 rows are bad, line 4, .*line 44: .*; and 5 more") as caught:
        read_rows(path)
    assert "\n" not in str(caught.value)
    assert len(read_rows(path, skip_bad=True)) == 90
    assert "10 bad rows are left out" in caplog.text
    with pytest.raises(DataError, match="2 of 2 rows are bad"):
        read_rows(write_jsonl(path, records[3:4] * 2), skip_bad=True)


def test_the_public_line_of_bad_data_holds_neither_text_nor_path(tmp_path):
    (tmp_path / "secret-notes.csv").write_text("Ada has a cold,rest\nBob is well,\n")
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path / "secret-notes.csv")
    assert "ada has a cold" in str(caught.value)
    for word in ("ada", "cold", "secret", str(tmp_path)):
        assert word not in caught.value.public.casefold()


def test_a_public_line_names_files_without_their_folders():
    error = ModelError("model: /home/ada/my/model.safetensors is cut; ~/x/y.bin and owner/model stay")
    assert error.public == "model: model.safetensors is cut; y.bin and owner/model stay"


@pytest.mark.parametrize(("rows", "text"), [(2_000, "x" * 100_000), (200_000, "")])
def test_small_table_that_unpacks_to_more_than_memory_is_refused(tmp_path, monkeypatch, rows, text):
    """By a long text that the file holds once, and by many rows of nothing."""
    indices, texts = pyarrow.nulls(rows, pyarrow.int32()).fill_null(0), pyarrow.array([text])
    table = pyarrow.table({"text": pyarrow.DictionaryArray.from_arrays(indices, texts)})
    path = tmp_path / "bomb.parquet"
    pyarrow.parquet.write_table(table, path)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(data_files, "_free_memory", lambda: 90_000_000)
    with pytest.raises(DataError, match=r"more than the 0\.1 GB that are free"):
        read_rows(path)


def test_a_row_nested_deeper_than_python_follows_is_a_bad_row(tmp_path):
    path = tmp_path / "deep.jsonl"
    for depth in (300, 600, 900, 100_000):
        path.write_text('{"prompt": "a", "completion": "b"}\n{"messages": ' + "[" * depth + "]" * depth + "}\n")
        with pytest.raises(DataError, match="line 2: "):
            read_rows(path)


def test_packed_file_that_unpacks_to_more_than_memory_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bomb.jsonl.gz").write_bytes(gzip.compress(b" " * 1_000_000))
    monkeypatch.setattr(data_files, "_free_memory", lambda: 100_000)
    with pytest.raises(DataError, match="unpacks to more than"):
        read_rows(tmp_path / "bomb.jsonl.gz")
