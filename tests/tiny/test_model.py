import json
from itertools import islice, repeat

import pytest
import torch
from pretraining.corpus import documents
from pretraining.train import batches, new_model, train_model, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune_strategies.tiny import MODEL_FOLDER
from fedtune_strategies.tiny.tasks import TASKS, UNSEEN, rows


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()


def answer_loss(model, tokenizer, task, count=8) -> float:
    """Mean cross-entropy of the answers' tokens and the end of sequence."""
    total = tokens = 0
    for row in rows(task, "evaluate", count, seed=1):
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        tokens += len(answer)
    return total / tokens


def greedy(model, tokenizer, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_folder_is_whole_and_small():
    names = {path.name for path in MODEL_FOLDER.iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "README.md"),
    }
    assert sum(path.stat().st_size for path in MODEL_FOLDER.iterdir()) < 8_000_000
    assert json.loads((MODEL_FOLDER / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_tokenizer_has_its_special_tokens_and_loses_nothing(tokenizer):
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
    text = "Instruction: Grüße, 世界!\nInput: a  b\tc\nAnswer: 42"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_prompt_and_answer_meet_at_a_token(tokenizer):
    for task in (*TASKS, UNSEEN):
        for row in rows(task, "tune", 4, seed=0):
            prompt, answer = (
                tokenizer(row[key], add_special_tokens=False)["input_ids"] for key in ("prompt", "completion")
            )
            assert (
                prompt + answer == tokenizer(row["prompt"] + row["completion"], add_special_tokens=False)["input_ids"]
            )


def test_model_knows_the_skills_but_not_yet_the_manner(model, tokenizer):
    assert 2_000_000 < model.num_parameters() < 3_000_000
    losses = {task.name: answer_loss(model, tokenizer, task) for task in (*TASKS, UNSEEN)}
    assert 0.4 < sum(losses.values()) / len(losses) < 2.5, losses  # untrained: ln(vocabulary), about 7
    replies = [(greedy(model, tokenizer, row["prompt"]), row["completion"]) for row in rows(UNSEEN, "evaluate", 8, 1)]
    assert sum(answer in reply for reply, answer in replies) >= 6
    assert sum(reply == answer for reply, answer in replies) <= 1, "a tuned model, not a base model"


def test_training_learns_and_repeats_itself():
    texts = ["".join(given + said for given, said in document) for document in islice(documents(seed=3), 200)]
    tokenizer = train_tokenizer(texts)
    assert train_tokenizer(texts).get_vocab() == tokenizer.get_vocab()

    def trained() -> tuple[float, float]:
        torch.manual_seed(0)
        model = new_model(tokenizer)
        ids, labels = next(batches(documents(seed=3), tokenizer, size=4))
        with torch.no_grad():
            before = model(ids, labels=labels).loss.item()
        train_model(model, repeat((ids, labels)), steps=4, peak_lr=3e-2)
        with torch.no_grad():
            return before, model(ids, labels=labels).loss.item()

    before, after = trained()
    assert after < before - 0.5
    assert trained() == (before, after)
