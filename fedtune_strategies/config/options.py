"""How a key of the run configuration is declared, checked and shown."""

from __future__ import annotations

import dataclasses
import difflib
import math
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field
from typing import Any, TypeAlias, TypeVar

from fedtune_strategies.errors import ConfigError

Scalar: TypeAlias = str | int | float | bool
T = TypeVar("T")


def option(
    default: Scalar,
    help: str,
    *,
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    auto: bool = False,
    path: bool = False,
) -> Any:
    """Declare one key: its default, its help and the values that it accepts.

    Parameters
    ----------
    default : str, int, float or bool
        Default value.
    help : str
        One sentence for the command line and the documentation.
    choices : tuple of str, or a callable that returns one
        The accepted values of a text key; any text where empty.
    low, high : float
        Inclusive limits of a number.
    above : float
        Exclusive lower limit of a number.
    auto : bool
        Whether a number can be the text "auto" instead, as its default too: its field is then 0.
    path : bool
        Whether a text is a path on the server: ``fedtune run`` makes it absolute, as the ServerApp starts elsewhere.

    Returns
    -------
    Any
        A dataclass field.
    """
    known = choices if callable(choices) else lambda: choices
    limits = {"help": help, "choices": known, "low": low, "high": high, "above": above, "auto": auto, "path": path}
    return field(default=default, metadata=limits)


def options(cls: type, prefix: str = "") -> Iterator[tuple[str, type, dataclasses.Field]]:
    """Yield name, type and field of every `option` below a dataclass."""
    hints = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        name = prefix + spec.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[spec.name]):
            yield from options(hints[spec.name], name + ".")
        elif spec.metadata:
            yield name, hints[spec.name], spec


def values(config: Any, prefix: str = "") -> dict[str, Scalar]:
    """Return every key of a configuration with its value; a number that is left open is 0."""
    found: dict[str, Scalar] = {}
    for spec in dataclasses.fields(config):
        name, value = prefix + spec.name.replace("_", "-"), getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            found |= values(value, name + ".")
        elif spec.metadata:
            found[name] = value
    return found


def build(cls: type, prefix: str, values: Mapping[str, Scalar]) -> Any:
    """Build a dataclass of dataclasses from checked values by key."""
    hints = typing.get_type_hints(cls)
    given = {}
    for spec in dataclasses.fields(cls):
        name = prefix + spec.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[spec.name]):
            given[spec.name] = build(hints[spec.name], name + ".", values)
        elif name in values:
            given[spec.name] = values[name]
        elif spec.metadata and spec.default == "auto" and spec.metadata["auto"]:
            given[spec.name] = hints[spec.name]()
    return cls(**given)


def section(cls: type[T], prefix: str, values: Mapping[str, Any], *, where: str = "run config") -> T:
    """Build a dataclass of `option` fields from the keys below a prefix.

    Parameters
    ----------
    cls : type
        A dataclass; every field is an `option`.
    prefix : str
        What every key begins with, such as ``"train."``; empty for a whole configuration.
    values : mapping of str to str, int, float or bool
        Keys with their prefix; absent ones take their defaults. An int is accepted where a float is asked for.
    where : str
        What an error line names as the place.

    Returns
    -------
    object
        An instance of `cls`.

    Raises
    ------
    ConfigError
        A key is unknown, has the wrong type, or its value is out of range: the line names the key and the
        accepted values.
    """
    known = {name: (kind, spec) for name, kind, spec in options(cls, prefix)}
    for name in values:
        if name not in known:
            raise ConfigError(f"{where}: {_unknown(name, known)}")
    return build(cls, prefix, {name: checked(name, value, *known[name], where) for name, value in values.items()})


def checked(name: str, value: Any, kind: type[Any], spec: dataclasses.Field, where: str) -> Scalar:
    """Return the value of a key as its type."""
    limits = spec.metadata
    if limits["auto"] and value == "auto":
        return kind()
    if kind is float and type(value) is int:
        value = float(value)
    choices = limits["choices"]()
    if (
        type(value) is not kind
        or (choices and value not in choices)
        or (kind in (int, float) and not (limits["low"] <= value <= limits["high"] and value > limits["above"]))
        or (kind is float and not math.isfinite(value))
    ):
        raise ConfigError(f"{where}: '{name}' is {value!r}, but must be {accepted(kind, spec)}.")
    return value


def accepted(kind: type, spec: dataclasses.Field) -> str:
    """Say in words which values a key accepts."""
    limits = spec.metadata
    if choices := limits["choices"]():
        return "one of " + ", ".join(f"'{choice}'" for choice in choices)
    words = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}[kind]
    bounds = []
    if limits["above"] > -math.inf:
        bounds.append(f"above {limits['above']:g}")
    if limits["low"] > -math.inf:
        bounds.append(f"at least {limits['low']:g}")
    if limits["high"] < math.inf:
        bounds.append(f"at most {limits['high']:g}")
    return " ".join([words, " and ".join(bounds)]).strip() + (", or 'auto'" if limits["auto"] else "")


def as_toml_value(value: Scalar) -> str:
    """Render a value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _unknown(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else "see `fedtune config` for all keys."
    return f"unknown key {name!r}; {hint}"
