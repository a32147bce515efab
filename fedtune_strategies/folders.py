"""Folders that FedTune made. They carry a mark, and nothing without it is ever removed or replaced."""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedtune_strategies.errors import ResourceError

MARK = ".made-by-fedtune"
MEMBERS_FILE = "FEDTUNE_MEMBERS"  # the variable by which `fedtune serve` tells ServerApps where its members.json is
_OLD = ".old"


def keep_private() -> None:
    """Let all that this process and its children write be readable by their user alone; each program begins so."""
    os.umask(0o077)


def make_folder(folder: Path) -> Path:
    """Make a folder with our mark, or take one that has it or is empty; anything else in its place is an error."""
    check_ours(folder)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / MARK).touch(0o600)
    return folder


def private_runtime_folder(name: str) -> Path:
    """Return a folder for sockets, which this user alone can enter; its path is short, as a socket's must be."""
    # Where the path really leads: a link in it could be pointed elsewhere after we have looked.
    base = Path(os.path.realpath(_given_runtime_folder() or tempfile.gettempdir()))
    root = base / f"fedtune-{os.getuid()}"
    try:
        for folder in [*reversed(base.parents), base, root]:
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)
            _check_owner(folder, (os.getuid(),) if folder == root else (0, os.getuid()))
        root.chmod(0o700)
        return make_folder(root / name)
    except OSError as error:
        raise ResourceError(
            f"cannot use {root / name}: {error.strerror}; set XDG_RUNTIME_DIR to a folder of yours."
        ) from None


def _given_runtime_folder() -> str:
    """Return the session's runtime folder; empty where there is none, since it goes when its user logs out."""
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    nearest = next((folder for folder in (Path(given), *Path(given).parents) if folder.exists()), Path())
    return given if nearest == Path(given) or os.access(nearest, os.W_OK) else ""


def _check_owner(folder: Path, owners: tuple[int, ...]) -> None:
    """Raise `ResourceError` where another user could put something else in a folder's place, or into it."""
    found = folder.lstat()
    # In a sticky folder, such as /tmp, nobody can rename what is another's; but they may have made it first.
    shared = found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in owners or (shared and 0 in owners):
        raise ResourceError(f"{folder} belongs to another user: set XDG_RUNTIME_DIR to a folder of yours.")


@contextlib.contextmanager
def temporary_files_in(folder: Path) -> Iterator[None]:
    """Have files without a name made in a folder: they may be as large as a model, and the system's may be memory.

    ``TMPDIR`` comes first.
    """
    before = tempfile.tempdir
    tempfile.tempdir = os.environ.get("TMPDIR") or str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


def is_ours(folder: Path) -> bool:
    """Say whether a folder carries our mark; a link to one does not count."""
    return folder.is_dir() and not folder.is_symlink() and (folder / MARK).is_file()


def check_ours(folder: Path) -> None:
    """Raise `ResourceError` where a folder could not be made or replaced without touching what is not ours."""
    if not os.path.lexists(folder) or is_ours(folder):
        return
    if folder.is_symlink() or not folder.is_dir() or any(folder.iterdir()):
        raise ResourceError(f"{folder} was not made by FedTune and is left as it is: choose another folder.")


def remove_folder(folder: Path) -> None:
    """Remove a folder that carries our mark, with all that is in it; links in it are removed, not followed."""
    if not os.path.lexists(folder):
        return
    check_ours(folder)
    # The mark would go at some moment of a removal that is interrupted: aside, it is no longer taken for a whole one.
    old = folder.with_name(f"{folder.name}.{os.getpid()}{_OLD}")
    folder.rename(old)
    shutil.rmtree(old, ignore_errors=True)


def publish_folder(draft: Path, folder: Path) -> None:
    """Put a finished draft in its place; what was there is removed last, so a kill loses neither."""
    check_ours(folder)
    old = folder.with_name(f"{folder.name}.{os.getpid()}{_OLD}")
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(old)
