import math

import pytest
import torch

from fedtune_strategies.errors import DataError
from fedtune_strategies.language.data import Row
from fedtune_strategies.language.evaluation import evaluate_generation, evaluate_loss, generate_answers, rouge_l
from fedtune_strategies.language.examples import collate, tokenise
from fedtune_strategies.language.loss import token_losses
from fedtune_strategies.language.model import load_model
from tests.models import CONFIGS, CONTEXT

ROWS = [Row("who is it?", "ada", ("ada", "ada l")), Row("a", "42.", ("42.",)), Row("count: ", "0 1 2 3", ("0 1 2 3",))]


@pytest.fixture(scope="module")
def examples(tokenizer):
    return tokenise(ROWS, tokenizer, 40)


def test_loss_does_not_depend_on_the_batch_size(folders, examples):
    model = load_model(str(folders["llama"])).model
    results = [evaluate_loss(model, examples, batch_size) for batch_size in (1, 2, 3)]
    with torch.no_grad():
        exact = torch.cat([token_losses(model, collate(examples, [i])) for i in range(3)]).mean().item()
    assert [result.loss for result in results] == pytest.approx([exact] * 3, rel=1e-5)
    assert results[0].perplexity == math.exp(results[0].loss)
    assert (results[0].tokens, results[0].examples) == (4 + 4 + 8, 3)


def test_diverged_model_has_infinite_perplexity(folders, examples):
    model = load_model(str(folders["llama"])).model
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    assert evaluate_loss(model, examples).perplexity == math.inf


def greedy(model, ids, max_new_tokens, stop):
    """Plain greedy decoding, one token at a time, without cache or padding."""
    ids, new = list(ids), []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = model(torch.tensor([ids + new])).logits[0, -1].argmax().item()
        if token in stop:
            break
        new.append(token)
    return new


@pytest.mark.parametrize("name", CONFIGS)
def test_batched_answers_are_greedy(folders, examples, name):
    language = load_model(str(folders[name]))
    language.model.generation_config.repetition_penalty = 3.0  # a chat model's habit that must not count
    prompts = [ids[:start].tolist() for ids, start in zip(examples.tokens, examples.prompt_lengths, strict=True)]
    answers = generate_answers(language.model, language.tokenizer, prompts, max_new_tokens=8)
    stop = {language.tokenizer.eos_token_id, language.model.generation_config.eos_token_id}
    expected = [greedy(language.model, prompt, 8, stop) for prompt in prompts]
    decoded = [language.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected]
    assert answers == decoded
    assert any(answers)


def test_answer_stops_at_the_models_own_end_token(folders, tokenizer):
    language = load_model(str(folders["llama"]))
    prompt = tokenizer("who is it?").input_ids
    first, second, third, *_ = greedy(language.model, prompt, 4, set())
    language.model.generation_config.eos_token_id = [third]
    answer = generate_answers(language.model, language.tokenizer, [prompt], max_new_tokens=8)[0]
    assert third not in (first, second)
    assert answer == tokenizer.decode([first, second], skip_special_tokens=True).strip()


def test_prompt_as_long_as_the_context_is_cut(folders):
    language = load_model(str(folders["gpt2"]))
    long = [3 + i % 50 for i in range(CONTEXT)]
    answers = generate_answers(language.model, language.tokenizer, [long, long[8:]], max_new_tokens=8)
    assert answers[0] == answers[1]


def test_empty_prompt_is_answered(folders):
    language = load_model(str(folders["llama"]))
    assert len(generate_answers(language.model, language.tokenizer, [[], [5, 6]], max_new_tokens=2)) == 2


def test_plain_text_has_no_answers(folders, tokenizer):
    language = load_model(str(folders["llama"]))
    with pytest.raises(DataError, match=r"set 'eval\.answers' to 0"):
        evaluate_generation(language.model, tokenizer, tokenise([Row(None, "once")], tokenizer, 20))


def test_rouge_l_of_hand_computed_pairs():
    # "the cat sat" against "the cat lay down": common subsequence 2, precision 2/3, recall 2/4, F1 4/7.
    assert rouge_l(["the cat sat"], [["the cat lay down"]]) == pytest.approx(4 / 7)
    assert rouge_l(["The CAT!"], [["the cat"]]) == 1.0
    assert rouge_l(["cats"], [["cat"]]) == 0.0
    assert rouge_l([""], [["a"]]) == 0.0


def test_rouge_l_takes_the_best_reference_and_the_mean_over_rows():
    assert rouge_l(["yes", "no"], [["no", "yes"], ["yes"]]) == 0.5


def test_generation_is_scored_against_all_references(folders, examples):
    language = load_model(str(folders["llama"]))
    result = evaluate_generation(language.model, language.tokenizer, examples, max_new_tokens=6)
    assert result.rouge_l == rouge_l(result.answers, [row.references for row in ROWS])
    assert len(result.answers) == 3
