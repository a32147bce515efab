import json
import logging
import shutil
import socket
from types import SimpleNamespace

import huggingface_hub.constants
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    MixtralConfig,
    SiglipVisionConfig,
)

from client_app.node import Node
from fedtune_strategies.errors import ConfigError, ModelError, ResourceError
from fedtune_strategies.language import model as model_module
from fedtune_strategies.language.base import base_tensors, stored_fingerprint, structure
from fedtune_strategies.language.evaluation import generate_answers
from fedtune_strategies.language.model import check_context, check_model, load_model, save_model
from fedtune_strategies.seed_space import fingerprint, tuned_parameters
from fedtune_strategies.testing import InMemoryGrid
from fedtune_strategies.tiny import MODEL_FOLDER
from server_app.run import execute
from tests.models import CONFIGS, CONTEXT, SIZES, make_model, make_tokenizer


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of one model's folder, to be damaged."""
    return shutil.copytree(folders["llama"], tmp_path / "model")


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 20)[None]).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_load_base_tensors_save_and_reload(folders, tmp_path, name):
    language = load_model(str(folders[name]))
    assert not language.model.training and language.tokenizer.pad_token_id is not None
    assert all(parameter.requires_grad for parameter in language.model.parameters())
    base = base_tensors(language)
    assert list(base) == [name for name, _ in language.model.named_parameters()]
    for key, parameter in language.model.named_parameters():
        assert torch.equal(base[key], parameter)
    before = {key: tensor.clone() for key, tensor in base.items()}

    with torch.no_grad():
        for parameter in language.model.parameters():
            parameter.add_(0.01)
    assert all(torch.equal(base[key], before[key]) for key in base), "tuning must not touch the base"

    save_model(language.model, language.tokenizer, tmp_path / "tuned")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned", dtype=torch.float32)
    torch.testing.assert_close(logits(plain), logits(language.model), rtol=0, atol=0)
    again = load_model(str(tmp_path / "tuned"))
    assert again.tokenizer("ada").input_ids == language.tokenizer("ada").input_ids
    check_context(language.name, language.model.config, CONTEXT)
    with pytest.raises(ConfigError, match=f"'train.seq-length' is 129, but .* reads at most {CONTEXT}; lower it"):
        check_context(language.name, language.model.config, CONTEXT + 1)
    if language.model.config.tie_word_embeddings:
        assert again.model.get_output_embeddings().weight is again.model.get_input_embeddings().weight


def test_base_tensors_are_mapped_not_copied(folders, monkeypatch):
    language = load_model(str(folders["llama"]))
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: pytest.fail("copied"))
    assert len(base_tensors(language)) == 21


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_base_tensors_of_another_dtype(folders, dtype):
    language = load_model(str(folders["llama"]), dtype=dtype)
    base = base_tensors(language)
    assert {tensor.dtype for tensor in base.values()} == {getattr(torch, dtype)}
    with torch.no_grad():
        language.model.lm_head.weight.zero_()
    assert base["lm_head.weight"].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_held_as_most_of_them_are_stored(tmp_path, dtype):
    model = make_model(CONFIGS["llama"]).to(dtype)
    model.model.norm.to(torch.float32)
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    held = dtype if dtype != torch.float64 else torch.float32
    assert {parameter.dtype for parameter in load_model(str(tmp_path), "auto").model.parameters()} == {held}
    assert load_model(str(tmp_path), "float32").model.dtype == torch.float32


def test_gpt2_file_without_prefix_is_mapped(folders, tmp_path, monkeypatch):
    folder = shutil.copytree(folders["gpt2"], tmp_path / "gpt2")
    tensors = load_file(folder / "model.safetensors")
    stripped = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(stripped, folder / "model.safetensors", {"format": "pt"})
    language = load_model(str(folder))
    monkeypatch.setattr(torch.Tensor, "clone", lambda self: pytest.fail("copied"))
    assert torch.equal(base_tensors(language)["transformer.wte.weight"], tensors["transformer.wte.weight"])


def test_sharded_model(tmp_path):
    make_model(CONFIGS["llama"]).save_pretrained(tmp_path, max_shard_size="8KB")
    make_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert len(base_tensors(load_model(str(tmp_path)))) == 21
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match=r"incomplete download, without model-00002-of-.*; download the model again"):
        load_model(str(tmp_path))


def test_never_touches_the_network(folders, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("network"))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("network"))
    load_model(str(folders["mistral"]))
    with pytest.raises(ModelError):
        load_model("no-such-owner/no-such-model")


@pytest.mark.parametrize("name", ["no-such-owner/no-such-model", "/no/such/folder", "no such name"])
def test_unknown_model(name):
    with pytest.raises(ModelError, match="no such folder, nor a model of that name in the Hugging Face cache"):
        load_model(name)


def test_model_in_the_cache_loads_by_its_id(folders, tmp_path, monkeypatch):
    repository = tmp_path / "models--owner--tiny"
    shutil.copytree(folders["qwen2"], repository / "snapshots" / "0123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_model("owner/tiny").folder == repository / "snapshots" / "0123"


def rewrite_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path, size):
    with path.open("r+b") as file:
        file.truncate(size)


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


BAD_FOLDERS = {
    "not a model folder: no config.json": lambda folder: (folder / "config.json").unlink(),
    "holds no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "the weights are pickled": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "incomplete or damaged .*not fully covered": lambda folder: truncate(folder / "model.safetensors", 9000),
    "incomplete or damaged .*header": lambda folder: truncate(folder / "model.safetensors", 3),
    "BertForMaskedLM is not a causal language model": lambda folder: rewrite_config(
        folder, model_type="bert", architectures=["BertForMaskedLM"]
    ),
    "nosuch is not a causal language model that transformers": lambda folder: rewrite_config(
        folder, model_type="nosuch", architectures=None
    ),
    "cannot be loaded as a causal language model: .*nosuch": lambda folder: rewrite_config(folder, model_type="nosuch"),
    "does not say what model this is": lambda folder: (folder / "config.json").write_text("{"),
    "config.json does not say": lambda folder: (folder / "config.json").write_text('{"n_embd": 3}'),
    "lack 1 tensors, such as lm_head.weight": drop_tensor,
    "lack .* tensors, such as": lambda folder: rewrite_config(folder, num_hidden_layers=3),
    "causal language model: .*size": lambda folder: rewrite_config(folder, intermediate_size=20),
    "no usable tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "no usable tokenizer in": lambda folder: (folder / "tokenizer.json").write_text("{"),
}


@pytest.mark.parametrize("message", BAD_FOLDERS)
def test_bad_folder_gives_one_line(folder, message):
    BAD_FOLDERS[message](folder)
    with pytest.raises(ModelError, match=message) as caught:
        load_model(str(folder))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def add_tokens(folder, *tokens, **special):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), 64)] + list(tokens))
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)


def shard(folder, name):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))


def name_templates(folder):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"rag": "a", "tool_use": "b"}
    tokenizer.save_pretrained(folder)


def store_as_float8(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def leave_only_an_adapter(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')


QUANTISED = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes": {"load_in_4bit": True},
    "compressed-tensors": {"quant_method": "compressed-tensors"},
    "fp8": {"quant_method": "fp8"},
}

REFUSED = {
    r"is quantised \(fp8\), .*take the original model": store_as_float8,
    "an adapter are beside .*; move adapter_config.json": lambda folder: (folder / "adapter_config.json").write_text(
        "{}"
    ),
    "is an adapter of owner/base; merge it into": leave_only_an_adapter,
    "holds a GGUF file; give the folder of the original": lambda folder: (folder / "model.safetensors").rename(
        folder / "q4.gguf"
    ),
    "index of the weight files is missing; download model.safetensors.index.json": lambda folder: (
        folder / "model.safetensors"
    ).rename(folder / "model-00001-of-00002.safetensors"),
    "names a file outside its folder, '../other.safetensors'": lambda folder: shard(folder, "../other.safetensors"),
    "names a file outside its folder, '/etc/passwd'": lambda folder: shard(folder, "/etc/passwd"),
    "has 65 tokens but the model embeds 64, none for '<new>'": lambda folder: add_tokens(folder, "<new>"),
    "padding token '<pad>' has id 64, .* such as '</s>'": lambda folder: add_tokens(folder, pad_token="<pad>"),
    "chat templates 'rag', 'tool_use', but none is named 'default'": name_templates,
}


@pytest.mark.parametrize("message", REFUSED)
def test_model_that_cannot_be_tuned_is_refused_before_its_weights_are_loaded(folder, message, monkeypatch):
    REFUSED[message](folder)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for admit in (check_model, load_model):
        with pytest.raises(ModelError, match=message) as caught:
            admit(str(folder))
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("method", QUANTISED)
def test_quantised_checkpoints_are_refused(folder, method, nested):
    found = {"quantization_config": QUANTISED[method]}
    rewrite_config(folder, **({"text_config": found} if nested else found))
    with pytest.raises(ModelError, match=rf"is quantised \({method}\), which cannot be tuned; take the original model"):
        check_model(str(folder))


@pytest.mark.parametrize(("content", "message"), [(b"GGUF\3", "is a GGUF file: give"), (b"a", "is a file: give")])
def test_file_given_as_a_model(tmp_path, content, message):
    (tmp_path / "q4").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        check_model(str(tmp_path / "q4"))


def test_token_for_images_may_be_beyond_the_embedding_of_a_text_model(folder):
    add_tokens(folder, "<image>")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_token": "<image>"}))
    load_model(str(folder))


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"gpt-neox"}))
def test_the_files_tell_the_fingerprint_of_the_loaded_model(folders, name, dtype):
    loaded = fingerprint(base_tensors(load_model(str(folders[name]), dtype)))
    assert stored_fingerprint(folders[name], dtype) == loaded


def test_files_that_are_renamed_or_merged_on_loading_do_not_tell_the_fingerprint(folders, tmp_path):
    assert stored_fingerprint(folders["gpt-neox"], "auto") == ""
    AutoModelForCausalLM.from_config(MixtralConfig(**SIZES, intermediate_size=24, num_local_experts=2)).save_pretrained(
        tmp_path
    )
    assert stored_fingerprint(tmp_path, "auto") == ""


def test_weights_that_are_tied_on_loading_do_not_tell_the_fingerprint(folders, tmp_path):
    folder = shutil.copytree(folders["llama-tied"], tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", {"format": "pt"})
    assert stored_fingerprint(folder, "auto") == ""


@pytest.fixture(scope="module")
def seeing_folder(tmp_path_factory):
    """A model with a vision tower and a projector, of the architecture of Gemma 3 from 4B on."""
    folder = tmp_path_factory.mktemp("seeing")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = Gemma3TextConfig(
        **sizes, vocab_size=64, num_key_value_heads=1, head_dim=8, max_position_embeddings=CONTEXT, sliding_window=32
    )
    vision = SiglipVisionConfig(**sizes, image_size=28, patch_size=14)
    tokens = {"image_token_index": 62, "boi_token_index": 60, "eoi_token_index": 61}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)
    Gemma3ForConditionalGeneration(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def test_of_a_model_that_also_sees_the_language_model_alone_is_tuned(seeing_folder, tmp_path):
    language = load_model(str(seeing_folder))
    tuned = tuned_parameters(language.model)
    frozen = dict(language.model.named_parameters()).keys() - tuned.keys()
    assert all(name.startswith("model.language_model.") for name in tuned)
    assert {name.split(".")[1] for name in frozen} == {"vision_tower", "multi_modal_projector"}
    assert tuned.keys() == tuned_parameters(structure(seeing_folder)).keys()

    loss = language.model(input_ids=torch.arange(3, 20)[None], labels=torch.arange(3, 20)[None]).loss
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, list(tuned.values())))
    save_model(language.model, language.tokenizer, tmp_path / "tuned")
    assert load_model(str(tmp_path / "tuned")).model.state_dict().keys() == language.model.state_dict().keys()


@pytest.mark.parametrize("method", ["fedavg", "fedit"])
def test_averaging_tunes_the_language_model_alone_of_a_model_that_also_sees(method, seeing_folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b c d"}\n' * 8)
    settings = {
        "method.name": method, "model.name": str(seeing_folder), "num-server-rounds": 1,
        "run.dir": str(tmp_path / "run"),
        "train.seq-length": 32, "train.local-steps": 2,
    } | ({"lora.targets": "all-linear"} if method == "fedit" else {})  # fmt: skip
    node = Node(settings, {"name": "node", "data": str(data), "folder": str(tmp_path / "node")}, 1)
    tuned = load_model(str(execute(InMemoryGrid({1: node.handle}), settings, run_id=1))).model
    before = load_model(str(seeing_folder)).model.state_dict()
    moved = {name for name, value in tuned.state_dict().items() if not value.equal(before[name])}
    assert moved
    assert not [name for name in moved if "vision" in name or "projector" in name]


def test_context_of_a_model_that_also_sees(seeing_folder):
    with pytest.raises(ConfigError, match=f"reads at most {CONTEXT}; lower it"):
        check_context("seeing", load_model(str(seeing_folder)).model.config, CONTEXT + 1)


def test_model_whose_language_model_cannot_be_told_from_its_vision_is_refused(folder):
    rewrite_config(folder, model_type="git", architectures=["GitForCausalLM"])
    with pytest.raises(ModelError, match=r"a git model also sees or hears .*; choose one for text"):
        check_model(str(folder))


def test_broken_index(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="not an index of weight files"):
        load_model(str(folder))


def test_tokenizer_of_another_model(folder):
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.model = type(tokenizer.backend_tokenizer.model)(
        {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(300 + i): 3 + i for i in range(100)}, unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="the tokenizer has 103 tokens but the model embeds 64"):
        load_model(str(folder))


@pytest.mark.parametrize(("tokens", "pad"), [({}, "</s>"), ({"eos_token": None}, "<unk>"), ({"pad_token": "a"}, "a")])
def test_padding_token(folder, caplog, tokens, pad):
    make_tokenizer(**tokens).save_pretrained(folder)
    with caplog.at_level(logging.INFO):
        assert load_model(str(folder)).tokenizer.pad_token == pad
    assert (f"no padding token; padding with {pad}" in caplog.text) == ("pad_token" not in tokens)


def test_no_token_to_pad_with(folder):
    make_tokenizer(eos_token=None, unk_token=None).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"no pad, eos or unk token; set pad_token in tokenizer_config.json"):
        load_model(str(folder))


def test_too_little_memory(folders, monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    needed = 4 * sum(p.numel() for p in make_model(CONFIGS["llama"]).parameters())
    with pytest.raises(ResourceError, match=f"the weights need {needed:,} bytes on cpu, but 1,000 are available"):
        load_model(str(folders["llama"]))


def test_containers_limit_counts(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(model_module, "CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("9000\n")
    (tmp_path / "memory.stat").write_text("anon 5000\ninactive_file 500\n")
    (tmp_path / "memory.max").write_text("10000\n")
    with pytest.raises(ResourceError, match="but 1,500 are available"):
        load_model(str(folders["llama"]))
    (tmp_path / "memory.max").write_text("max\n")
    load_model(str(folders["llama"]))


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_no_such_device(folders, device):
    with pytest.raises(ResourceError, match=rf"device '{device}': torch cannot use it on this machine .*; take 'cpu'"):
        load_model(str(folders["llama"]), device=device)


def test_full_disk(folders, tmp_path, monkeypatch):
    language = load_model(str(folders["llama"]))
    error = OSError(28, "No space left on device")
    monkeypatch.setattr(type(language.model), "save_pretrained", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(ResourceError, match="no disk space left"):
        save_model(language.model, language.tokenizer, tmp_path)


def test_generation_settings_as_published_can_be_saved(folder, tmp_path):
    # Llama 2 ships a temperature without do_sample, which transformers itself calls invalid.
    (folder / "generation_config.json").write_text('{"temperature": 0.6, "bos_token_id": 1, "eos_token_id": 2}')
    language = load_model(str(folder))
    generate_answers(language.model, language.tokenizer, [[5, 6]], max_new_tokens=2)
    save_model(language.model, language.tokenizer, tmp_path / "tuned")
    load_model(str(tmp_path / "tuned"))


def test_embedded_model():
    assert load_model("fedtune-tiny").folder == MODEL_FOLDER
