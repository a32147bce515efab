"""What a node does: one function per kind of task, over one loaded model and one owner's data."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedtune_strategies.config import from_flower, parse
from fedtune_strategies.config.node import NodeConfig, parse_node
from fedtune_strategies.errors import FedTuneError, ModelError, ResourceError
from fedtune_strategies.language.data import read_rows
from fedtune_strategies.language.examples import tokenise
from fedtune_strategies.language.model import base_tensors, check_context, load_model
from fedtune_strategies.language.model_files import is_here
from fedtune_strategies.logs import about
from fedtune_strategies.memory import peak_memory, release_memory
from fedtune_strategies.method import NodeContext, register_messages
from fedtune_strategies.model_transfer import ModelCache, as_bytes
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.seed_space import fingerprint

log = logging.getLogger("fedtune")


class Node:
    """A node with its model and data in memory.

    Parameters
    ----------
    run_config : mapping of str to str, int, float or bool
        The run's configuration.
    node_config : mapping of str to str, int, float or bool
        The node's own configuration, see `NodeConfig`.
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
        self.config = parse(from_flower(run_config))
        self._method = register_messages(self.config.method.name)
        own = self._node = parse_node(node_config)
        self.name = own.name or f"node-{node_id & (2**64 - 1):016x}"
        self._rows = read_rows(own.data, own.format, own.columns, own.skip_bad)
        self._cache = ModelCache(_cache_folder(own), int(own.cache_gb * 1e9))
        self._from_server = own.model == "server"
        name: str | Path | None = own.model or self.config.model.name
        if self._from_server or not (own.model or is_here(self.config.model.name)):
            self._from_server, name = True, self._cache.find(self.config.model.name)
        if name is not None:
            self._load(str(name))

    def _load(self, model: str) -> None:
        self.language = load_model(model, self.config.model.dtype, self._node.device)
        check_context(self.language, self.config.train.seq_length)
        self.examples = tokenise(self._rows, self.language.tokenizer, self.config.train.seq_length)
        self.base = base_tensors(self.language)
        self.base_fingerprint = fingerprint(self.base)
        context = NodeContext(self.config, self.name, self.language.model, self.base, self.examples, self._node)
        self.answer = self._method.client(context)
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
            reply = protocol.Failure(error.exit_code, error.public)
        except MemoryError:
            reply = protocol.Failure(ResourceError.exit_code, "not enough memory for the task on this node.")
        except Exception as error:
            log.exception("%s: a defect of FedTune", self.name)
            # The text of a foreign error may quote the owner's.
            reply = protocol.Failure(1, f"a defect of FedTune: {type(error).__name__}; see the node's log.")
        return reply

    def _answer(self, message: protocol.Message) -> protocol.Message:
        match message:
            case protocol.Hello():
                if self._from_server and message.fingerprint != self.base_fingerprint:
                    return protocol.ModelRequest(self.name, -1)
                return self._hello()
            case protocol.ModelManifest():
                return self._received(self._cache.start(self.name, self.config.model.name, message.chunks))
            case protocol.ModelChunk():
                return self._received(self._cache.take(self.name, message.chunk, as_bytes(message.data)))
        if self.answer is None:
            raise ModelError(f"{self.name} has not got the base model from the server yet.")
        return self.answer(message)

    def _received(self, result: Path | protocol.ModelRequest) -> protocol.Message:
        """Ask for the next chunk, or load the model that is complete."""
        if isinstance(result, protocol.ModelRequest):
            return result
        self._load(str(result))
        return self._hello()

    def _hello(self) -> protocol.HelloReply:
        return protocol.HelloReply(
            self.name, protocol.PROTOCOL_VERSION, len(self.examples), self.base_fingerprint, peak_memory()
        )


def _cache_folder(own: NodeConfig) -> Path:
    home = Path(os.environ.get("FEDTUNE_HOME", "~/.fedtune"))
    return Path(own.cache or home / "models").expanduser()
