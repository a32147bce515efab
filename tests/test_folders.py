"""What FedTune removes and replaces is what it made, and nothing else."""

import os
import re
import tempfile
from pathlib import Path

import pytest

from fedtune_strategies.errors import ResourceError
from fedtune_strategies.folders import MARK, make_folder, private_runtime_folder, publish_folder, remove_folder

ROOT = Path(__file__).parents[1]


def test_no_other_module_removes_a_folder():
    for package in ("client_app", "server_app", "fedtune_strategies", "deploy"):
        for path in (ROOT / package).rglob("*.py"):
            found = re.search(r"rmtree|removedirs|\brmdir\b", path.read_text())
            assert found is None or path.name == "folders.py", path


def test_a_folder_of_the_user_is_left_as_it_is(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    for act in (remove_folder, make_folder, lambda folder: publish_folder(make_folder(tmp_path / "draft"), folder)):
        with pytest.raises(ResourceError, match="not made by FedTune") as caught:
            act(tmp_path)
        assert "\n" not in str(caught.value)
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_links_are_removed_and_never_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "mine.txt").write_text("precious")
    ours = make_folder(tmp_path / "ours")
    (ours / "link").symlink_to(precious)
    remove_folder(ours)
    assert not ours.exists() and (precious / "mine.txt").exists()
    make_folder(precious / "sub")
    (tmp_path / "link").symlink_to(precious / "sub")
    with pytest.raises(ResourceError):
        remove_folder(tmp_path / "link")
    assert (precious / "sub" / MARK).exists()


@pytest.mark.parametrize("step", ["rename", "rmtree"])
def test_a_kill_while_replacing_loses_neither_the_old_nor_the_new(tmp_path, monkeypatch, step):
    old, draft = make_folder(tmp_path / "model"), make_folder(tmp_path / "model.partial")
    (old / "weights").write_text("old")
    (draft / "weights").write_text("new")
    calls = iter([True, False])
    rename = Path.rename

    def die(*_, **__):
        raise KeyboardInterrupt

    if step == "rename":
        monkeypatch.setattr(Path, "rename", lambda self, to: rename(self, to) if next(calls) else die())
    else:
        monkeypatch.setattr("shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        publish_folder(draft, old)
    kept = {file.read_text() for file in tmp_path.rglob("weights")}
    assert kept == {"old", "new"}


def test_an_empty_folder_may_be_taken(tmp_path):
    (tmp_path / "empty").mkdir()
    assert (make_folder(tmp_path / "empty") / MARK).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_runtime_folder_is_made_below_no_folder_and_no_link_of_another_user(tmp_path, monkeypatch):
    """As on a shared /tmp, where another account was first: a folder, a link, a link to a folder of the victim's."""
    precious = make_folder(tmp_path / "precious")
    (precious / "mine.txt").write_text("precious")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / f"fedtune-{os.getuid()}").symlink_to(precious)
    link = tmp_path / "link"
    link.symlink_to(theirs)
    for base in (theirs, theirs / "below", open_to_all, mine, link, tmp_path / "precious/mine.txt"):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(base))
        with pytest.raises(ResourceError, match="set XDG_RUNTIME_DIR") as caught:
            private_runtime_folder("1-2")
        assert "\n" not in str(caught.value)
    assert (precious / "mine.txt").read_text() == "precious" and not (precious / "1-2").exists()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    folder = private_runtime_folder("1-2")
    remove_folder(folder.parent / "1-2")
    folder.parent.rmdir()
    folder.parent.parent.rmdir()  # as at a logout
    assert private_runtime_folder("1-2") == folder
    assert {path.stat().st_mode & 0o777 for path in (folder, folder.parent)} == {0o700}


def test_without_the_session_s_runtime_folder_the_temporary_one_is_taken(monkeypatch, tmp_path):
    """A user may not make again what a logout has removed."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run/user/1000"))
    assert private_runtime_folder("1-2") == tmp_path / f"fedtune-{os.getuid()}" / "1-2"
