import math

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from fedtune_strategies.errors import DataError
from fedtune_strategies.language.data import Row
from fedtune_strategies.language.evaluation import evaluate_generation, evaluate_loss, generate_answers, rouge_l
from fedtune_strategies.language.examples import collate, tokenise, tokenise_prompts
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
def test_batched_answers_are_greedy(folders, name):
    language = load_model(str(folders[name]))
    language.model.generation_config.repetition_penalty = 3.0  # a chat model's habit that must not count
    prompts = tokenise_prompts(ROWS, language.tokenizer).tokens
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


def test_cut_prompt_keeps_its_first_token_of_all(folders):
    language = load_model(str(folders["llama"]))
    bos = language.tokenizer.bos_token_id
    long = [bos, *(3 + i % 50 for i in range(CONTEXT))]
    answers = generate_answers(language.model, language.tokenizer, [long, [bos, *long[-119:]]], max_new_tokens=8)
    assert answers[0] == answers[1]


def test_plain_text_has_no_answers(tokenizer):
    with pytest.raises(DataError, match=r"set 'eval\.answers' to 0"):
        tokenise_prompts([Row(None, "once")], tokenizer)


def test_answers_do_not_depend_on_the_references_length(folders):
    language = load_model(str(folders["llama"]))
    short, long = ([Row("who is it?", text, (text,))] for text in ("a", "a" * 500))
    answers = [
        evaluate_generation(language.model, language.tokenizer, tokenise_prompts(rows, language.tokenizer), 8).answers
        for rows in (short, long)
    ]
    assert answers[0] == answers[1]


def test_prompts_that_do_not_fit_beside_the_answer_are_counted_and_said(folders, caplog):
    language = load_model(str(folders["llama"]))
    rows = [Row("a" * (CONTEXT - 9 + extra), "a", ("a",)) for extra in (0, 1, 2)]  # and a token that begins the text
    result = evaluate_generation(language.model, language.tokenizer, tokenise_prompts(rows, language.tokenizer), 8)
    assert result.cut_prompts == 2 and len(result.answers) == 3
    assert "2 of 3 prompts lost their beginning: more than 120 tokens" in caplog.text


def test_rouge_l_of_hand_computed_pairs():
    # "the cat sat" against "the cat lay down": common subsequence 2, precision 2/3, recall 2/4, F1 4/7.
    assert rouge_l(["the cat sat"], [["the cat lay down"]]) == pytest.approx(4 / 7)
    assert rouge_l(["The CAT!"], [["the cat"]]) == 1.0
    assert rouge_l(["cats"], [["cat"]]) == 0.0
    assert rouge_l([""], [["a"]]) == 0.0


def test_rouge_l_takes_the_best_reference_and_the_mean_over_rows():
    assert rouge_l(["yes", "no"], [["no", "yes"], ["yes"]]) == 0.5


SCRIPTS = [
    "\u6d77\u662f\u54b8\u6c34",  # Chinese
    "\u043c\u043e\u0440\u0435",  # Russian
    "\u0938\u092e\u0941\u0926\u094d\u0930",  # Hindi
    "\u0627\u0644\u0628\u062d\u0631",  # Arabic
    "\u0e17\u0e30\u0e40\u0e25",  # Thai
    "\u30b3\u30fc\u30d2\u30fc",  # Japanese
    "\ubc14\ub2e4",  # Korean
    "caf\u00e9",
    "\U0001f30a",
    ">=",
]


@pytest.mark.parametrize("text", SCRIPTS)
def test_equal_texts_score_one_in_every_script(text):
    assert rouge_l([text], [[text]]) == 1.0
    assert rouge_l([text], [["sea"]]) == 0.0


def test_scripts_without_spaces_count_characters_and_others_words():
    assert rouge_l([SCRIPTS[0][:2]], [[SCRIPTS[0]]]) == pytest.approx(2 / 3)  # precision 1, recall 2/4
    assert rouge_l(["\u30b3\u30fc"], [["\u30b3\u30fc\u30d2\u30fc"]]) == pytest.approx(2 / 3)
    assert rouge_l([SCRIPTS[1][:3]], [[SCRIPTS[1]]]) == 0.0  # another word
    assert rouge_l(["cafe\u0301"], [["caf\u00e9"]]) == 1.0  # one letter, written in two ways
    assert rouge_l(["GPT\u662f\u6d77"], [["gpt \u662f \u6d77"]]) == 1.0


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
def test_rouge_l_of_english_is_that_of_the_package(prediction, reference):
    assume(any(c.isalnum() for c in prediction) or any(c.isalnum() for c in reference))
    expected = RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure
    assert rouge_l([prediction], [[reference]]) == expected


def test_generation_is_scored_against_all_references(folders):
    language = load_model(str(folders["llama"]))
    prompts = tokenise_prompts(ROWS, language.tokenizer)
    result = evaluate_generation(language.model, language.tokenizer, prompts, max_new_tokens=6)
    assert result.rouge_l == rouge_l(result.answers, [row.references for row in ROWS])
    assert (len(result.answers), result.cut_prompts) == (3, 0)
