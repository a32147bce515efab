"""A run's configuration by its method's name: its keys, their defaults, and the check of a flat mapping against them.

The way is one: options make sections, sections a method's `Config`, a `Method` names its own, and this reads it.
"""

from __future__ import annotations

import difflib
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedtune_strategies.config import Config, Scalar
from fedtune_strategies.config.options import accepted, as_toml_value, options, section
from fedtune_strategies.config.sections import MethodConfig
from fedtune_strategies.errors import ConfigError
from fedtune_strategies.installed import own_methods
from fedtune_strategies.method import load_method

# In an app for all methods, the value of a key whose default depends on the method.
BY_METHOD = "default"


@dataclass(frozen=True)
class Key:
    """One key of the run config."""

    name: str  # kebab-case name with its group, such as ``train.seq-length``
    type: type  # str, int, float or bool
    default: Scalar  # default value
    help: str  # one sentence
    accepted: str  # the accepted values in words
    path: bool = False  # whether the value is a path on the server


def keys(method: str = "", given: Mapping[str, Any] | None = None) -> list[Key]:
    """List the keys that a method reads beside given ones, in their order; by default the default method's."""
    name = method or MethodConfig().name
    cls = load_method(name).config.choose(given or {})
    return [_key(name, key, kind, spec.default, spec) for key, kind, spec in options(cls)]


def defaults(method: str = "", given: Mapping[str, Any] | None = None) -> dict[str, Scalar]:
    """Return every key that a method reads with its default: the flat run config of an unconfigured run."""
    return {key.name: key.default for key in keys(method, given)}


def _key(method: str, name: str, kind: type, default: Any, spec: Any) -> Key:
    return Key(
        name=name,
        type=kind,
        default=method if name == "method.name" else default,
        help=spec.metadata["help"],
        accepted=accepted(kind, spec),
        path=spec.metadata["path"],
    )


def parse(flat: Mapping[str, Any]) -> Config:
    """Check a flat run config, in which absent keys take their defaults, and build its method's `Config` from it."""
    chosen = section(MethodConfig, "method.", {key: v for key, v in flat.items() if key == "method.name"})
    cls = load_method(chosen.name).config.choose(flat)
    known = {name for name, _, _ in options(cls)}
    for name in flat:
        if name not in known and (readers := _readers(name)):
            raise ConfigError(_not_read(name, chosen.name, readers, known))
    config = section(cls, "", flat)
    config.check()
    return config


def from_flower(run_config: Mapping[str, Any]) -> dict[str, Any]:
    """Take a run's keys out of the configuration that Flower hands over.

    Flower fills in what the submitted app's project file says. The file in this project serves every method of
    FedTune, so keys of other methods come along at their defaults, and some keys say that their default depends on the
    method. Both count as not given.
    """
    name = str(run_config.get("method.name", MethodConfig().name))
    known, written = {key.name for key in keys(name, run_config)}, app_defaults()
    return {
        key: value
        for key, value in run_config.items()
        if value != BY_METHOD and (key in known or key not in written or value != written[key])
    }


def app_defaults() -> dict[str, Scalar]:
    """Return the run config of an app for all of FedTune's methods: every key of any of them."""
    found: dict[str, Scalar] = {}
    for _, cls in _classes():
        for name, _, spec in options(cls):
            default = typing.cast(Scalar, spec.default)
            found[name] = default if found.setdefault(name, default) == default else BY_METHOD
    return found | {"method.name": MethodConfig().name}


def as_toml(values: Mapping[str, Scalar]) -> str:
    """Render a ``[tool.flwr.app.config]`` table, without its heading."""
    return "".join(f"{name} = {as_toml_value(value)}\n" for name, value in values.items())


def _classes() -> list[tuple[str, type[Config]]]:
    """Every configuration that a method of FedTune reads."""
    methods = [(name, load_method(name).config) for name in own_methods()]
    return [(name, cls) for name, first in methods for cls in (first, *first.variants)]


def _readers(name: str) -> list[str]:
    return list(dict.fromkeys(method for method, cls in _classes() if name in {key for key, _, _ in options(cls)}))


def _not_read(name: str, method: str, readers: list[str], known: set[str]) -> str:
    close = typing.cast(list[str], difflib.get_close_matches(name, known, n=1))
    nearest = f"; the nearest key that it reads is '{close[0]}'" if close else ""
    owner = "another choice of its keys" if readers == [method] else ", ".join(readers)
    return f"run config: '{method}' does not read '{name}' here, which belongs to {owner}{nearest}."
