import builtins
import json
from collections import Counter

import pytest

from fedtune_strategies.errors import ConfigError, DataError
from fedtune_strategies.language.data import read_records
from fedtune_strategies.language.partition import partition_file

RECORDS = [{"prompt": str(i), "completion": "é", "topic": "abcd"[i % 4]} for i in range(200)]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "all.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    return path


def read(path):
    return [record for _, record in read_records(path)]


def test_natural_partition_gives_each_node_one_value(path, tmp_path):
    pytest.importorskip("flwr_datasets")
    parts = [read(file) for file in partition_file(path, tmp_path / "nodes", "topic", nodes=4)]
    assert [{record["topic"] for record in part} for part in parts] == [{"a"}, {"b"}, {"c"}, {"d"}]
    assert sorted(int(record["prompt"]) for part in parts for record in part) == list(range(200))


def test_dirichlet_partition_is_skewed_complete_and_repeatable(path, tmp_path):
    pytest.importorskip("flwr_datasets")
    files = partition_file(path, tmp_path / "nodes", "topic", nodes=3, alpha=0.3, seed=1)
    parts = [read(file) for file in files]
    assert sorted(int(record["prompt"]) for part in parts for record in part) == list(range(200))
    again = [read(file) for file in partition_file(path, tmp_path / "again", "topic", nodes=3, alpha=0.3, seed=1)]
    assert parts == again
    shares = [max(Counter(record["topic"] for record in part).values()) / len(part) for part in parts]
    assert max(shares) > 0.4  # a quarter each would be 0.25


def test_too_few_values(path, tmp_path):
    pytest.importorskip("flwr_datasets")
    with pytest.raises(DataError, match="column 'topic' has 4 values, too few for 5 nodes"):
        partition_file(path, tmp_path / "nodes", "topic", nodes=5)


def test_no_such_column(path, tmp_path):
    pytest.importorskip("flwr_datasets")
    with pytest.raises(DataError, match="no column 'kind' in every row to partition by; found prompt, completion"):
        partition_file(path, tmp_path / "nodes", "kind", nodes=2)


def test_without_flwr_datasets(path, tmp_path, monkeypatch):
    real = builtins.__import__

    def no_partitioners(name, *args, **kwargs):
        if name.startswith("flwr_datasets"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_partitioners)
    with pytest.raises(ConfigError, match="needs flwr-datasets: pip install"):
        partition_file(path, tmp_path / "nodes", "topic", nodes=2)
