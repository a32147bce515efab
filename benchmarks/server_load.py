"""Time and memory of a round on the server, by the number of replies: a strategy alone, fed in memory.

    python benchmarks/server_load.py [--method fedkseed] [--nodes 100 1000 10000] [--seeds 4096] [--steps 200]
    python benchmarks/server_load.py --rounds 10000 [--folder /dev/shm]
    python benchmarks/server_load.py --memory fedcybgd gradient fedkseed [--layers 12] [--width 768] [--model FOLDER]

One process for each number of nodes. Per round: configuring the tasks, checking the replies as they come, and
aggregating them; the memory is the peak of the process less what it held before the first task, with all replies
in it as they are in the ledger's rows. Without network, ledger and evaluation.

With ``--rounds``: one run of so many rounds, its main loop, ledger and guard, with four nodes that answer at once; what
a round costs at the start and at the end of it.

With ``--memory``: the anonymous memory of a server that tunes a random Llama in bfloat16, or a model such as
`large_rounds.py` writes, with a node in another process, against the bytes of that model; what it maps from files (base
model, blocks, moved weights) is not in it. Held is the median over the last round, read a hundred times a second. Linux
only.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import re
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import psutil
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType
from node import compile_kernels, write_model
from node import serve as answer_tasks

from fedtune_strategies.admission import Node
from fedtune_strategies.fedkseed.config import FedKSeedRunConfig
from fedtune_strategies.fedkseed.messages import SeedReply
from fedtune_strategies.fedkseed.strategy import FedKSeed
from fedtune_strategies.fleet import Fleet
from fedtune_strategies.language.model_files import count_parameters, weight_files
from fedtune_strategies.memory import peak_memory, prefer_memory
from fedtune_strategies.method import register_messages
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.handshake import PROTOCOL_VERSION, Hello, HelloReply
from fedtune_strategies.protocol.records import to_record
from fedtune_strategies.run_config import parse
from fedtune_strategies.seed_space import fingerprint
from fedtune_strategies.testing import Handler, InMemoryGrid
from server_app.guard import Guard
from server_app.ledger import Ledger
from server_app.rounds import Run, run_rounds


class Crowd(Fleet):
    """A fleet whose nodes are there without having been asked who they are."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(InMemoryGrid({}), "")
        self._present = {name: Node(name, number, 10) for number, name in enumerate(names, start=1)}

    @property
    def nodes(self) -> dict[str, Node]:
        """All nodes, by name in sorted order."""
        return self._present


@dataclass(frozen=True)
class Load:
    """Seconds of processor time, and bytes."""

    configure: float
    accept: float
    aggregate: float
    memory: int


def measure(count: int, method: str, seeds: int, steps: int) -> Load:
    """Run one round, the second one, in which every node holds the theta of the first."""
    logging.disable(logging.INFO)
    settings = {
        "method.name": method,
        "fedkseed.seeds": seeds,
        "train.local-steps": steps,
        "strategy.min-nodes": count,
    }
    config = parse(settings)
    register_messages(method)
    base = {"weight": torch.zeros(64)}
    strategy = FedKSeed(cast(FedKSeedRunConfig, config), base)
    names = [f"node-{i:06d}" for i in range(count)]
    crowd = Crowd(names)
    arrays = strategy.initial_arrays()
    print_of_weights = strategy.materialise(arrays, {"weight": torch.zeros(64)})
    scalars = torch.from_numpy(np.random.default_rng(0).normal(size=(16, steps)).astype(np.float32))
    gc.collect()
    held = psutil.Process().memory_info().rss
    tasks, configure = timed(lambda: list(strategy.configure_train(1, arrays, ConfigRecord(), crowd)))
    assert len(tasks) == count
    replies = [
        SeedReply(
            node=name,
            round=1,
            scalars=scalars[i % 16],
            unit=1.0,
            loss=2.0,
            fingerprint=print_of_weights,
            num_examples=10,
            seconds=1.0,
            peak_memory=10,
            lr=1e-4,
            noise=0.0,
        )
        for i, name in enumerate(names)
    ]
    accepted, accept = timed(lambda: [strategy.accept(1, reply) for reply in replies])
    assert all(accepted)
    records = [
        Message(to_record(reply.kind, protocol.encode(reply)), dst_node_id=0, message_type=MessageType.TRAIN)
        for reply in replies
    ]
    _, aggregate = timed(lambda: strategy.aggregate_train(1, records))
    return Load(configure, accept, aggregate, peak_memory() - held)


def long_run(rounds: int, folder: Path) -> None:
    """Drive the main loop, and print what a round costs as the run grows."""
    logging.disable(logging.CRITICAL)
    nodes, seeds, steps, window = 4, 64, 8, max(1, min(100, rounds // 10))
    config = parse(
        {"fedkseed.seeds": seeds, "train.local-steps": steps, "num-server-rounds": rounds, "strategy.min-nodes": nodes,
         "strategy.min-replies": nodes, "fedkseed.eps": 1e-3, "train.lr": 1e-6}
    )  # fmt: skip
    register_messages(config.method.name)
    base = {"weight": torch.zeros(64)}
    parameters = {"weight": torch.zeros(64)}
    strategy = FedKSeed(cast(FedKSeedRunConfig, config), base)
    scalars = torch.from_numpy(np.random.default_rng(0).normal(size=steps).astype(np.float32))

    def handler(name: str) -> Handler:
        def handle(kind: str, payload: bytes) -> tuple[str, bytes]:
            message = protocol.decode(kind, payload)
            answer: protocol.Message
            if isinstance(message, Hello):
                answer = HelloReply(name, PROTOCOL_VERSION, 10, message.fingerprint, 10)
            else:
                answer = SeedReply(
                    node=name, round=cast(Any, message).round, scalars=scalars, unit=1.0, loss=2.0,
                    fingerprint=strategy.fingerprint, num_examples=10, seconds=1.0, peak_memory=10, lr=1e-6, noise=0.0,
                )  # fmt: skip
            return answer.kind, protocol.encode(answer)

        return handle

    costs: list[float] = []
    before = time.process_time()

    def place(number: int, arrays: ArrayRecord) -> None:
        nonlocal before
        strategy.materialise(arrays, parameters)
        costs.append(time.process_time() - before)
        before = time.process_time()

    with tempfile.TemporaryDirectory(dir=folder) as run:
        ledger = Ledger(Path(run) / "run")

        def note(kind: str, node: str, line: str, bytes_down: int) -> None:
            ledger.append(kind, node=node, body={"reason": line})

        fleet = Fleet(
            InMemoryGrid({number: handler(f"node-{number}") for number in range(1, nodes + 1)}), fingerprint(base),
            on_event=note,
        )  # fmt: skip
        run_rounds(Run(strategy, fleet, ledger, config), place, lambda: None, Guard(config, ledger))
        size = (ledger.folder / "ledger.sqlite").stat().st_size
        ledger.close()
    first, last = statistics.median(costs[10 : 10 + window]), statistics.median(costs[-window:])
    print(f"{rounds:,} rounds of {nodes} nodes, ledger {size / 1e6:.1f} MB, median of {window} rounds each:")
    print(f"round 10: {1e3 * first:.2f} ms, round {rounds:,}: {1e3 * last:.2f} ms, {last / first:.2f} times")


# FedCyBGD: embedding, then layers.
MEMORY: dict[str, dict[str, Any]] = {
    "fedcybgd": {"method.name": "fedcybgd", "num-server-rounds": 6, "train.local-steps": 1},
    "gradient": {"fedkseed.estimator": "gradient", "num-server-rounds": 3, "train.local-steps": 1},
    "fedkseed": {"num-server-rounds": 3, "train.local-steps": 2, "train.lr": 1e-7, "fedkseed.eps": 1e-2},
}


def memory_of_server(methods: list[str], layers: int, width: int, given: Path | None) -> None:
    """Print how much memory a server takes by method."""
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data.jsonl"
        model = given or write_model(Path(name) / "model", layers, width, dtype=torch.bfloat16)
        data.write_text((json.dumps({"text": "a b c d " * 8}) + "\n") * 8)
        weights = 2 * count_parameters(weight_files(model))
        print(f"{weights / 2e6:.1f} M parameters in bfloat16, {weights / 1e6:.0f} MB\n")
        print("| method | held, MB | of the model | peak, MB | of the model |\n| --- |" + " ---: |" * 4)
        for method in methods:
            settings = MEMORY[method] | {
                "model.name": str(model), "run.dir": f"{name}/{method}", "train.seq-length": 32, "train.batch-size": 1,
                "eval.data": str(data), "eval.answers": 0,
            }  # fmt: skip
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                held, peak = pool.submit(anonymous_memory, settings, str(data)).result()
            print(
                f"| {method} | {held / 1e6:.0f} | {held / weights:.2f} | {peak / 1e6:.0f} | {peak / weights:.2f} |",
                flush=True,
            )


def anonymous_memory(settings: dict[str, Any], data: str) -> tuple[int, int]:
    """Run a server in this process; return what it held in its last round, and the most that it took, in bytes."""
    from server_app.run import execute

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    compile_kernels()
    prefer_memory()  # as the ServerApp does
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=answer_tasks, args=(theirs, settings, data, False))
    process.start()
    found: list[tuple[float, int]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            (kilobytes,) = re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
            found.append((time.time(), 1024 * int(kilobytes)))

    threading.Thread(target=watch).start()
    began = 0.0

    def ask(kind: str, payload: bytes) -> tuple[str, bytes]:
        nonlocal began
        began = time.time()
        pipe.send((kind, payload))
        return cast(tuple[str, bytes], pipe.recv())

    time.sleep(0.1)
    before = found[-1][1]
    execute(InMemoryGrid({1: ask}), settings, run_id=1)
    over.set()
    pipe.send(None)
    process.join()
    held = statistics.median(bytes_ for when, bytes_ in found if when >= began)
    return int(held) - before, max(bytes_ for _, bytes_ in found) - before


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    """Return what an action returns, and its processor seconds."""
    start = time.process_time()
    result = action()
    return result, time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="fedkseed", choices=("fedkseed", "fedkseed-pro"))
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--rounds", type=int, default=0, help="drive one long run instead")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where its ledger is")
    parser.add_argument("--memory", nargs="+", choices=sorted(MEMORY), help="measure a server's memory instead")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--model", type=Path, help="a folder instead of the random model")
    parser.add_argument("--seeds", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    if args.rounds:
        long_run(args.rounds, args.folder)
        return
    if args.memory:
        memory_of_server(args.memory, args.layers, args.width, args.model)
        return
    print("| replies | configure, s | accept, s | aggregate, s | aggregate, ms a reply | memory, MB | kB a reply |")
    print("| ---: |" + " ---: |" * 6)
    context = multiprocessing.get_context("spawn")
    for count in args.nodes:
        with context.Pool(1) as pool:
            load = pool.apply(measure, (count, args.method, args.seeds, args.steps))
        print(
            f"| {count:,} | {load.configure:.2f} | {load.accept:.2f} | {load.aggregate:.2f} "
            f"| {1000 * load.aggregate / count:.2f} | {load.memory / 1e6:.0f} | {load.memory / count / 1e3:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
