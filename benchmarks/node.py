"""What a node takes, by method, as planned and measured: seconds of a task, and memory beside plain inference.

    python benchmarks/node.py [--layers 12] [--width 512] [--rows 4] [--length 128] [--steps 2] [--only fedkseed]
    python benchmarks/node.py --model ../shared/data/models/stories260K-hf

A random Llama, written to disk once, is planned for, then tuned by a real server and a real node, the latter in a fresh
process with one thread, asked over a pipe, on sequences that are full. "Inference" is such a node too: it is greeted,
loads and answers FedKSeed's task, only that each of its steps is two plain forward passes on that step's batch.

In every process the peak is counted from the same moment: libraries imported, kernels compiled, no model loaded yet;
*whole* is the process's, less the mapped base model, which the plan does not count. Seconds are the processor's on both
sides, so that other work on the machine hardly shows; the first task is left out of them, since it loads the model.
Linux only.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
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

EXAMPLES = 200
METHODS = ("fedkseed", "fedzo", "fedcybgd", "fedit", "fedavg")


def write_model(folder: Path, layers: int, width: int, **others: Any) -> Path:
    """Write a random model with the embedded model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder("fedtune-tiny"))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
            num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=True, max_position_embeddings=512,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, **others,
        )
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.data = parameter.data.to(others.get("dtype", torch.float32))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_data(file: Path, model: Path, length: int) -> Path:
    """Write examples of half a sequence of prompt and half a sequence of response, as the plan assumes."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = tokenizer("a b c d " * length, add_special_tokens=False)["input_ids"]
    half = tokenizer.decode(words[: length // 2 - 2])
    file.write_text((json.dumps({"prompt": half, "completion": half}) + "\n") * EXAMPLES)
    return file


def serve(pipe: Connection, settings: dict[str, Any], data: str, infer: bool) -> None:
    """Be a node until the pipe closes, then tell the processor seconds of each task, and the memory before and most."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    compile_kernels()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, seconds = peak_memory(), []
    node = Node(settings, {"name": "node", "data": data}, 1)
    if infer:
        node.answer = lambda task: forward_passes(node, task)
    while (task := pipe.recv()) is not None:
        start = time.process_time()
        pipe.send(node.handle(*task))
        seconds.append(time.process_time() - start)
    pipe.send((seconds, before, peak_memory()))


def compile_kernels() -> None:
    """Use the kernels of the seed space once, on next to nothing."""
    small = torch.nn.Linear(4, 4)
    pool = make_pool("walsh", 1, 4096)
    local_steps(small, pool, lambda model, x: model(x).mean(), [torch.zeros(1, 4)], [0], eps=1e-4, lr=1e-7)


@torch.no_grad()
def forward_passes(node: Node, task: messages.Message) -> SeedReply:
    """Answer FedKSeed's task without a direction: slopes of zero, two losses of each batch."""
    assert isinstance(task, SeedTask)
    train: Any = node.config.train
    for batch in batches(node.examples, train.batch_size, train.local_steps, (0,)):
        losses = [float(response_loss(node.language.model, batch)) for _ in range(2)]
    return SeedReply(
        node=node.name, round=task.round, scalars=torch.zeros(train.local_steps), unit=1.0, loss=losses[0],
        fingerprint=node.base_fingerprint, num_examples=len(node.examples), seconds=0.0, peak_memory=peak_memory(),
        lr=task.lr or 1e-7, noise=0.0,
    )  # fmt: skip


def tune(settings: dict[str, Any], *arguments: Any) -> tuple[list[float], int, int]:
    """Run with one node in a process of its own; returns what `serve` sent last."""
    # The node's process imports this module too, and must not grow by the server.
    from fedtune_strategies.testing import InMemoryGrid
    from server_app.run import execute

    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, settings, *arguments))
    process.start()
    theirs.close()  # or a node that died would be waited for

    def ask(kind: str, payload: bytes) -> Any:
        pipe.send((kind, payload))
        return pipe.recv()

    try:
        execute(InMemoryGrid({1: ask}), settings, run_id=1)
    finally:
        pipe.send(None)
        measured = pipe.recv()
        process.join()
    return measured


def planned(settings: dict[str, Any], model: Path) -> tuple[str, str]:
    """Return seconds of a task and memory, in words, by the method's own plan; seconds where it says them."""
    from deploy.plan import plan
    from fedtune_strategies.language.model import load_model
    from fedtune_strategies.method import load_method
    from fedtune_strategies.run_config import parse

    config = parse(settings)
    measure = load_method(config.method.name).seconds
    seconds = measure(config, load_model(str(model)), EXAMPLES, time.process_time) if measure else None
    return f"{seconds:.1f}" if seconds else "", f"{plan(config, model, 1, EXAMPLES).memory / 1e6:.0f}"


def main() -> None:
    """Plan, run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder instead of the random model")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2, help="FedCyBGD's second turn is that of a transformer layer")
    parser.add_argument("--only", action="append", choices=METHODS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model or write_model(folder / "model", args.layers, args.width)
        data = write_data(folder / "data.jsonl", model, args.length)
        weights = 4 * count_parameters(weight_files(model))
        print(f"{weights / 4e6:.1f} M parameters in float32, {weights / 1e6:.0f} MB\n")
        head = ["node", "a task, s", "planned", "MB above an empty process", "against inference", "times the weights",
                "whole, MB", "planned"]  # fmt: skip
        print("| " + " | ".join(head) + " |\n| --- |" + " ---: |" * 7)
        inference = 0
        for node in ("inference", *(args.only or METHODS)):
            settings = {
                "method.name": "fedkseed" if node == "inference" else node, "model.name": str(model),
                "run.dir": str(folder / node), "train.seq-length": args.length, "train.batch-size": args.rows,
                "train.local-steps": args.steps, "num-server-rounds": args.rounds,
            } | ({"fedcybgd.prefetch": False} if node == "fedcybgd" else {})  # fmt: skip
            tasks, before, most = tune(settings, str(data), node == "inference")
            seconds = tasks[2:] or tasks[1:]  # after the greeting and the first task
            inference = inference or most - before
            due, room = planned(settings, model) if node != "inference" else ("", "")
            cells = [
                node, f"{statistics.mean(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})", due,
                f"{(most - before) / 1e6:.0f}", f"{(most - before) / inference:.2f}",
                f"{(most - before) / weights:.1f}", f"{(most - weights) / 1e6:.0f}", room,
            ]  # fmt: skip
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
