"""What a node does: one function per kind of task, over one loaded model and one owner's data."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from client_app.block_turns import BlockTurns
from client_app.local_training import LocalTraining
from client_app.seed_rounds import SeedRounds
from fedtune_strategies.config import parse
from fedtune_strategies.errors import ConfigError, FedTuneError, ResourceError
from fedtune_strategies.language.data import FORMATS, read_rows
from fedtune_strategies.language.examples import tokenise
from fedtune_strategies.language.model import base_tensors, check_context, load_model
from fedtune_strategies.memory import peak_memory
from fedtune_strategies.method import NodeContext, load_method
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.seed_space import fingerprint

log = logging.getLogger("fedtune")

NODE_KEYS = {
    "name": "the node's name, unique in the federation (default: from Flower's node id)",
    "data": "file or folder with the owner's data (required)",
    "format": "format of the data: auto, " + ", ".join(FORMATS),
    "model": "folder of the base model on this machine, instead of 'model.name'",
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

    def __init__(self, run_config: Mapping[str, Any], node_config: Mapping[str, Any], node_id: int) -> None:
        self.config = parse(run_config)
        settings = check_node_config(node_config)
        self.name = settings.get("name") or f"node-{node_id & (2**64 - 1):016x}"
        rows = read_rows(Path(settings["data"]).expanduser(), settings.get("format", "auto"))
        model_name = settings.get("model") or self.config.model.name
        self.language = load_model(model_name, self.config.model.dtype, settings.get("device", "cpu"))
        check_context(self.language, self.config.train.seq_length)
        self.examples = tokenise(rows, self.language.tokenizer, self.config.train.seq_length)
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
        try:
            reply = self._answer(protocol.decode(kind, payload))
        except FedTuneError as error:
            log.error("%s: %s", self.name, error)
            reply = protocol.Failure(error.exit_code, str(error))
        except MemoryError:
            reply = protocol.Failure(ResourceError.exit_code, "not enough memory for the task on this node.")
        except Exception as error:
            log.exception("%s: a defect of FedTune", self.name)
            reply = protocol.Failure(1, f"a defect of FedTune: {type(error).__name__}: {error}; see the node's log.")
        return reply.kind, protocol.encode(reply)

    def _answer(self, message: protocol.Message) -> protocol.Message:
        if isinstance(message, protocol.Hello):
            return protocol.HelloReply(
                self.name, protocol.PROTOCOL_VERSION, len(self.examples), self.base_fingerprint, peak_memory()
            )
        return self.answer(message)


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
