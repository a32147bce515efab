"""Peak memory of a node by method, against plain inference: each node in a process of its own.

    python benchmarks/comparison/memory.py [--layers 12] [--width 512] [--rows 4] [--length 128]

A random Llama, written to disk once, is tuned for one round of two local steps by a real server and a real node, the
latter in a fresh process, asked over a pipe. "Inference" is one loss of a batch, nothing kept. Bytes are the peak
resident memory that the node reports, less what a process has that loaded the same libraries and no model.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from client_app.tasks import Node
from fedtune_strategies.language.examples import batches
from fedtune_strategies.language.loss import response_loss
from fedtune_strategies.language.model_files import model_folder
from fedtune_strategies.memory import peak_memory
from fedtune_strategies.testing import InMemoryGrid
from server_app.ledger import Ledger
from server_app.run import execute

METHODS: dict[str, dict[str, Any]] = {
    "fedkseed": {"fedkseed.local-steps": 2},
    "fedzo": {"fedavg.local-steps": 2},
    "fedcybgd": {"fedcybgd.local-steps": 2, "num-server-rounds": 2},  # the second turn: a transformer layer
    "fedit": {"fedavg.local-steps": 2},
    "fedavg": {"fedavg.local-steps": 2},
}


def write_model(folder: Path, layers: int, width: int) -> int:
    """Write a random model with the embedded model's tokenizer; returns its number of parameters."""
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
    return sum(parameter.numel() for parameter in model.parameters())


def serve(pipe: Connection, settings: dict[str, Any], data: str) -> None:
    """Be a node: answer (kind, payload) from the pipe until it closes."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    node = Node(settings, {"name": "node", "data": data}, 1)
    while (task := pipe.recv()) is not None:
        pipe.send(node.handle(*task))


def infer(settings: dict[str, Any], data: str) -> tuple[int, int]:
    """Return the peak memory before a model was loaded, and after one loss of one batch."""
    torch.set_num_threads(1)
    before = peak_memory()
    node = Node(settings, {"name": "node", "data": data}, 1)
    (batch,) = batches(node.examples, node.config.train.batch_size, 1, (0,))
    with torch.no_grad():
        response_loss(node.language.model, batch)
    return before, peak_memory()


def tune(settings: dict[str, Any], data: str) -> int:
    """Return the peak memory of a node that took part in a run."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, settings, data))
    process.start()
    there.close()  # or a node that died would be waited for

    def ask(kind: str, payload: bytes) -> tuple[str, bytes]:
        here.send((kind, payload))
        return here.recv()

    try:
        execute(InMemoryGrid({1: ask}), settings, run_id=1)
    finally:
        here.send(None)
        process.join()
    return max(record.body["peak_memory"] for record in Ledger.read(Path(settings["run.dir"])).records("reply"))


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_model(folder / "model", args.layers, args.width)
        data = folder / "data.jsonl"
        data.write_text((json.dumps({"text": "a b c d " * 200}) + "\n") * 16)
        common = {
            "model.name": str(folder / "model"), "train.seq-length": args.length, "train.batch-size": args.rows,
            "num-server-rounds": 1,
        }  # fmt: skip
        before, inference = in_process(infer, common, str(data))
        weights = 4 * parameters
        print(f"{parameters / 1e6:.1f} M parameters in float32, {weights / 1e6:.0f} MB")
        print("| node | peak above an empty process | against inference | times the weights |\n| --- |" + " ---: |" * 3)
        rows = {"inference": inference}
        for method, own in METHODS.items():
            settings = common | {"method.name": method, "run.dir": str(folder / method)} | own
            rows[method] = tune(settings, str(data))
        for method, peak in rows.items():
            ratio = (peak - before) / (inference - before)
            print(f"| {method} | {(peak - before) / 1e6:.0f} MB | {ratio:.2f} | {(peak - before) / weights:.1f} |")


if __name__ == "__main__":
    main()
