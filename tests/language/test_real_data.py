"""Real data and a real model: skipped, with the reason, where the development data is absent."""

import pytest

from fedtune_strategies.language.base import base_tensors
from fedtune_strategies.language.data import read_rows
from fedtune_strategies.language.evaluation import evaluate_generation, evaluate_loss
from fedtune_strategies.language.examples import batches, tokenise, tokenise_prompts
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.language.model import load_model


@pytest.fixture(scope="module")
def stories(shared_data):
    return load_model(str(shared_data / "models" / "stories260K-hf"))


@pytest.fixture(scope="module")
def dolly(shared_data):
    return read_rows(shared_data / "dolly15k" / "databricks-dolly-15k.jsonl")


def test_dolly_is_read_whole(dolly):
    assert len(dolly) == 15_011
    michalk = next(
        row for row in dolly if row.prompt[0]["content"].startswith("Who is Maria Ludwiga Michalk?\n\nMaria")
    )
    assert michalk.response.startswith("Maria Ludwiga Michalk is a German politician")


def test_every_natural_instructions_task_is_read(shared_data):
    files = sorted((shared_data / "superni" / "tasks").glob("*.jsonl"))
    assert len(files) > 100
    rows = [row for file in files[:20] for row in read_rows(file)]
    assert all(row.response in row.references for row in rows)
    assert any(len(row.references) > 1 for row in rows)


def test_stories260k_starts_near_four_nats_on_held_out_dolly(stories, dolly):
    assert sum(tensor.numel() for tensor in base_tensors(stories).values()) == 260_032
    held_out = tokenise(dolly[-80:], stories.tokenizer, 256)
    assert len(held_out) == 80 and held_out.cut_prompts > 0
    result = evaluate_loss(stories.model, held_out)
    assert 4.0 < result.loss < 4.5
    batch = next(batches(held_out, 8, 1, (0, 1, "node")))
    assert 3.5 < response_loss(stories.model, batch).item() < 5.0


def test_stories260k_answers(stories, dolly):
    result = evaluate_generation(stories.model, stories.tokenizer, tokenise_prompts(dolly[-4:], stories.tokenizer), 16)
    assert all(answer.isascii() and " " in answer for answer in result.answers)
    assert 0.0 <= result.rouge_l < 0.3
