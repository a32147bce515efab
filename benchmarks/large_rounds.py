"""A round of each method on a random model of billions of parameters: what a node takes of time, memory and bytes.

    python benchmarks/large_rounds.py write FOLDER --billions 1|3|7 [--device cuda]
    python benchmarks/large_rounds.py round FOLDER --method fedkseed|gradient|fedcybgd [--device cuda] [--results FILE]

The model is a Llama in bfloat16 with the embedded model's tokenizer, written shard by shard. A server and one node in
this process take a round of four steps (FedCyBGD: two turns of four) on sequences that are full. Memory is this
process's, server and node together, and the GPU's peak. `benchmarks/gpu.sh` runs all of it.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from client_app.node import Node
from fedtune_strategies.folders import make_folder
from fedtune_strategies.language.model_files import count_parameters, model_folder, weight_files
from fedtune_strategies.memory import peak_memory, private_peak
from fedtune_strategies.testing import InMemoryGrid
from server_app.ledger import Ledger
from server_app.run import execute

# Width and layers by billions of parameters; 0 is for trying the script.
SHAPES = {0: (64, 2), 1: (2048, 20), 3: (3072, 26), 7: (4096, 32)}
SHARD = 2 * 10**9  # bytes
METHODS: dict[str, dict[str, Any]] = {
    "fedkseed": {"method.name": "fedkseed", "train.lr": 1e-7},
    "gradient": {"method.name": "fedkseed", "fedkseed.estimator": "gradient"},
    "fedcybgd": {"method.name": "fedcybgd", "num-server-rounds": 2},
}


def write_model(folder: Path, billions: int, device: str) -> None:
    """Write a random model, never more than a shard of it in memory."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder("fedtune-tiny"))
    width, layers = SHAPES[billions]
    config = LlamaConfig(
        vocab_size=32000 if billions else len(tokenizer), hidden_size=width, intermediate_size=8 * width // 3,
        num_hidden_layers=layers, num_attention_heads=width // 64, num_key_value_heads=width // 64,
        max_position_embeddings=4096, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.device("meta"):
        shapes = {name: part.shape for name, part in AutoModelForCausalLM.from_config(config).named_parameters()}
    make_folder(folder)
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    places: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}

    def flush() -> None:
        file = f"model-{len(set(places.values())):05}.safetensors"
        places.update(dict.fromkeys(shard, file))
        save_file(shard, folder / file, {"format": "pt"})
        shard.clear()

    torch.manual_seed(0)
    for name, shape in shapes.items():
        value = torch.randn(shape, dtype=torch.bfloat16, device=device) * 0.02 if len(shape) > 1 else torch.ones(shape)
        shard[name] = value.to("cpu", torch.bfloat16)
        if sum(tensor.nbytes for tensor in shard.values()) > SHARD:
            flush()
    flush()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    print(f"{count_parameters(weight_files(folder)) / 1e9:.2f} billion parameters in {folder}")


def take_round(model: Path, method: str, device: str, rows: int, tokens: int) -> dict[str, Any]:
    """Run a round, and return what it took."""
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data.jsonl"
        data.write_text((json.dumps({"text": "a b c d " * tokens}) + "\n") * 4 * rows)
        settings = {
            "model.name": str(model), "num-server-rounds": 1, "train.local-steps": 4, "train.batch-size": rows,
            "train.seq-length": tokens, "run.dir": f"{name}/run", "stream.listen": "off",
            "round.deadline": 800.0, **METHODS[method],
        }  # fmt: skip
        start = time.monotonic()
        node = Node(settings, {"name": "node", "data": str(data), "device": device, "folder": f"{name}/node"}, 1)
        execute(InMemoryGrid({1: node.handle}), settings, run_id=1)
        replies = list(Ledger.read(Path(name) / "run").records("reply"))
    gpu = torch.cuda.max_memory_allocated() if device.startswith("cuda") else 0
    return {
        "method": method, "billions": count_parameters(weight_files(model)) / 1e9, "device": device, "rows": rows,
        "tokens": tokens, "task_seconds": [round(one.body["seconds"], 2) for one in replies],
        "losses": [one.body["loss"] for one in replies], "bytes_up": [one.body["bytes_up"] for one in replies],
        "seconds": round(time.monotonic() - start, 1), "gpu_peak": gpu,
        "peak": peak_memory(), "private_peak": private_peak(),
    }  # fmt: skip


def main() -> None:
    """Write a model, or take a round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("do", choices=("write", "round"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--billions", type=int, choices=SHAPES, default=1)
    parser.add_argument("--method", choices=METHODS, default="fedkseed")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    if args.do == "write":
        write_model(args.folder, args.billions, args.device)
        return
    logging.basicConfig(level=logging.WARNING)
    line = json.dumps(take_round(args.folder, args.method, args.device, args.rows, args.tokens))
    print(line)
    if args.results:
        with args.results.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
