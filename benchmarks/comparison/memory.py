"""Peak memory of a node by method, against plain inference: each node in its own process.

    python benchmarks/comparison/memory.py [--layers 12] [--width 512] [--rows 4] [--length 128]
    python benchmarks/comparison/memory.py --model ../shared/data/models/stories260K-hf

A random Llama, written to disk once, is tuned for one round of two local steps by a real server and a real node, the
latter in a fresh process, asked over a pipe. "Inference" is such a node too: it is greeted, loads and answers the same
task of the same run, only that each of its steps is two plain forward passes on that step's batch. In every process the
peak is counted from the same moment: libraries imported, kernels compiled, no model loaded yet. Linux only.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from apart import tune_apart
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from client_app.node import Node
from fedtune_strategies.fedkseed.messages import SeedReply, SeedTask
from fedtune_strategies.language.examples import batches
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.language.model_files import count_parameters, model_folder, weight_files
from fedtune_strategies.memory import peak_memory
from fedtune_strategies.protocol import messages
from fedtune_strategies.seed_space import make_pool
from fedtune_strategies.zeroth_order import local_steps

STEPS = 2
SEEDS = {"method.name": "fedkseed", "train.local-steps": STEPS}
NODES: dict[str, dict[str, Any]] = {
    "inference": SEEDS,
    "fedkseed": SEEDS,
    "fedzo": {"method.name": "fedzo", "train.local-steps": STEPS},
    # The second turn: a transformer layer.
    "fedcybgd": {"method.name": "fedcybgd", "train.local-steps": STEPS, "num-server-rounds": 2},
    "fedit": {"method.name": "fedit", "train.local-steps": STEPS},
    "fedavg": {"method.name": "fedavg", "train.local-steps": STEPS},
}


def write_model(folder: Path, layers: int, width: int) -> None:
    """Write a random model with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder("fedtune-tiny"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True, max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def serve(pipe: Connection, settings: dict[str, Any], name: str, data: str) -> None:
    """Be a node: answer (kind, payload) from the pipe until it closes, then say how much memory that took."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    compile_kernels()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak_memory()
    node = Node(settings, {"name": "node", "data": data}, 1)
    if name == "inference":
        node.answer = lambda task: forward_passes(node, task)
    while (task := pipe.recv()) is not None:
        pipe.send(node.handle(*task))
    pipe.send(peak_memory() - before)


def compile_kernels() -> None:
    """Use the kernels of the seed space once, on next to nothing."""
    small = torch.nn.Linear(4, 4)
    pool = make_pool("walsh", 1, 4096)
    local_steps(small, pool, lambda model, x: model(x).mean(), [torch.zeros(1, 4)], [0], eps=1e-4, lr=1e-7)


@torch.no_grad()
def forward_passes(node: Node, task: messages.Message) -> SeedReply:
    """Answer FedKSeed's task without a direction: slopes of zero, two losses of each batch."""
    assert isinstance(task, SeedTask)
    for batch in batches(node.examples, node.config.train.batch_size, STEPS, (0,)):
        losses = [float(response_loss(node.language.model, batch)) for _ in range(2)]
    return SeedReply(
        node=node.name, round=task.round, scalars=torch.zeros(STEPS), unit=1.0, loss=losses[0],
        fingerprint=node.base_fingerprint, num_examples=len(node.examples), seconds=0.0, peak_memory=peak_memory(),
        lr=task.lr, noise=0.0,
    )  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder instead of the random model")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not args.model:
            write_model(folder / "model", args.layers, args.width)
        model = Path(args.model) if args.model else folder / "model"
        data = folder / "data.jsonl"
        data.write_text((json.dumps({"text": "a b c d " * 200}) + "\n") * 16)
        common = {
            "model.name": str(model), "train.seq-length": args.length, "train.batch-size": args.rows,
            "num-server-rounds": 1,
        }  # fmt: skip
        weights = 4 * count_parameters(weight_files(model))
        print(f"{weights / 4e6:.1f} M parameters in float32, {weights / 1e6:.0f} MB")
        print("| node | peak above an empty process | against inference | times the weights |\n| --- |" + " ---: |" * 3)
        peaks = {}
        for node, own in NODES.items():
            settings = common | own | {"run.dir": str(folder / node)}
            peak = peaks[node] = tune_apart(serve, settings, node, str(data))
            print(f"| {node} | {peak / 1e6:.0f} MB | {peak / peaks['inference']:.2f} | {peak / weights:.1f} |")


if __name__ == "__main__":
    main()
