"""A pool over a PEFT model's adapter: only it moves, with the same guarantees."""

import numpy as np
import pytest
import torch

from fedtune_strategies.config.node import NodeConfig
from fedtune_strategies.fedkseed.client import FedKSeedClient
from fedtune_strategies.fedkseed.messages import SeedTask
from fedtune_strategies.fedkseed.packing import pack, read_scalars
from fedtune_strategies.fedkseed.strategy import FedKSeed
from fedtune_strategies.language.examples import Examples
from fedtune_strategies.method import NodeContext
from fedtune_strategies.run_config import parse
from fedtune_strategies.seed_gradient import slopes
from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.strategy import arrays_of
from fedtune_strategies.zeroth_order import local_steps
from tests.models import CONFIGS, make_model

peft = pytest.importorskip("peft")
K, ADAPTER = 16, "lora_"
IDS = torch.arange(40).reshape(2, 20) % 60


def adapted():
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(make_model(CONFIGS["llama"]), lora).eval()


def loss(model, batch):
    return model(input_ids=batch, labels=batch, use_cache=False).loss


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("estimator", ["two-sided", "one-sided", "forward"])
def test_slopes_are_derivatives_along_the_adapter_alone(estimator):
    model, pool = adapted(), make_pool("walsh", 3, K)
    loss(model, IDS).backward()
    tuned = tuned_parameters(model, ADAPTER)
    assert 0 < len(tuned) < len(weights(model))
    expected = [
        sum(float((p.grad * pool.direction(name, p.shape, k)).sum()) for name, p in tuned.items()) for k in (3, 8)
    ]
    found = local_steps(
        model, pool, loss, [IDS], [3, 8], eps=1e-3, lr=0.0, pattern=ADAPTER, estimator=estimator, directions=2
    )
    np.testing.assert_allclose(found.g, expected, rtol=0.05, atol=2e-3)


def test_all_slopes_by_one_backward_pass_are_derivatives_along_the_adapter_alone():
    model, pool = adapted(), make_pool("walsh", 3, K)
    loss(model, IDS).backward()
    tuned = tuned_parameters(model, ADAPTER)
    expected = sum(pool.project(name, p.grad).double() for name, p in tuned.items())
    model.zero_grad()
    found = slopes(model, tuned, loss, IDS, pool)
    np.testing.assert_allclose(found.g, expected, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())


def test_server_and_node_agree_and_the_rest_stays():
    config = parse({"fedkseed.seeds": K, "train.local-steps": 4, "train.parameters": ADAPTER, "train.batch-size": 2})
    model, copy = adapted(), adapted()
    before = weights(model)
    base = {name: before[name] for name in tuned_parameters(model, ADAPTER)}
    examples = Examples(list(IDS.int().numpy()), [4, 4], [("a",), ("b",)], pad_id=0)
    node = FedKSeedClient(NodeContext(config, "a", model, before, examples, NodeConfig()))
    units = np.arange(K, dtype=np.int32) * 1000
    empty = torch.empty(0)
    task = SeedTask(2, 0, pack(units), 2.0**-20, empty, empty, 1e-3, 1e-3, np.inf)
    reply = node(task)
    strategy = FedKSeed(config, base)
    theta = torch.from_numpy((units * 2.0**-20).astype(np.float32))
    assert strategy.materialise(arrays_of(theta=theta), tuned_parameters(copy)) == reply.fingerprint
    assert np.isfinite(read_scalars(reply.scalars, reply.unit)).all()
    for one in (model, copy):
        changed = {name for name, value in weights(one).items() if not torch.equal(value, before[name])}
        assert changed == set(base)
