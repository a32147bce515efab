"""What a node does: one function per kind of task, over one loaded model and one owner's data."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from client_app.history import LEFT, MODEL, History
from client_app.terms import beyond, beyond_bytes, beyond_model, beyond_round, run_name
from fedtune_strategies.blocks.uploads import Residuals
from fedtune_strategies.config.node import FIRST, PUBLIC, Terms, parse_node
from fedtune_strategies.errors import FedTuneError, ModelError, ResourceError, TermsError
from fedtune_strategies.folders import is_ours, remove_folder
from fedtune_strategies.language.base import base_tensors, stored_fingerprint
from fedtune_strategies.language.data import read_rows
from fedtune_strategies.language.examples import tokenise
from fedtune_strategies.language.model import (
    LanguageModel,
    check_context,
    check_model,
    load_model,
    model_settings,
)
from fedtune_strategies.language.model_files import is_here
from fedtune_strategies.logs import about
from fedtune_strategies.memory import private_peak, release_memory
from fedtune_strategies.method import NodeContext, register_messages
from fedtune_strategies.model_transfer import ModelCache, as_bytes
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.door import clean
from fedtune_strategies.run_config import from_flower, parse
from fedtune_strategies.seed_space import fingerprint

log = logging.getLogger("fedtune")

# Answers that tell nothing of what was learnt from the data, of every method.
_OTHER_RUNS = 1  # of which a node keeps what coding held back, beside the present one
_SHARED = (protocol.HelloReply, protocol.ModelRequest, protocol.Ack, protocol.StateMissing, protocol.Failure)


class Node:
    """A node with its data in memory, and from its first task on its model.

    Parameters
    ----------
    run_config : mapping of str to str, int, float or bool
        The run's configuration.
    node_config : mapping of str to str, int, float or bool
        The node's own configuration, see `NodeConfig`.
    node_id : int
        Flower's id of the node; names it where its configuration does not.
    on_step : callable
        Called with (steps begun, steps of the round) while the node works.

    Raises
    ------
    TermsError
        The run is wider than the owner agreed to; neither data nor model were touched.
    FedTuneError
        A configuration, the data or the model is not usable.
    """

    base_fingerprint = ""

    def __init__(
        self,
        run_config: Mapping[str, Any],
        node_config: Mapping[str, Any],
        node_id: int,
        on_step: Callable[[int, int], object] = lambda begun, steps: None,
    ) -> None:
        self._asked = from_flower(run_config)
        self.config = parse(self._asked)
        own = parse_node(node_config)
        self.name = own.name or _unnamed(node_id)
        self.history = History(Path(own.folder).expanduser() if own.folder else None)
        self._terms, self._on_step = own.terms, on_step
        self._check_terms()
        key = own.draw_key or self.history.key()
        self._node = own = replace(own, draw_key="" if key == PUBLIC else key)
        self._method = register_messages(self.config.method.name)
        self._rows = read_rows(own.data, own.format, own.columns, own.skip_bad)
        self._cache = ModelCache(own.cache_folder, int(own.cache_gb * 1e9))
        self._from_server = own.model == "server"
        name: str | Path | None = own.model or self.config.model.name
        if self._from_server or not (own.model or is_here(self.config.model.name)):
            self._from_server, name = True, self._cache.find(self.config.model.name)
        self._model = ""
        if name is not None:
            self._take_up(str(name))

    def _take_up(self, model: str) -> None:
        """Find out all that a greeting says; the weights are loaded with the first task, which may never come."""
        for loaded in ("language", "base", "answer"):
            self.__dict__.pop(loaded, None)
        self._model = model
        folder, tokenizer = check_model(model)
        train, dtype = self.config.train, self.config.model.dtype
        exact = self.config.model.base == "exact"
        check_context(model, model_settings(model, folder), train.seq_length)
        self.base_fingerprint = (stored_fingerprint(folder, dtype) if exact else "") or fingerprint(self.base)
        self._check_model(self.base_fingerprint)
        self.examples = tokenise(self._rows, tokenizer, train.seq_length)
        terms = self.history.agreement(self._terms).terms
        bound = "its owner has set no terms: any run is answered" if terms == Terms() else f"terms: {terms}"
        log.info("%s: %d examples, model %s; %s", self.name, len(self.examples), folder, bound)

    @cached_property
    def language(self) -> LanguageModel:
        """The model, loaded when it is first asked for."""
        if not self._model:
            raise ModelError(f"{self.name} has not got the base model from the server yet.")
        settings, empty = self.config.model, self._method.by_layers and self._node.frozen != "decoded"
        return load_model(self._model, settings.dtype, self._node.device, settings.base, empty=empty)

    @cached_property
    def base(self) -> Mapping[str, Tensor]:
        """W_0."""
        return base_tensors(self.language)

    @cached_property
    def answer(self) -> Callable[[protocol.Message], protocol.Message]:
        """What the method does with a task."""
        base = self.base  # before anything is tuned
        return self._method.client(
            NodeContext(
                self.config, self.name, self.language.model, base, self.examples, self._node, self._on_step,
                self._residuals(),
            )
        )  # fmt: skip

    def _residuals(self) -> MutableMapping[int, Mapping[str, Tensor]]:
        """Return what coding held back in this run; that of the runs before last is removed."""
        if not self._node.folder:
            return {}
        config = self.config
        run = [self.name, config.run.dir, config.method.name, config.train.seed, self.base_fingerprint]
        folder = Path(self._node.folder).expanduser() / "residuals"
        own = folder / hashlib.sha256(json.dumps(run).encode()).hexdigest()[:16]
        others = [other for other in folder.iterdir() if is_ours(other) and other != own] if folder.is_dir() else []
        for other in sorted(others, key=lambda one: one.stat().st_mtime)[:-_OTHER_RUNS]:
            remove_folder(other)
        return Residuals(own)

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
            answer = self._let_out(reply, int(facts.get("round", 0)))
        release_memory()
        return answer

    def _reply(self, kind: str, payload: bytes, facts: dict[str, str | int]) -> protocol.Message:
        try:
            message = protocol.decode(kind, payload)
            facts["round"] = getattr(message, "round", 0)
            self._check_terms(int(facts["round"]))
            reply = self._answer(message)
        except FedTuneError as error:
            log.error("%s: %s", self.name, error)
            reply = _failure(error)
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
                # A server that is still loading its own model does not name it.
                if self._model and message.fingerprint not in ("", self.base_fingerprint):
                    self.base_fingerprint = fingerprint(self.base)  # as loaded, in case the files tell it otherwise
                if self._from_server and message.fingerprint not in ("", self.base_fingerprint):
                    self._check_model(message.fingerprint)
                    return protocol.ModelRequest(self.name, -1)
                return self._hello()
            case protocol.ModelManifest():
                return self._received(self._cache.start(self.name, self.config.model.name, message.chunks))
            case protocol.ModelChunk() if not self._cache.has_started:
                return protocol.ModelRequest(self.name, -1)  # a worker that ended had asked for it
            case protocol.ModelChunk():
                return self._received(self._cache.take(self.name, message.chunk, as_bytes(message.data)))
        return self.answer(message)

    def _received(self, result: Path | protocol.ModelRequest) -> protocol.Message:
        """Ask for the next chunk, or take up the model that is complete."""
        if isinstance(result, protocol.ModelRequest):
            return result
        self._take_up(str(result))
        return self._hello()

    def _let_out(self, reply: protocol.Message, round: int) -> tuple[str, bytes]:
        """Encode a reply and write down that it leaves; what is too large or cannot be written down does not."""
        encoded = protocol.encode(reply)
        result = not isinstance(reply, _SHARED)
        if result and (reasons := beyond_bytes(self.history.agreement(self._terms), len(encoded))):
            with contextlib.suppress(OSError):
                self.history.refuse(self._asked, run_name(self.config), reasons)
            return self._let_out(_failure(TermsError(_beyond(reasons))), round)
        try:
            self.history.append(
                LEFT, run=run_name(self.config), round=round, method=self.config.method.name, kind=reply.kind,
                bytes=len(encoded), result=result,
            )  # fmt: skip
        except OSError as error:
            log.error("%s: nothing was sent, as it cannot be written down: %s", self.name, error)
            reply = _failure(ResourceError("this node cannot write down what leaves it: its disk may be full."))
            encoded = protocol.encode(reply)
        return reply.kind, encoded

    def _check_terms(self, round: int = 0) -> None:
        """Refuse a run, or a task of it, that is wider than the owner agreed to."""
        agreement, spent = self.history.agreement(self._terms), self.history.spent()
        reasons = beyond(agreement, self.config, spent)
        if reasons or (reasons := beyond_round(agreement, self.config, spent, round) if round else []):
            self._refuse(reasons)

    def _check_model(self, found: str) -> None:
        """Refuse another base model than agreed; where the first one was agreed to, it is this."""
        agreed = self.history.agreement(self._terms).terms.model
        if reasons := beyond_model(self.history.model(agreed), found):
            self._refuse(reasons)
        if agreed == FIRST and not self.history.model(agreed):
            self.history.append(MODEL, fingerprint=found)

    def _refuse(self, reasons: list[str]) -> None:
        self.history.refuse(self._asked, run_name(self.config), reasons)
        raise TermsError(_beyond(reasons))

    def _hello(self) -> protocol.HelloReply:
        count = len(self.examples if self._model else self._rows)
        return protocol.HelloReply(self.name, protocol.PROTOCOL_VERSION, count, self.base_fingerprint, private_peak())


def _beyond(reasons: Sequence[str]) -> str:
    return f"its owner must agree first: {'; '.join(reasons)}."


def _failure(error: FedTuneError) -> protocol.Failure:
    return protocol.Failure(error.exit_code, error.public)


def with_folder(node_config: Mapping[str, Any], node_id: int) -> dict[str, Any]:
    """Give a node that is told of no folder one below ``$FEDTUNE_HOME``, by its name."""
    own = parse_node(node_config)
    folder = own.folder or str(_home() / "nodes" / (own.name or _unnamed(node_id)))
    return {**node_config, "folder": folder}


def note_failure(run_config: Mapping[str, Any], node_config: Mapping[str, Any], node_id: int, size: int) -> None:
    """Write down that a node which could not be made said why; the same again is not written twice."""
    with contextlib.suppress(FedTuneError, OSError):
        history = History(Path(with_folder(node_config, node_id)["folder"]).expanduser())
        method = clean(str(run_config.get("method.name", "")), 80)
        facts = {"run": "", "round": 0, "method": method, "kind": "failure", "bytes": size, "result": False}
        last = [row for row in history.rows() if row["event"] == LEFT][-1:]
        if not last or facts.items() - last[0].items():
            history.append(LEFT, **facts)


def _unnamed(node_id: int) -> str:
    return f"node-{node_id & (2**64 - 1):016x}"


def _home() -> Path:
    return Path(os.environ.get("FEDTUNE_HOME", "~/.fedtune")).expanduser()
