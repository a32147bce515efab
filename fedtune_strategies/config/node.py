"""The node's own configuration: what its owner decides, and no run can."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedtune_strategies.config.options import Scalar, option, options, section, values
from fedtune_strategies.errors import ConfigError, ProtocolError
from fedtune_strategies.protocol.door import check_name

ANY, NONE, ALL, FIRST, PUBLIC = "any", "none", "all", "first", "public"


@dataclass(frozen=True)
class Terms:
    """On what terms the node takes part; each default agrees to anything. See `client_app.terms`."""

    methods: str = option(
        ANY, "Methods that may run here, separated by commas; 'any', or 'none' until the owner has agreed to a run."
    )
    rounds: int = option(0, "Most rounds in which something of the data leaves, of all runs; 0 for any number.", low=0)
    steps: int = option(0, "Most local steps of a round; 0 for any number.", low=0)
    batch: int = option(1, "Fewest examples in a local step.", low=1)
    bytes: int = option(0, "Most bytes of one reply; 0 for any number.", low=0)
    parameters: str = option(
        ANY, "What may be tuned: 'any', 'all' for all parameters at once, or 'train.parameters' as it must be."
    )
    noise: float = option(0.0, "Least 'privacy.noise-multiplier'; 0 for a run without noise too.", low=0.0)
    model: str = option("", "Fingerprint of the base model; 'first' for that of the first run, empty for any.")


@dataclass(frozen=True)
class NodeConfig:
    """Keys of a SuperNode's ``--node-config``; those from ``device`` on say how a result is computed."""

    name: str = option("", "The node's name, unique in the federation; empty for one made of Flower's node id.")
    data: str = option("", "File or folder with the owner's data; required.")
    format: str = option("auto", "Format of the data; 'auto' looks at the columns.")
    columns: str = option(
        "", "Which column of the data is which, 'prompt=question,completion=answer'; empty where the names fit."
    )
    skip_bad: bool = option(False, "Leave out rows that cannot be used, instead of refusing the data.")
    model: str = option(
        "", "Folder of the base model on this machine instead of the run's; 'server' to get it from there."
    )
    cache: str = option("", "Folder for models that come from servers; empty for ~/.fedtune/models.")
    cache_gb: float = option(50.0, "Most gigabytes in it.", above=0.0)
    folder: str = option(
        "", "Folder for what the node remembers, its history above all; empty for ~/.fedtune/nodes/<name>."
    )
    terms: Terms = field(default_factory=Terms)
    draw_key: str = option(
        "",
        "Decides the order of batches and the directions that are tried; empty for a key that is made once in that "
        "folder, 'public' for choices that everybody can compute.",
    )
    device: str = option("cpu", "Where the model runs: cpu, cuda, cuda:1.")
    micro_batch: int = option(0, "Examples computed at once, for less memory; 0 for the whole batch.", low=0)
    checkpoint: str = option(
        "auto",
        "Compute activations again in the backward pass instead of keeping them; 'auto': by the seed-space gradient.",
        choices=("auto", "always", "never"),
    )
    frozen: str = option(
        "decoded",
        "Weights that are not trained: in memory as they are, coded in memory, or on disk. By FedKSeed all: unless "
        "'decoded', those of a layer are made when it runs.",
        choices=("decoded", "coded", "disk"),
    )
    prefix_cache_mb: float = option(
        0.0, "Most MB for hidden states of the frozen layers below a block, where batches come again.", low=0.0
    )

    @property
    def cache_folder(self) -> Path:
        """Folder for models that come from servers, and for temporary files, which are as large."""
        home = Path(os.environ.get("FEDTUNE_HOME", "~/.fedtune"))
        return Path(self.cache or home / "models").expanduser()


def parse_node(given: Mapping[str, Any]) -> NodeConfig:
    """Check a node's configuration; keys of Flower's own such as ``partition-id`` are left alone."""
    known = {name: kind for name, kind, _ in options(NodeConfig)}
    own = {name: _typed(given[name], kind) for name, kind in known.items() if name in given}
    config = section(NodeConfig, "", own, where="node config")
    if not config.data:
        raise ConfigError(
            "node config: 'data' is missing; start the node with --node-config 'data=\"/path/to/data.jsonl\"'."
        )
    try:
        check_name(config.name or "unnamed")
    except ProtocolError as error:
        raise ConfigError(f"node config: 'name': {error}") from None
    return config


def node_settings(config: NodeConfig) -> dict[str, Scalar]:
    """Return the keys that differ from their default, as `parse_node` takes them."""
    usual = values(NodeConfig())
    return {name: value for name, value in values(config).items() if value != usual[name]}


def _typed(value: Any, kind: type) -> Any:
    """Read a number or a boolean that came as text, as it does from a service file or a container's environment."""
    if kind is str or not isinstance(value, str):
        return value
    if kind is bool:
        return {"true": True, "false": False}.get(value.lower(), value)
    try:
        return kind(value)
    except ValueError:
        return value
