"""The base model over the wire: for nodes that hold nothing.

A node asks and the server answers, chunk by chunk: first the manifest of the model folder, then every chunk that the
node lacks. A chunk is checked against its SHA-256 before it is kept, and kept chunks survive a broken connection and a
restart. Complete models stay in a cache of bounded size on the node's disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock

from fedtune_strategies.errors import ProtocolError, ResourceError
from fedtune_strategies.folders import is_ours, make_folder, remove_folder
from fedtune_strategies.protocol.messages import Message, ModelChunk, ModelManifest, ModelRequest

CHUNK_BYTES = 16 * 2**20  # at most; of a small model each is a 64th, so that little is lost with one
LEAST_CHUNK_BYTES = 2**19
MANY_CHUNKS = 100_000  # 1.6 TB
PARTIAL = ".partial"
ABANDONED = 3600.0  # seconds without a byte after which a download is nobody's any more
# What a causal language model and its tokenizer consist of; nothing that could be run.
_PLAIN = re.compile(r"[\w-][\w.-]*")
_FILE = re.compile(rf"{_PLAIN.pattern}\.(json|safetensors|txt|model|jinja)")
_SHA256 = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Chunk:
    """One stretch of a file."""

    file: str
    start: int
    size: int
    sha256: str


class ModelSource:
    """A model folder on the server, to be handed out."""

    def __init__(self, folder: Path, chunk_bytes: int = 0) -> None:
        self._folder = folder
        self._chunk_bytes = chunk_bytes

    @cached_property
    def manifest(self) -> str:
        """All chunks as JSON; read and hashed when it is first asked for."""
        files = sorted(path for path in self._folder.iterdir() if path.is_file() and _FILE.fullmatch(path.name))
        share = sum(path.stat().st_size for path in files) // 64
        size = self._chunk_bytes or min(max(share, LEAST_CHUNK_BYTES), CHUNK_BYTES)
        return json.dumps([vars(chunk) for path in files for chunk in _chunks(path, size)])

    @cached_property
    def _chunks(self) -> list[Chunk]:
        return read_manifest(self.manifest)

    def answer(self, wanted: ModelRequest) -> Message:
        """Answer what a node wants.

        Raises `ProtocolError`: there is no such chunk.
        """
        if wanted.chunk < 0:
            return ModelManifest(self.manifest)
        if wanted.chunk >= len(self._chunks):
            raise ProtocolError(f"{wanted.node} wants chunk {wanted.chunk} of a model of {len(self._chunks)} chunks.")
        data = bytearray(_read(self._folder, self._chunks[wanted.chunk]))
        return ModelChunk(wanted.chunk, torch.frombuffer(data, dtype=torch.uint8))


class ModelCache:
    """Models that came from servers, on a node's disk.

    `folder`: where they are; made where absent. Nodes of one machine may share it.
    `limit`: most bytes in it. To make room, the models that were unused longest are deleted.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self._folder = folder
        self._limit = limit
        self._chunks: list[Chunk] = []
        self._missing: list[int] = []
        self._target = folder

    def find(self, name: str) -> Path | None:
        """Return the folder of the model that last came under a name, None where there is none."""
        try:
            found = self._folder / (self._pointer(name).read_text() or "empty")  # while it is written
            os.utime(found)
            return found
        except OSError:
            return None

    @property
    def has_started(self) -> bool:
        """Whether a manifest has said what is wanted."""
        return bool(self._chunks)

    def start(self, node: str, name: str, manifest: str) -> Path | ModelRequest:
        """Begin with a manifest; return the model's folder if it is here already, else the first wanted chunk.

        Raises `ProtocolError`: the manifest is damaged, or names files that do not belong to a model.
        Raises `ResourceError`: the model is larger than the cache may be, or the disk is full or read-only.
        """
        self._chunks = read_manifest(manifest)
        digest = hashlib.sha256(manifest.encode()).hexdigest()[:32]
        self._target = self._folder / digest
        with self._alone():
            if not self._target.is_dir():
                self._make_room(sum(chunk.size for chunk in self._chunks))
                make_folder(self._partial)
                self._missing = [i for i, chunk in enumerate(self._chunks) if not _is_there(self._partial, chunk)]
            else:
                self._missing = []
            self._pointer(name).write_text(digest)
            return self._next(node)

    def take(self, node: str, number: int, data: bytes) -> Path | ModelRequest:
        """Keep a chunk; return the model's folder if it was the last one, else the next wanted chunk.

        Raises `ProtocolError`: it is not wanted, or not what the manifest says.
        Raises `ResourceError`: the disk is full or read-only.
        """
        if number not in self._missing:
            raise ProtocolError(f"chunk {number} of a model came unasked.")
        chunk = self._chunks[number]
        if len(data) != chunk.size or hashlib.sha256(data).hexdigest() != chunk.sha256:
            raise ProtocolError(f"chunk {number} of a model is not what the server's list says.")
        with self._alone():
            if self._target.is_dir():  # another node that shares the cache was faster
                self._missing = []
                return self._target
            path = self._partial / chunk.file
            path.touch()
            with path.open("r+b") as file:
                file.seek(chunk.start)
                file.write(data)
            self._missing.remove(number)
            return self._next(node)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other nodes that share the cache, in any process, from changing it meanwhile."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with FileLock(self._folder / "lock"):
                yield
        except OSError as error:
            raise self._error(error) from None

    @property
    def _partial(self) -> Path:
        return self._target.with_suffix(PARTIAL)

    def _pointer(self, name: str) -> Path:
        return self._folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.name"

    def _next(self, node: str) -> Path | ModelRequest:
        if self._missing:
            return ModelRequest(node, self._missing[0])
        if not self._target.is_dir():
            _check_indices(self._partial)
            self._partial.rename(self._target)
        return self._target

    def _make_room(self, size: int) -> None:
        if size > self._limit:
            raise ResourceError(
                f"the run's model has {size:,} bytes, the cache in {self._folder} may have {self._limit:,}: "
                "raise the node's 'cache-gb', or give it the model with 'model'."
            )
        models = [path for path in self._folder.iterdir() if is_ours(path) and path != self._partial]
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path in models}
        old = (path for path in sorted(models, key=lambda model: model.stat().st_mtime) if not _is_arriving(path))
        while sum(sizes.values()) + size > self._limit:
            path = next(old, None)
            if path is None:
                raise ResourceError(
                    f"{self._folder}: other nodes fetch models that leave no room; raise 'cache-gb', or wait for them."
                )
            remove_folder(path)
            del sizes[path]

    def _error(self, error: OSError) -> ResourceError:
        return ResourceError(f"{self._folder}: {error.strerror}; free space, or choose another 'cache' for the node.")


def _is_arriving(folder: Path) -> bool:
    """Whether another node, which shares the cache, seems to be fetching this model."""
    newest = max((file.stat().st_mtime for file in (folder, *folder.iterdir())), default=0.0)
    return folder.suffix == PARTIAL and time.time() - newest < ABANDONED


def read_manifest(text: str) -> list[Chunk]:
    """Read a manifest.

    Raises `ProtocolError`: it is damaged, names a file that does not belong to a model, or its chunks do not fill every
        file from its start without a gap.
    """
    try:
        chunks = [Chunk(**entry) for entry in json.loads(text)]
        sound = 0 < len(chunks) <= MANY_CHUNKS and _fill_their_files(chunks)
    except (ValueError, TypeError, RecursionError):
        sound = False
    if not sound:
        raise ProtocolError("received a damaged list of a model's files.")
    return chunks


def _fill_their_files(chunks: list[Chunk]) -> bool:
    ends: dict[str, int] = {}
    for chunk in chunks:
        if not (_FILE.fullmatch(chunk.file) and _SHA256.fullmatch(chunk.sha256)):
            return False
        if type(chunk.start) is not int or type(chunk.size) is not int or not 0 < chunk.size <= CHUNK_BYTES:
            return False
        if chunk.start != ends.get(chunk.file, 0):
            return False
        ends[chunk.file] = chunk.start + chunk.size
    return True


def _check_indices(folder: Path) -> None:
    """Refuse a model whose index of weights names a file outside its folder."""
    for path in sorted(folder.glob("*.index.json")):
        try:
            plain = all(map(_PLAIN.fullmatch, json.loads(path.read_bytes())["weight_map"].values()))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            plain = False
        if not plain:
            remove_folder(folder)
            raise ProtocolError(f"{path.name} of the model names other than files of its folder: it was not kept.")


def _chunks(path: Path, chunk_bytes: int) -> Iterator[Chunk]:
    start = 0
    with path.open("rb") as file:
        while data := file.read(chunk_bytes):
            yield Chunk(path.name, start, len(data), hashlib.sha256(data).hexdigest())
            start += len(data)


def _read(folder: Path, chunk: Chunk) -> bytes:
    with (folder / chunk.file).open("rb") as file:
        file.seek(chunk.start)
        return file.read(chunk.size)


def _is_there(folder: Path, chunk: Chunk) -> bool:
    if not (folder / chunk.file).is_file():
        return False
    return hashlib.sha256(_read(folder, chunk)).hexdigest() == chunk.sha256


def as_bytes(data: torch.Tensor) -> bytes:
    """Return the bytes of a chunk."""
    return np.ascontiguousarray(data.numpy()).tobytes()
