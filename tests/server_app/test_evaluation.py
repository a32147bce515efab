import json
from dataclasses import replace

import pytest

from fedtune_strategies.language.data import Row
from fedtune_strategies.language.model import load_model
from fedtune_strategies.run_config import parse
from server_app.evaluation import _spread, evaluate, load_held_out
from tests.conftest import write_rows


def test_without_answers_no_row_is_read_for_them(settings, tmp_path):
    """The first row, which answers would begin with, has a response longer than a sequence."""
    path = write_rows(tmp_path / "held.jsonl", 12)
    path.write_text(json.dumps({"prompt": "the cat ", "completion": "a" * 100}) + "\n" + path.read_text())
    config = parse(settings | {"eval.data": str(path), "eval.answers": 0})
    language = load_model(config.model.name, config.model.dtype)
    held_out = load_held_out(config, language)
    assert held_out.answers is None and len(held_out.loss) == 13
    assert "eval/rougeL" not in evaluate(language, held_out, config, with_answers=True)


def test_prompts_are_whole_where_the_reference_fills_the_sequence(settings, tmp_path):
    path = tmp_path / "held.jsonl"
    path.write_text(json.dumps({"prompt": "the cat sat on the mat ", "completion": "and the dog " * 20}) + "\n")
    path.write_text(path.read_text() + json.dumps({"prompt": "a ", "completion": "b"}) + "\n")
    config = parse(settings | {"eval.data": str(path), "eval.answers": 2, "eval.max-new-tokens": 2})
    language = load_model(config.model.name, config.model.dtype)
    facts = evaluate(language, load_held_out(config, language), config, with_answers=True)
    assert "the cat sat on the mat" in facts["answers"][0]["prompt"]
    assert facts["cut_prompts"] == 0 and 0 <= facts["eval/rougeL"] <= 1


def test_answers_end_where_they_would_take_too_long_and_the_last_ones_are_those_of_the_first(settings, tmp_path):
    path = write_rows(tmp_path / "held.jsonl", 12)
    config = parse(settings | {"eval.data": str(path), "eval.answers": 12, "eval.max-new-tokens": 1})
    language = load_model(config.model.name, config.model.dtype)
    held_out, told = load_held_out(config, language), []
    hurried = replace(config, round=replace(config.round, deadline=1e-6))
    first = evaluate(language, held_out, hurried, with_answers=True, tell=lambda *far: told.append(far))
    assert first["answered"] == 8 and told == [(12, 12), (8, 12)]
    last = evaluate(language, held_out, config, with_answers=True, most=first["answered"])
    assert (last["answered"], last["answers"]) == (8, first["answers"])
    assert evaluate(language, held_out, config, with_answers=True)["answered"] == 12


@pytest.mark.parametrize(("rows", "count", "expected"), [(10, 5, [1, 3, 5, 7, 9]), (7, 2, [1, 5]), (3, 9, [0, 1, 2])])
def test_held_out_rows_are_spread_over_the_whole_file(rows, count, expected):
    assert [int(row.response) for row in _spread([Row("", str(i)) for i in range(rows)], count)] == expected
