import json

from fedtune_strategies.config import parse
from fedtune_strategies.language.model import load_model
from server_app.evaluation import evaluate, load_held_out
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
