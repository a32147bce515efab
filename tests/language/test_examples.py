import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, processors

from fedtune_strategies.errors import DataError
from fedtune_strategies.language.chat import try_template
from fedtune_strategies.language.data import Row
from fedtune_strategies.language.examples import (
    CHUNK,
    IGNORE,
    Examples,
    _fit,
    batches,
    collate,
    tokenise,
    tokenise_prompts,
)
from tests.models import make_tokenizer

CHAT_TEMPLATE = (
    "{% for m in messages %}|{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}|assistant:{% endif %}"
)
MESSAGES = [{"role": "user", "content": "who is it?"}]


def parts(examples, tokenizer, i=0):
    ids, start = examples.tokens[i], examples.prompt_lengths[i]
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


@pytest.fixture(scope="module")
def chat_tokenizer():
    tokenizer = make_tokenizer(pad_token="<unk>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_plain_template(tokenizer):
    examples = tokenise([Row(MESSAGES, "ada", ("ada",))], tokenizer, 100)
    assert parts(examples, tokenizer) == ("<s>### Instruction:\nwho is it?\n\n### Response:\n", "ada</s>")
    assert examples.references == [("ada",)]


def test_string_prompt_stays_as_written(tokenizer):
    assert parts(tokenise([Row("2 is ", "two")], tokenizer, 100), tokenizer) == ("<s>2 is ", "two</s>")


def test_plain_text_is_all_response(tokenizer):
    examples = tokenise([Row(None, "once")], tokenizer, 100)
    assert parts(examples, tokenizer) == ("", "<s>once</s>")


@pytest.mark.parametrize("prompt", [MESSAGES, "who is it?"])
def test_chat_template_shapes_conversations_and_strings_alike(chat_tokenizer, prompt):
    examples = tokenise([Row(prompt, "ada")], chat_tokenizer, 100)
    assert parts(examples, chat_tokenizer) == ("|user:who is it?</s>|assistant:", "ada</s>")


def test_plain_text_under_a_chat_template_gets_the_tokenizers_own_special_tokens(chat_tokenizer):
    assert parts(tokenise([Row(None, "once")], chat_tokenizer, 100), chat_tokenizer) == ("", "<s>once</s>")


def test_template_that_opens_answers_differently_when_generating():
    tokenizer = make_tokenizer(pad_token="<unk>")
    tokenizer.chat_template = CHAT_TEMPLATE.replace("|assistant:{% endif", "|assistant:#{% endif")
    assert parts(tokenise([Row("who", "ada")], tokenizer, 100), tokenizer) == ("|user:who</s>|assistant:#", "ada</s>")


def test_conversation_that_the_template_refuses():
    tokenizer = make_tokenizer(pad_token="<unk>")
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusal.replace("system", "tool") + CHAT_TEMPLATE
    refused = [{"role": "tool", "content": "be brief"}, *MESSAGES]
    with pytest.raises(DataError, match="row 2: the model's chat template refuses the conversation: no tool"):
        tokenise([Row(MESSAGES, "ada"), Row(refused, "ada")], tokenizer, 100)


REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
LOSES_SYSTEM = (
    "{% for m in messages if m.role != 'system' %}|{{ m.role }}:{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}|assistant:{% endif %}"
)


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, LOSES_SYSTEM])
def test_system_text_stands_before_the_users_first_where_the_template_takes_no_system_message(template, caplog):
    tokenizer = make_tokenizer(pad_token="<unk>")
    tokenizer.chat_template = template
    rows = [Row([{"role": "system", "content": "be brief"}, *MESSAGES], "ada", ("ada",)), Row(MESSAGES, "ada")]
    with caplog.at_level(logging.WARNING):
        examples = tokenise(rows, tokenizer, 100)
    assert parts(examples, tokenizer) == ("|user:be brief\n\nwho is it?</s>|assistant:", "ada</s>")
    assert "1 of 2 rows: the model's chat template takes no system message" in caplog.text
    assert tokenizer.decode(tokenise_prompts(rows, tokenizer).tokens[0]) == parts(examples, tokenizer)[0]
    assert try_template(rows, tokenizer) == 1


def test_a_template_that_takes_system_messages_gets_them(chat_tokenizer):
    rows = [Row([{"role": "system", "content": "be brief"}, *MESSAGES], "ada")]
    assert parts(tokenise(rows, chat_tokenizer, 100), chat_tokenizer)[0].startswith("|system:be brief</s>|user:")
    assert try_template(rows, chat_tokenizer) == 0


def test_trying_a_template_names_the_row_that_it_refuses(chat_tokenizer, monkeypatch):
    monkeypatch.setattr("fedtune_strategies.language.chat.TRIED", 2)
    tokenizer = make_tokenizer(pad_token="<unk>")
    tokenizer.chat_template = REFUSES_SYSTEM
    alone = Row([{"role": "system", "content": "be brief"}, {"role": "assistant", "content": "who"}], "ada")
    with pytest.raises(DataError, match=r"row 3: .* no system"):  # every second of four is tried
        try_template([Row(MESSAGES, "ada"), Row(MESSAGES, "ada"), alone, Row(MESSAGES, "ada")], tokenizer)


@pytest.mark.parametrize("text", ["<s>once</s>", "<s>once", "once</s>", "once"])
def test_text_that_is_formatted_already_is_not_closed_twice(chat_tokenizer, text):
    examples = tokenise([Row(None, text)], chat_tokenizer, 100)
    assert parts(examples, chat_tokenizer) == ("", "<s>once</s>")


@pytest.mark.parametrize("completion", ["ada", "ada</s>"])
def test_a_prompt_that_is_formatted_already_is_learnt_as_written(tokenizer, chat_tokenizer, completion):
    row = Row("<s>|user:who</s>|assistant:", completion)
    for known in (chat_tokenizer, tokenizer):
        assert parts(tokenise([row], known, 100), known) == ("<s>|user:who</s>|assistant:", "ada</s>")
        assert known.decode(tokenise_prompts([row], known).tokens[0]) == "<s>|user:who</s>|assistant:"


def test_tool_calls_and_descriptions_of_tools_reach_the_template():
    tokenizer = make_tokenizer(pad_token="<unk>")
    calls = "{% for c in m['tool_calls'] or [] %}#{{ c.function.name }}{% endfor %}"
    tokenizer.chat_template = "{% for t in tools or [] %}#{{ t.function.name }}#{% endfor %}" + CHAT_TEMPLATE.replace(
        "</s>", calls + "</s>"
    )
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    asked = [*MESSAGES, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]
    examples = tokenise([Row(asked, "ada", ("ada",), [tool])], tokenizer, 100)
    assert parts(examples, tokenizer) == ("#f#|user:who is it?</s>|assistant:#f</s>|assistant:", "ada</s>")


def test_tool_calls_without_a_chat_template_are_refused(tokenizer):
    with pytest.raises(DataError, match="row 1: calls tools, but the model has no chat template"):
        tokenise([Row(MESSAGES, "ada", tools=[{"type": "function"}])], tokenizer, 100)


def test_token_across_the_boundary_belongs_to_the_response():
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"<unk>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<unk>")
    examples = tokenise([Row("aa", "bb")], tokenizer, 10)
    assert examples.tokens[0].tolist() == [1, 3, 2]
    assert examples.prompt_lengths == [1]


def test_long_prompt_loses_its_beginning(tokenizer):
    examples = tokenise([Row("abcdefgh", "xyz")], tokenizer, 8)
    assert parts(examples, tokenizer) == ("<s>fgh", "xyz</s>")
    assert (examples.cut_prompts, examples.truncated, examples.dropped) == (1, 0, 0)


def test_long_response_loses_its_end_and_is_counted(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        examples = tokenise([Row("abcdefgh", "uvwxyz0123"), Row("a", "b")], tokenizer, 8)
    assert parts(examples, tokenizer) == ("<s>h", "uvwxyz")
    assert examples.truncated == 1
    assert "1 of 2 responses lost their end: longer than 8 tokens" in caplog.text


def test_no_response_fits(tokenizer):
    with pytest.raises(DataError, match=r"not one of the 2 responses fits in 8 tokens; raise 'train.seq-length'"):
        tokenise([Row("a", "0123456789")] * 2, tokenizer, 8)


def test_long_plain_text_is_cut(tokenizer):
    examples = tokenise([Row(None, "0123456789")], tokenizer, 8)
    assert parts(examples, tokenizer) == ("", "<s>0123456")


def test_row_with_nothing_to_predict_is_dropped():
    tokenizer = make_tokenizer(pad_token="<unk>", bos_token=None, eos_token=None)
    tokenizer.backend_tokenizer.post_processor = None
    examples = tokenise([Row(None, "a"), Row(None, "ab")], tokenizer, 8)
    assert (len(examples), examples.dropped) == (1, 1)


def test_chunks_join_in_order(tokenizer):
    rows = [Row("n", str(i)) for i in range(CHUNK + 3)]
    examples = tokenise(rows, tokenizer, 20)
    assert [parts(examples, tokenizer, i)[1] for i in (0, CHUNK, CHUNK + 2)] == ["0</s>", "1000</s>", "1002</s>"]


@given(st.integers(0, 30), st.integers(1, 30), st.integers(2, 20), st.booleans())
def test_fit_keeps_the_response_where_it_can(prompt_length, response_length, seq_length, has_bos):
    ids = list(range(prompt_length + response_length))
    fitted, start = _fit(ids, prompt_length, seq_length, 0 if has_bos else None)
    prompt, response = fitted[:start], fitted[start:]
    assert len(fitted) == min(len(ids), seq_length)
    assert start == min(prompt_length, max(seq_length - response_length, seq_length // 4))
    assert response == ids[prompt_length:][: len(response)]
    tail = prompt[1:] if has_bos and start > 1 else prompt
    assert tail == ids[prompt_length - len(tail) : prompt_length]
    assert prompt == tail or prompt[0] == 0


@given(st.integers(0, 60), st.integers(1, 60), st.integers(2, 40))
def test_one_response_token_more_moves_the_split_by_one_at_most(prompt_length, response_length, seq_length):
    starts = [_fit(list(range(prompt_length + n)), prompt_length, seq_length, None)[1] for n in (0, 1)]
    longer = [
        _fit(list(range(prompt_length + n)), prompt_length, seq_length, None)[1]
        for n in (response_length, response_length + 1)
    ]
    assert 0 <= starts[0] - starts[1] <= 1 and 0 <= longer[0] - longer[1] <= 1


def test_prompts_are_tokenised_alone_and_whole(tokenizer):
    rows = [Row("abcdefgh" * 9, "x" * 99, ("x",)), Row("a", "b", ("b", "c"))]
    prompts = tokenise_prompts(rows, tokenizer)
    assert [tokenizer.decode(ids) for ids in prompts.tokens] == ["<s>" + "abcdefgh" * 9, "<s>a"]
    assert prompts.references == [("x",), ("b", "c")]


def test_prompt_is_left_open_by_a_tokenizer_that_closes_every_text():
    tokenizer = make_tokenizer(pad_token="<unk>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert [tokenizer.decode(ids) for ids in tokenise_prompts([Row("a", "b")], tokenizer).tokens] == ["<s>a"]


def thinking_tokenizer(opening=""):
    """Its template drops the thoughts of answers, and may open one when asked to generate."""
    tokenizer = make_tokenizer(pad_token="<unk>")
    tokenizer.backend_tokenizer.model = models.WordLevel(
        {token: i for i, token in enumerate([*tokenizer.convert_ids_to_tokens(range(64)), "<", ">", "/"]) if token},
        unk_token="<unk>",
    )
    content = "{{ m['content'].split('</think>')[-1] }}"
    tokenizer.chat_template = CHAT_TEMPLATE.replace("{{ m['content'] }}", content).replace(
        "|assistant:{% endif", f"|assistant:{opening}{{% endif"
    )
    return tokenizer


THOUGHT = "<think>2 and 2</think>four"


@pytest.mark.parametrize(
    ("opening", "answer", "expected"),
    [
        ("", THOUGHT, ("|assistant:", THOUGHT)),
        ("", "four", ("|assistant:", "four")),
        ("<think>\n", THOUGHT, ("|assistant:<think>\n", "2 and 2</think>four")),
        ("<think>\n", "four", ("|assistant:<think>\n\n</think>\n\n", "four")),
    ],
)
def test_reasoning_is_learnt_as_written_and_opened_once(opening, answer, expected):
    tokenizer = thinking_tokenizer(opening)
    examples = tokenise([Row("who", answer)], tokenizer, 100)
    assert parts(examples, tokenizer) == ("|user:who</s>" + expected[0], expected[1] + "</s>")


def test_template_that_loses_the_text_is_refused():
    tokenizer = make_tokenizer(pad_token="<unk>")
    tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "{{ m['content'] }}", "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}"
    )
    with pytest.raises(DataError, match="row 1: the model's chat template loses the prompt's text"):
        tokenise([Row(MESSAGES, "ada")], tokenizer, 100)


def make_examples(count):
    tokens = [np.array([i, i], dtype=np.int32) for i in range(count)]
    return Examples(tokens, [1] * count, [()] * count, 0)


def drawn(examples, batch_size, steps, key):
    return [batch["input_ids"][:, 0].tolist() for batch in batches(examples, batch_size, steps, key)]


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 25), st.integers(1, 5), st.integers(-(2**70), 2**70), st.text(max_size=5))
def test_batches_visit_every_example_once_an_epoch(count, batch_size, steps, seed, node):
    order = drawn(make_examples(count), batch_size, steps, (seed, node))
    assert [len(batch) for batch in order] == [batch_size] * steps
    flat = [i for batch in order for i in batch]
    for epoch in range(len(flat) // count):
        assert sorted(flat[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_batches_depend_on_the_key_alone():
    examples = make_examples(50)
    first = drawn(examples, 4, 30, (1, 2, "node"))
    assert first == drawn(examples, 4, 30, (1, 2, "node"))
    assert first[:10] == drawn(examples, 4, 10, (1, 2, "node"))
    others = [drawn(examples, 4, 30, key) for key in [(1, 2, "edon"), (1, 3, "node"), (2, 1, "node")]]
    assert all(first != other for other in others)


def test_batches_stay_the_same_from_release_to_release():
    # A run that goes on after an upgrade must go on with the batches that it began with.
    assert drawn(make_examples(6), 3, 3, (7, 1, "node-0")) == [[0, 1, 4], [5, 3, 2], [0, 3, 2]]


def test_collate_pads_on_the_right_and_masks_prompts():
    tokens = [np.array([5, 6, 7], dtype=np.int32), np.array([8, 9], dtype=np.int32)]
    batch = collate(Examples(tokens, [2, 0], [(), ()], pad_id=1), [0, 1])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[IGNORE, IGNORE, 7], [8, 9, IGNORE]]
