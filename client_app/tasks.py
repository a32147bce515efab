"""What a node does: one function per kind of task, over one loaded model and one owner's data."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from client_app.block_turns import BlockTurns
from client_app.local_training import LocalTraining
from client_app.seed_rounds import SeedRounds
from fedtune_strategies.config import parse
from fedtune_strategies.errors import ConfigError, FedTuneError, ModelError, ResourceError
from fedtune_strategies.language.data import FORMATS, read_rows
from fedtune_strategies.language.examples import tokenise
from fedtune_strategies.language.model import base_tensors, check_context, load_model
from fedtune_strategies.language.model_files import is_here
from fedtune_strategies.logs import about
from fedtune_strategies.memory import peak_memory, release_memory
from fedtune_strategies.method import NodeContext, load_method
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.provision import ModelCache, as_bytes
from fedtune_strategies.seed_space import fingerprint

log = logging.getLogger("fedtune")

NODE_KEYS = {
    "name": "the node's name, unique in the federation (default: from Flower's node id)",
    "data": "file or folder with the owner's data (required)",
    "format": "format of the data: auto, " + ", ".join(FORMATS),
    "model": "folder of the base model on this machine, instead of 'model.name'; \"server\" to get it from there",
    "cache": "folder for models that come from servers (default: ~/.fedtune/models)",
    "cache-gb": "most gigabytes in it (default: 50)",
    "device": "where the model runs: cpu, cuda, cuda:1 (default: cpu)",
}


class Node:
    """A node with its model and data in memory.

    Parameters
    ----------
    run_config : mapping of str to str, int, float or bool
        The run's configuration.
    node_config : mapping of str to str, int, float or bool
        The node's own configuration, see `NODE_KEYS`.
    node_id : int
        Flower's id of the node; names it where its configuration does not.

    Raises
    ------
    FedTuneError
        A configuration, the data or the model is not usable.
    """

    answer: Callable[[protocol.Message], protocol.Message] | None = None
    base_fingerprint = ""

    def __init__(self, run_config: Mapping[str, Any], node_config: Mapping[str, Any], node_id: int) -> None:
        self.config = parse(run_config)
        settings = check_node_config(node_config)
        self.name = settings.get("name") or f"node-{node_id & (2**64 - 1):016x}"
        self._settings = settings
        self._rows = read_rows(Path(settings["data"]).expanduser(), settings.get("format", "auto"))
        self._cache = ModelCache(_cache_folder(settings), _cache_limit(settings))
        self._from_server = settings.get("model") == "server"
        name: str | Path | None = settings.get("model") or self.config.model.name
        if self._from_server or not (settings.get("model") or is_here(self.config.model.name)):
            self._from_server, name = True, self._cache.find(self.config.model.name)
        if name is not None:
            self._load(str(name))

    def _load(self, model: str) -> None:
        self.language = load_model(model, self.config.model.dtype, self._settings.get("device", "cpu"))
        check_context(self.language, self.config.train.seq_length)
        self.examples = tokenise(self._rows, self.language.tokenizer, self.config.train.seq_length)
        self.base = base_tensors(self.language)
        self.base_fingerprint = fingerprint(self.base)
        context = NodeContext(self.config, self.name, self.language.model, self.base, self.examples)
        self.answer = _method(self.config.method.name)(context)
        log.info("%s: %d examples, model %s", self.name, len(self.examples), self.language.folder)

    def handle(self, kind: str, payload: bytes) -> tuple[str, bytes]:
        """Do one task.

        Parameters
        ----------
        kind : str
            Kind of the message.
        payload : bytes
            The encoded message.

        Returns
        -------
        tuple of str and bytes
            Kind and encoding of the reply; a `Failure` where the task cannot be done.
        """
        with about(node=self.name) as facts:
            reply = self._reply(kind, payload, facts)
        encoded = protocol.encode(reply)
        release_memory()
        return reply.kind, encoded

    def _reply(self, kind: str, payload: bytes, facts: dict[str, str | int]) -> protocol.Message:
        try:
            message = protocol.decode(kind, payload)
            facts["round"] = getattr(message, "round", 0)
            reply = self._answer(message)
        except FedTuneError as error:
            log.error("%s: %s", self.name, error)
            reply = protocol.Failure(error.exit_code, str(error))
        except MemoryError:
            reply = protocol.Failure(ResourceError.exit_code, "not enough memory for the task on this node.")
        except Exception as error:
            log.exception("%s: a defect of FedTune", self.name)
            reply = protocol.Failure(1, f"a defect of FedTune: {type(error).__name__}: {error}; see the node's log.")
        return reply

    def _answer(self, message: protocol.Message) -> protocol.Message:
        match message:
            case protocol.Hello():
                if self._from_server and message.fingerprint != self.base_fingerprint:
                    return protocol.ModelWanted(self.name, -1)
                return self._hello()
            case protocol.ModelManifest():
                return self._received(self._cache.start(self.name, self.config.model.name, message.pieces))
            case protocol.ModelPiece():
                return self._received(self._cache.take(self.name, message.piece, as_bytes(message.data)))
        if self.answer is None:
            raise ModelError(f"{self.name} has not got the base model from the server yet.")
        return self.answer(message)

    def _received(self, result: Path | protocol.ModelWanted) -> protocol.Message:
        """Go on with the next piece, or load the model that is complete."""
        if isinstance(result, protocol.ModelWanted):
            return result
        self._load(str(result))
        return self._hello()

    def _hello(self) -> protocol.HelloReply:
        return protocol.HelloReply(
            self.name, protocol.PROTOCOL_VERSION, len(self.examples), self.base_fingerprint, peak_memory()
        )


def _method(name: str) -> Callable[[NodeContext], Callable[[protocol.Message], protocol.Message]]:
    match name:
        case "fedkseed" | "fedkseed-pro":
            return SeedRounds
        case "fedcybgd":
            return BlockTurns
        case "fedavg" | "fedit" | "fedzo":
            return LocalTraining
    return load_method(name).node


def check_node_config(node_config: Mapping[str, Any]) -> dict[str, str]:
    """Check a node's configuration; Flower's own keys such as ``partition-id`` are left alone.

    Raises
    ------
    ConfigError
        ``data`` is missing, or a value is not text.
    """
    if not node_config.get("data"):
        raise ConfigError(
            "node config: 'data' is missing; start the node with --node-config 'data=\"/path/to/data.jsonl\"'."
        )
    for key in NODE_KEYS:
        if key in node_config and not isinstance(node_config[key], str):
            raise ConfigError(f"node config: '{key}' is {node_config[key]!r}, but must be text: put it in quotes.")
    return {key: node_config[key] for key in NODE_KEYS if key in node_config}


def _cache_folder(settings: Mapping[str, str]) -> Path:
    home = Path(os.environ.get("FEDTUNE_HOME", "~/.fedtune"))
    return Path(settings.get("cache") or home / "models").expanduser()


def _cache_limit(settings: Mapping[str, str]) -> int:
    try:
        return int(float(settings.get("cache-gb", "50")) * 1e9)
    except ValueError:
        raise ConfigError(
            f"node config: 'cache-gb' is {settings['cache-gb']!r}, but must be a number, such as \"20\"."
        ) from None
