"""A model at another point of seed space, whole or spread out by accelerate."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM

from fedtune_strategies import layer_weights
from fedtune_strategies.config.node import NodeConfig
from fedtune_strategies.errors import ModelError
from fedtune_strategies.method import NodeContext, load_method
from fedtune_strategies.run_config import parse
from fedtune_strategies.seed_space import make_pool, tuned_parameters
from fedtune_strategies.zeroth_order import at_point, local_steps

SMALL = {"vocab_size": 64, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS = [
    LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, **SMALL),
    GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, **SMALL),
]
models = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.model_type)
IDS = torch.arange(24).reshape(2, 12)
POOL, THETA = make_pool("walsh", 3, 16), torch.linspace(-0.02, 0.02, 16)


def make(config, dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def rebuilt(config, dtype=torch.float32):
    model = make(config, dtype)
    POOL.rebuild_model(tuned_parameters(model), {n: p.clone() for n, p in tuned_parameters(model).items()}, THETA)
    return model


@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_as_if_rebuilt_and_keeps_its_weights(config, dtype):
    model, before = make(config, dtype), make(config, dtype).state_dict()
    plain = logits(model)
    with at_point(model, POOL, THETA):
        assert torch.equal(logits(model), logits(rebuilt(config, dtype)))
    assert torch.equal(logits(model), plain)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


def offload_to_memory(model, folder):
    return cpu_offload(model, execution_device="cpu")


def offload_to_disk(model, folder):
    return disk_offload(model, folder, execution_device="cpu")


def split_by_a_device_map(model, folder):
    """One layer in memory, all else on disk: what `device_map="auto"` makes of a model that is too large."""
    base = model.base_model_prefix
    places = {f"{base}.{name}": "disk" for name, _ in model.base_model.named_children()} | {"lm_head": "disk"}
    layers = next(name for name, module in model.base_model.named_children() if isinstance(module, torch.nn.ModuleList))
    del places[f"{base}.{layers}"]
    places |= {f"{base}.{layers}.0": "cpu", f"{base}.{layers}.1": "disk"}
    return dispatch_model(model, places, main_device="cpu", offload_dir=folder, force_hooks=True)


@models
@pytest.mark.parametrize("offload", [offload_to_memory, offload_to_disk, split_by_a_device_map])
def test_offloaded_weights_are_rebuilt_where_they_are_loaded(config, offload, tmp_path):
    spread = offload(make(config), str(tmp_path))
    assert any(p.is_meta for p in spread.parameters())
    plain = logits(spread)
    with at_point(spread, POOL, THETA):
        assert torch.equal(logits(spread), logits(rebuilt(config)))
    assert torch.equal(logits(spread), plain)


@models
@pytest.mark.parametrize("offload", [offload_to_memory, offload_to_disk, split_by_a_device_map])
def test_steps_of_an_offloaded_model_are_those_of_a_whole_one(config, offload, tmp_path):
    def loss(model, batch):
        return model(batch, labels=batch).loss

    arguments = {"eps": 1e-2, "lr": 1e-3, "start": torch.zeros(16)}
    whole = local_steps(make(config), POOL, loss, [IDS] * 3, [4, 9, 4], **arguments)
    spread = local_steps(offload(make(config), str(tmp_path)), POOL, loss, [IDS] * 3, [4, 9, 4], **arguments)
    assert (whole.g == spread.g).all()


class Reaching(LlamaForCausalLM):
    """A model that reads a layer's weight outside of the layer."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits + self.model.layers[0].mlp.down_proj.weight.sum()
        return found


@pytest.mark.parametrize("method", ["fedkseed", "fedzo"])
def test_a_model_that_reaches_into_its_layers_is_refused_once_when_a_node_loads_it(method, monkeypatch):
    looks = []

    def client(model):
        monkeypatch.setattr(layer_weights, "reads_within_layers", lambda *args: looks.append(1) or look(*args))
        base = {name: value.detach().clone() for name, value in model.named_parameters()}
        return load_method(method).client(
            NodeContext(parse({"method.name": method}), "a", model, base, [], NodeConfig())
        )

    look = layer_weights.reads_within_layers
    client(Reaching(CONFIGS[0]))  # in place, where nothing is exchanged
    assert not looks
    with pytest.raises(ModelError, match="reads weights outside of the layer"):
        client(Reaching(CONFIGS[0]).to(torch.bfloat16))
    model = make(CONFIGS[0], torch.bfloat16)
    client(model)
    for _ in range(3):
        local_steps(model, POOL, lambda model, batch: model(batch, labels=batch).loss, [IDS], [4], eps=1e-2, lr=1e-3)
    assert len(looks) == 2, "one look a model, none a round"
