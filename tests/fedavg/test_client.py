import pytest
import torch

from client_app.node import Node
from fedtune_strategies.blocks.codecs import decode
from fedtune_strategies.blocks.train import apply_delta
from fedtune_strategies.errors import ProtocolError
from fedtune_strategies.fedavg import client
from fedtune_strategies.fedavg.client import FedAvgClient
from fedtune_strategies.fedavg.messages import ArraysTask
from fedtune_strategies.language.examples import batches
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.seed_space import tuned_parameters


def make_node(settings, data_files, method, name="node-0", **changes):
    return Node(
        {**(settings | {"method.name": method}), **changes}, {"name": name, "data": str(data_files["node-0"])}, 1
    )


@pytest.mark.parametrize("beta1", [0.9, 0.5])
def test_fedavg_trains_as_adamw_does(settings, data_files, beta1):
    node = make_node(settings, data_files, "fedavg", **{"train.beta1": beta1})
    task = ArraysTask(2, {name: value + 0.01 for name, value in node.base.items()}, 1e-3)
    reply = node.answer(task)
    parameters = tuned_parameters(node.language.model)
    assert all(torch.equal(parameters[name], node.base[name]) for name in parameters), "the node's model stays"
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(task.arrays[name])
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(beta1, 0.999), weight_decay=0.0)
    losses = []
    for batch in batches(node.examples, 2, 3, (0, 2, "node-0")):
        optimizer.zero_grad()
        loss = response_loss(node.language.model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert reply.loss == pytest.approx(sum(losses) / 3, rel=1e-5)
    for name, parameter in parameters.items():
        torch.testing.assert_close(task.arrays[name] + reply.arrays[name], parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", ["fedavg", "fedzo"])
def test_steps_that_are_not_finite_are_left_out_and_counted(settings, data_files, method, monkeypatch):
    losses = []

    def second_is_lost(model, batch):
        losses.append(response_loss(model, batch))
        return losses[-1] * (torch.inf if len(losses) == 2 else 1)

    monkeypatch.setattr(client, "response_loss", second_is_lost)
    node = make_node(settings, data_files, method)
    reply = node.answer(ArraysTask(1, {name: value.clone() for name, value in node.base.items()}, 1e-3))
    assert reply.skipped == 1 and all(value.isfinite().all() for value in reply.arrays.values())
    if method == "fedavg":
        assert reply.loss == pytest.approx((losses[0].item() + losses[2].item()) / 2)


def test_fedit_sends_adapters_alone(settings, data_files):
    node = make_node(settings, data_files, "fedit")
    start = {name: value.detach().clone() for name, value in node.answer._parameters.items()}
    reply = node.answer(ArraysTask(1, start, 1e-3))
    assert reply.arrays.keys() == start.keys() and all(".lora_" in name for name in start)
    assert any(value.count_nonzero() for value in reply.arrays.values())
    assert sum(value.numel() for value in start.values()) < sum(value.numel() for value in node.base.values())


def test_fedzo_steps_along_directions_of_its_own(settings, data_files):
    moves = []
    for name, round in [("node-0", 1), ("node-1", 1), ("node-0", 2)]:
        node = make_node(settings, data_files, "fedzo", name)
        reply = node.answer(ArraysTask(round, dict(node.base), 1e-3))
        moves.append(torch.cat([reply.arrays[key].flatten() for key in sorted(node.base)]))
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert abs(torch.cosine_similarity(moves[i], moves[j], dim=0)) < 0.2
    # Three steps: the move lies in the span of three directions, so it is no gradient step.
    assert all(move.norm() > 0 for move in moves)


@pytest.mark.parametrize("method", ["fedavg", "fedit"])
def test_a_round_that_is_asked_again_has_the_same_reply_and_the_next_makes_up_for_what_was_lost(
    settings, data_files, method
):
    coded = make_node(settings, data_files, method, **{"train.upload": "sign"}).answer
    exact = make_node(settings, data_files, method).answer
    start = {name: value.detach().clone() for name, value in exact._parameters.items()}
    received, wanted = ({name: torch.zeros_like(value) for name, value in start.items()} for _ in range(2))
    for round in (1, 2, 5):
        task = ArraysTask(round, start, 1e-3)
        parts, again = coded(task).arrays, coded(task).arrays
        assert parts.keys() == again.keys() and all(torch.equal(again[key], parts[key]) for key in parts)
        received = apply_delta(received, decode(parts))
        wanted = apply_delta(wanted, exact(task).arrays)
    kept = coded._lost[5]
    for name, value in wanted.items():
        torch.testing.assert_close(received[name] + kept[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fedzo_sends_its_change_as_exactly_in_16_bits(settings, data_files, dtype):
    node = make_node(settings, data_files, "fedzo", **{"model.dtype": dtype})
    task = ArraysTask(1, {name: value.float() for name, value in node.base.items()}, 1e-6)
    change = node.answer(task).arrays
    assert all(value.dtype == torch.float32 and value.count_nonzero() == value.numel() for value in change.values())
    if dtype == "float32":
        with torch.no_grad():
            for name, parameter in tuned_parameters(node.language.model).items():
                torch.testing.assert_close(task.arrays[name] + change[name], parameter, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("method", ["fedavg", "fedit", "fedzo"])
def test_a_task_that_does_not_fit_is_refused(settings, data_files, method):
    answer = make_node(settings, data_files, method).answer
    assert isinstance(answer, FedAvgClient)
    for task in (protocol.Ack("server", 1), ArraysTask(1, {"other": torch.ones(2)}, 1e-3)):
        with pytest.raises(ProtocolError):
            answer(task)
