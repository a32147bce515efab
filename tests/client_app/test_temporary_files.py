"""Where a worker and a server keep what is as large as a model and has no name."""

import tempfile
from pathlib import Path

import pytest
import torch

from client_app.worker import keep_temporary_files_in
from fedtune_strategies.folders import temporary_files_in
from fedtune_strategies.seed_space import make_pool
from fedtune_strategies.seed_space.moved import MovedWeights
from fedtune_strategies.seed_space.scaled import scaled


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", tempfile.tempdir)
    monkeypatch.delenv("TMPDIR", raising=False)


def file_of(tensor):
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= address < high:
            return line.split()[-2]
    return None


def moved():
    weights = MovedWeights({"w": torch.randn(1 << 20)})
    weights.add(scaled(make_pool("walsh", 1, 64), {"w": 1.0}), torch.randn(64))
    return weights["w"]


def test_moved_weights_are_in_the_cache_folder(tmp_path):
    keep_temporary_files_in(tmp_path / "cache")
    assert file_of(moved()).startswith(str(tmp_path / "cache"))


def test_what_the_owner_says_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    keep_temporary_files_in(tmp_path / "cache")
    assert file_of(moved()).startswith(str(tmp_path)) and not (tmp_path / "cache").exists()


def test_a_cache_that_cannot_be_made_is_no_error(tmp_path):
    (tmp_path / "file").write_text("")
    keep_temporary_files_in(tmp_path / "file" / "cache")
    assert file_of(moved()).startswith(tempfile.gettempdir())


def test_a_server_keeps_them_in_its_run_s_folder_while_it_runs(tmp_path):
    with temporary_files_in(tmp_path):
        assert file_of(moved()).startswith(str(tmp_path))
    assert not file_of(moved()).startswith(str(tmp_path))
