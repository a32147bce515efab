"""What a node does: one function per kind of task, over one loaded model and one owner's data."""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from client_app.block_turns import BlockTurns
from client_app.seed_rounds import SeedRounds
from fedtune_strategies.config import parse
from fedtune_strategies.errors import ConfigError, FedTuneError, ProtocolError, ResourceError
from fedtune_strategies.language.data import FORMATS, read_rows
from fedtune_strategies.language.examples import tokenise
from fedtune_strategies.language.model import base_tensors, check_context, load_model
from fedtune_strategies.protocol import messages as protocol
from fedtune_strategies.protocol.packing import round_scalars
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
        self.rounds = SeedRounds(self.config, self.language.model, self.base)
        self.turns = BlockTurns(self.config, self.language.model, self.base)
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
        match message:
            case protocol.Hello():
                return protocol.HelloReply(
                    self.name, protocol.PROTOCOL_VERSION, len(self.examples), self.base_fingerprint, peak_memory()
                )
            case protocol.SeedTask():
                return self._seed_round(message)
            case protocol.BlockTask():
                return self._block_turn(message)
        raise ProtocolError(f"a node cannot answer a '{message.kind}'.")

    def _seed_round(self, task: protocol.SeedTask) -> protocol.Message:
        start = time.monotonic()
        if not self.rounds.take(task):
            return protocol.Lacking(self.name, task.round)
        steps, starting_print = self.rounds.train(task, self.name, self.examples)
        scalars, unit = round_scalars(steps.g, self.config.fedkseed.scalar_bits)
        finite = steps.loss[np.isfinite(steps.loss)]
        return protocol.SeedReply(
            node=self.name,
            round=task.round,
            scalars=scalars,
            unit=unit,
            loss=float(finite.mean()) if finite.size and not self.config.privacy.clip else float("nan"),
            fingerprint=starting_print,
            num_examples=len(self.examples),
            seconds=time.monotonic() - start,
            peak_memory=peak_memory(),
        )

    def _block_turn(self, task: protocol.BlockTask) -> protocol.Message:
        start = time.monotonic()
        if not self.turns.take(task):
            return protocol.Lacking(self.name, task.round)
        if task.block < 0:
            return protocol.Kept(self.name, task.round)
        update, starting_print = self.turns.train(task, self.examples, (self.config.train.seed, task.round, self.name))
        return protocol.BlockReply(
            node=self.name,
            round=task.round,
            block=task.block,
            base_version=int(task.versions[task.block]),
            delta=update.delta,
            loss=sum(update.losses) / len(update.losses) if update.losses else float("nan"),
            steps=update.steps,
            skipped=update.skipped,
            fingerprint=starting_print,
            num_examples=len(self.examples),
            seconds=time.monotonic() - start,
            peak_memory=peak_memory(),
        )


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


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
