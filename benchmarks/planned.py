"""What `fedtune plan` says beforehand against what a node then takes: seconds of a task, memory of the process.

    python benchmarks/planned.py [--layers 6] [--width 256] [--rows 8] [--length 128]

A random Llama is planned for, then tuned by a real server and a real node, the latter in a fresh process with one
thread, on examples that fill the sequence, half of it response, as the plan assumes. Seconds are the processor's on
both sides, so that other work on the machine hardly shows. The mapped base model, which the plan does not count, is
taken off the peak; the first round is left out of the seconds, as it compiles the kernels.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from apart import tune_apart
from transformers import AutoTokenizer

from client_app.node import Node
from fedtune_strategies.memory import peak_memory

EXAMPLES = 200
METHODS: dict[str, dict[str, Any]] = {
    "fedkseed": {"num-server-rounds": 3, "train.local-steps": 20},
    "fedcybgd": {"num-server-rounds": 9, "train.local-steps": 8, "fedcybgd.prefetch": False},
}


def write_data(file: Path, model: Path, length: int) -> None:
    """Write examples of half a sequence of prompt and half a sequence of response."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    words = "a b c d " * length
    half = tokenizer.decode(tokenizer(words, add_special_tokens=False)["input_ids"][: length // 2 - 2])
    file.write_text((json.dumps({"prompt": half, "completion": half}) + "\n") * EXAMPLES)


def serve(pipe: Connection, settings: dict[str, Any], data: str) -> None:
    """Be a node until the pipe closes, then tell the processor seconds of each task, and the peak memory in bytes."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    node, seconds = Node(settings, {"name": "node", "data": data}, 1), []
    while (task := pipe.recv()) is not None:
        start = time.process_time()
        pipe.send(node.handle(*task))
        seconds.append(time.process_time() - start)
    pipe.send((seconds, peak_memory()))


def main() -> None:
    """Plan, run and print."""
    from comparison.memory import write_model

    from deploy.plan import plan
    from fedtune_strategies.language.model import load_model
    from fedtune_strategies.language.model_files import count_parameters, weight_files
    from fedtune_strategies.method import load_method
    from fedtune_strategies.run_config import parse

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = folder / "model", folder / "data.jsonl"
        write_model(model, args.layers, args.width)
        write_data(data, model, args.length)
        weights = count_parameters(weight_files(model))
        common = {"model.name": str(model), "train.batch-size": args.rows, "train.seq-length": args.length}
        print(f"{weights / 1e6:.1f} M parameters, {args.rows} rows of {args.length} tokens\n")
        print("| method | a task, s | planned | memory, MB | planned |\n| --- |" + " ---: |" * 4)
        for method, own in METHODS.items():
            settings = common | {"method.name": method, "run.dir": str(folder / method)} | own
            config = parse(settings)
            planned = plan(config, model, 1, EXAMPLES)
            measure = load_method(method).seconds
            assert measure is not None
            expected = measure(config, load_model(str(model)), EXAMPLES, time.process_time)
            seconds, peak = tune_apart(serve, settings, str(data))
            seconds = seconds[2:]  # after the greeting and the first task
            print(
                f"| {method} | {statistics.mean(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f}) | "
                f"{expected:.1f} | {(peak - 4 * weights) / 1e6:.0f} | {planned.memory / 1e6:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
