import pytest
import torch
import torch.nn.functional as F

from fedtune_strategies.language.data import Row
from fedtune_strategies.language.examples import collate, tokenise
from fedtune_strategies.language.loss import loss_in_parts, response_loss, token_losses
from fedtune_strategies.language.model import load_model
from tests.models import CONFIGS, make_model

ROWS = [Row("who is it?", "ada"), Row("a", "the answer is 42."), Row("count: ", "0 1 2 3 4 5 6 7"), Row(None, "once")]


@pytest.fixture(scope="module")
def examples(tokenizer):
    return tokenise(ROWS, tokenizer, 40)


@pytest.mark.parametrize("name", CONFIGS)
def test_batch_is_the_token_weighted_mean_of_its_rows(folders, examples, name):
    model = load_model(str(folders[name])).model
    with torch.no_grad():
        together = response_loss(model, collate(examples, range(4)))
        singles = [token_losses(model, collate(examples, [i])) for i in range(4)]
    assert together.dtype == torch.float32 and together.isfinite()
    torch.testing.assert_close(together, torch.cat(singles).mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_equals_the_definition(folders, examples, name):
    model = load_model(str(folders[name])).model
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, start in zip(examples.tokens, examples.prompt_lengths, strict=True):
            ids = torch.from_numpy(ids).long()
            log_probabilities = F.log_softmax(model(ids[None]).logits[0].double(), dim=-1)
            for position in range(max(start, 1), len(ids)):
                total -= log_probabilities[position - 1, ids[position]].item()
                count += 1
        loss = response_loss(model, collate(examples, range(4))).item()
    assert loss == pytest.approx(total / count, rel=1e-5)


def test_equals_transformers_own_loss_and_gradient(folders, examples):
    model = load_model(str(folders["llama"])).model
    batch = collate(examples, range(4))
    ours = torch.autograd.grad(response_loss(model, batch), list(model.parameters()))
    theirs = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
    for left, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-6)


def test_loss_of_sixteen_bit_weights_is_float32(folders, examples):
    model = load_model(str(folders["llama"]), dtype="bfloat16").model
    with torch.no_grad():
        loss = response_loss(model, collate(examples, range(4)))
    assert loss.dtype == torch.float32 and loss.isfinite()


def test_model_that_cannot_keep_some_logits(examples):
    class Plain(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, input_ids, attention_mask, use_cache):
            return self.inner(input_ids, attention_mask=attention_mask, use_cache=use_cache)

    model = make_model(CONFIGS["llama"]).eval()
    batch = collate(examples, range(4))
    with torch.no_grad():
        torch.testing.assert_close(response_loss(Plain(model), batch), response_loss(model, batch))


@pytest.mark.parametrize("rows", [0, 1, 3, 9])
def test_parts_have_the_mean_of_the_whole(folders, examples, rows):
    model, batch = load_model(str(folders["llama-tied"])).model, collate(examples, range(4))
    with torch.no_grad():
        torch.testing.assert_close(loss_in_parts(rows)(model, batch), response_loss(model, batch), rtol=1e-5, atol=1e-6)
