"""Rows to text: by the model's chat template where it has one, else by a plain one (docs/data.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from fedtune_strategies.errors import DataError
from fedtune_strategies.language.data import Message, Row

ROLES = {"system": "System", "user": "Instruction", "assistant": "Response"}
"""Titles of the plain prompt template, used where the tokenizer has no chat template."""

TRIED = 10_000
"""Rows of a large file on which `try_template` tries the chat template, evenly apart."""


def try_template(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> int:
    """Write rows, `TRIED` at most, by the chat template; returns in how many a system message moved."""
    step = -(-len(rows) // TRIED)
    tried = rows[::step]
    folded = fold_system(tried, tokenizer)
    for index, row in enumerate(folded):
        render(row, tokenizer, index * step + 1)
    return changed(tried, folded)


def fold_system(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Sequence[Row]:
    """Put a system message's text before the user's first where the chat template refuses or loses it (Gemma's)."""
    if tokenizer.chat_template is None or not any(map(_system, rows)) or _takes_system(tokenizer):
        return rows
    return [_folded(row) for row in rows]


def changed(rows: Sequence[Row], folded: Sequence[Row]) -> int:
    """Count the rows that `fold_system` changed."""
    return sum(row is not other for row, other in zip(rows, folded, strict=True))


def render(row: Row, tokenizer: PreTrainedTokenizerBase, number: int) -> tuple[str, str]:
    """Return prompt text and response text, the response closed by one end-of-sequence token.

    `number` is the row's, from 1, for errors. Text that is formatted already is not formatted again.
    """
    end = tokenizer.eos_token or ""
    closed = row.response if end and row.response.rstrip().endswith(end) else row.response + end
    if row.prompt is None or is_formatted(row, tokenizer):
        return str(row.prompt or ""), closed
    if tokenizer.chat_template is not None:
        try:
            prompt, response = _render_chat(row, tokenizer)
        except TemplateError as error:  # Mistral's wants turns to alternate, for one
            raise DataError(f"row {number}: the model's chat template refuses the conversation: {error}") from None
        last = {"role": "user", "content": row.prompt} if isinstance(row.prompt, str) else row.prompt[-1]
        if last["role"] == "user" and last["content"].strip() not in prompt:
            line = f"row {number}: the model's chat template loses the prompt's text; take one for plain text"
            raise DataError(line, public=line)
        return prompt, response
    if isinstance(row.prompt, str):
        return row.prompt, closed
    if row.tools or any("tool_calls" in message for message in row.prompt):
        raise DataError(f"row {number}: calls tools, but the model has no chat template to write calls with")
    turns = [f"### {ROLES.get(message['role'], message['role'])}:\n{message['content']}\n\n" for message in row.prompt]
    return "".join(turns) + f"### {ROLES['assistant']}:\n", closed


def is_formatted(row: Row, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether a prompt went through a chat template before: it begins with one of the tokenizer's own marks."""
    marks = tuple(str(token) for token in tokenizer.added_tokens_decoder.values() if token.special)
    return isinstance(row.prompt, str) and row.prompt.lstrip().startswith(marks)


def _render_chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    asked = [{"role": "user", "content": row.prompt}] if isinstance(row.prompt, str) else row.prompt or []
    answered = [*asked, {"role": "assistant", "content": row.response}]
    prompt = tokenizer.apply_chat_template(asked, tools=row.tools, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(answered, tools=row.tools, tokenize=False)
    assert isinstance(prompt, str) and isinstance(whole, str)
    if whole.startswith(prompt) and row.response.strip() in whole[len(prompt) :]:
        return prompt, whole[len(prompt) :]
    # Templates of reasoning models drop the thoughts of answers, and some open a thought when asked to generate.
    response = row.response
    if prompt.rstrip().endswith("<think>"):
        if response.lstrip().startswith("<think>"):
            response = response.lstrip().removeprefix("<think>").lstrip()
        else:
            prompt += "\n</think>\n\n"
    return prompt, response + (tokenizer.eos_token or "")


def _system(row: Row) -> str:
    """The text of a conversation's system message, where it begins with one."""
    first = row.prompt[0] if isinstance(row.prompt, list) else {}
    return str(first["content"]) if first.get("role") == "system" else ""


def _takes_system(tokenizer: PreTrainedTokenizerBase) -> bool:
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who"}]
    try:
        return "be brief" in str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    except TemplateError:
        return False


def _folded(row: Row) -> Row:
    system = _system(row)
    if not (system and isinstance(row.prompt, list) and len(row.prompt) > 1 and row.prompt[1]["role"] == "user"):
        return row
    asked: Message = row.prompt[1] | {"content": f"{system}\n\n{row.prompt[1]['content']}"}
    return replace(row, prompt=[asked, *row.prompt[2:]])
