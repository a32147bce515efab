"""Bytes, memory and seconds of block turns on a model of 109.5 million parameters. Prints a Markdown table.

    python benchmarks/block_reach.py [--nodes 4] [--turns 15] [--hold coded] [--rest int8] [--upload float32]

A random Llama with 12 layers, in a folder that server and nodes map. The server's and the nodes' own code, each node in
a process of its own; messages pass through pipes instead of Flower. The 12 layers are trained, embedding and norm
frozen. After the first cycle: bytes of payload a turn, up against the block in its coding, down against the model in
bfloat16; and of a node's process the peak of memory that no file backs, less what it had before it loaded the model,
against what is needed: the rest in its coding, 16 bytes for each parameter of the block, and activations, as
block_step.py measures them.
"""

from __future__ import annotations

import argparse
import random
import string
import tempfile
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from apart import Apart
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from client_app.tasks import Node
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.testing import InMemoryGrid
from server_app.ledger import Ledger
from server_app.run import execute

LAYERS, HIDDEN, VOCABULARY = 12, 768, 32_000


def main() -> None:
    """Run a federation and print a row for each turn after the first cycle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--hold", default="coded")
    parser.add_argument("--rest", default="int8")
    parser.add_argument("--upload", default="float32")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parameters = write_model(folder / "model")
        settings = {
            "method.name": "fedcybgd",
            "model.name": str(folder / "model"),
            "num-server-rounds": args.turns,
            "strategy.min-nodes": args.nodes,
            "train.seq-length": args.length,
            "train.batch-size": args.batch,
            "fedcybgd.local-steps": args.steps,
            "fedcybgd.hold": args.hold,
            "fedcybgd.rest": args.rest,
            "fedcybgd.upload": args.upload,
            "fedcybgd.lr": 1e-5,
            "fedcybgd.train-embeddings": False,
            "run.dir": str(folder / "run"),
        }
        nodes = {number: Remote(settings, write_data(folder, number), number) for number in range(1, args.nodes + 1)}
        execute(InMemoryGrid({number: node.handle for number, node in nodes.items()}), settings, run_id=1)
        print_table(Ledger.read(folder / "run"), list(nodes.values()), parameters)
        for node in nodes.values():
            node.close()


class Remote(Apart):
    """A node in a process of its own; counts by turn."""

    def __init__(self, settings: dict, data: Path, number: int) -> None:
        super().__init__(serve, settings, str(data), number)
        self.down: dict[int, int] = {}
        self.peak: dict[int, int] = {}

    def handle(self, kind: str, payload: bytes) -> tuple[str, bytes]:
        """Pass a task on, and count."""
        kind, reply, peak = self.ask(kind, payload)
        answer = protocol.decode(kind, reply)
        if isinstance(answer, protocol.Kept | protocol.BlockReply):
            trained = isinstance(answer, protocol.BlockReply)
            # What came ahead belongs to the node's next turn.
            turn = answer.round + (not trained)
            self.down[turn] = self.down.get(turn, 0) + len(payload)
            self.peak[turn] = peak
        return kind, reply


def serve(pipe: Connection, settings: dict, data: str, number: int) -> None:
    """Answer tasks until told to stop; with each answer, the peak of own memory during the task."""
    torch.set_num_threads(1)
    own_memory = Sampler()
    node = Node(settings, {"name": f"node-{number}", "data": data}, number)
    while (task := pipe.recv()) is not None:
        own_memory.peak = 0
        kind, reply = node.handle(*task)
        del task
        pipe.send((kind, reply, own_memory.peak))
    pipe.send(None)


class Sampler(threading.Thread):
    """Samples memory of this process that no file backs, less what there was at first."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.first = resident()
        self.peak = 0
        self.start()

    def run(self) -> None:
        """Sample."""
        while True:
            self.peak = max(self.peak, resident() - self.first)
            time.sleep(0.002)


def resident() -> int:
    """Bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def print_table(ledger: Ledger, nodes: list[Remote], parameters: int) -> None:
    """Print a row for each turn after the first cycle."""
    by_name = {f"node-{number}": node for number, node in enumerate(nodes, start=1)}
    print("| turn | block | up, MB | block in float32, MB | down, MB | of bf16 model | seconds | peak memory, MB |")
    print("|---|---|---|---|---|---|---|---|")
    for record in list(ledger.records("reply"))[LAYERS:]:
        reply = protocol.decode("block-reply", ledger.payload(record))
        assert isinstance(reply, protocol.BlockReply)
        node, turn = by_name[record.node], record.round
        size = sum(value.nbytes for value in ledger.get_file(stored(ledger, turn)).values())
        down = node.down.get(turn, 0)
        print(
            f"| {turn} | {reply.block} | {record.body['bytes_up'] / 1e6:.1f} | {size / 1e6:.1f} | {down / 1e6:.1f} "
            f"| {down / (2 * parameters):.3f} | {reply.seconds:.1f} | {node.peak[turn] / 1e6:.0f} |"
        )


def stored(ledger: Ledger, turn: int) -> str:
    """Name of the file with the block of a turn."""
    return next(iter(next(ledger.records("round", round=turn)).body["files"].values()))


def write_model(folder: Path) -> int:
    """Write a random Llama and a tokenizer of letters; returns the number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN * 8 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words = {token: i for i, token in enumerate(["<unk>", "</s>", *string.ascii_lowercase, " "])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return model.num_parameters()


def write_data(folder: Path, number: int) -> Path:
    """Write rows of random letters that fill the sequence."""
    letters = random.Random(number)
    path = folder / f"{number}.jsonl"
    rows = ("".join(letters.choices(string.ascii_lowercase, k=400)) for _ in range(16))
    path.write_text("".join(f'{{"text": "{row}"}}\n' for row in rows))
    return path


if __name__ == "__main__":
    main()
