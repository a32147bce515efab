"""Cut one local data file into several, one for each node: for demos and experiments on one machine only.

In a federation each owner names a file of their own; nothing here is used there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from fedtune_strategies.errors import ConfigError, DataError
from fedtune_strategies.language.data import read_records

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner


def partition_file(
    path: str | Path, folder: str | Path, column: str, nodes: int, alpha: float | None = None, seed: int = 0
) -> list[Path]:
    """Write a file's records to ``node-0.jsonl``, …, which differ in how often each value of a column occurs.

    Alpha is the concentration of a Dirichlet distribution over the column's values, the smaller the more different the
    nodes. Without it each node gets the records of one value, and values beyond the first `nodes` are left out.
    """
    try:
        from datasets import Dataset
        from flwr_datasets.partitioner import DirichletPartitioner, NaturalIdPartitioner
    except ImportError:
        raise ConfigError("partitioning needs flwr-datasets: pip install flwr-datasets") from None
    records = [record for _, record in read_records(path)]
    if not records or any(column not in record for record in records):
        raise DataError(f"{path}: no column {column!r} in every row to partition by; found {', '.join(records[0])}")
    partitioner: Partitioner
    if alpha is None:
        partitioner = NaturalIdPartitioner(partition_by=column)
    else:
        partitioner = DirichletPartitioner(nodes, column, alpha, min_partition_size=1, seed=seed)
    # Only row numbers and the column go through Arrow: it would give every row the same columns and types.
    values = {"row": list(range(len(records))), column: [str(record[column]) for record in records]}
    partitioner.dataset = Dataset.from_dict(values)
    if partitioner.num_partitions < nodes:
        raise DataError(f"{path}: column {column!r} has {partitioner.num_partitions} values, too few for {nodes} nodes")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for node in range(nodes):
        lines = [json.dumps(records[row], ensure_ascii=False) for row in partitioner.load_partition(node)["row"]]
        files.append(folder / f"node-{node}.jsonl")
        files[-1].write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return files
