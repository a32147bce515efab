"""How a key of the run configuration is declared, checked and shown."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from dataclasses import field
from typing import Any, TypeAlias

from fedtune_strategies.errors import ConfigError

Scalar: TypeAlias = str | int | float | bool


def option(
    default: Scalar,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
) -> Any:
    """Declare one key: its default, its help and the values that it accepts.

    Parameters
    ----------
    default : str, int, float or bool
        Default value.
    help : str
        One sentence for the command line and the documentation.
    choices : tuple of str
        The accepted values of a text key; any text where empty.
    low, high : float
        Inclusive limits of a number.
    above : float
        Exclusive lower limit of a number.

    Returns
    -------
    Any
        A dataclass field.
    """
    limits = {"help": help, "choices": choices, "low": low, "high": high, "above": above}
    return field(default=default, metadata=limits)


def options(cls: type, prefix: str = "") -> Iterator[tuple[str, type, dataclasses.Field]]:
    """Yield name, type and field of every key below a dataclass."""
    hints = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        name = prefix + spec.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[spec.name]):
            yield from options(hints[spec.name], name + ".")
        else:
            yield name, hints[spec.name], spec


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
    return cls(**given)


def checked(name: str, value: Any, kind: type[Any], spec: dataclasses.Field) -> Scalar:
    """Return the value of a key as its type.

    Raises
    ------
    ConfigError
        It has another type or is out of range.
    """
    if kind is float and type(value) is int:
        value = float(value)
    limits = spec.metadata
    if (
        type(value) is not kind
        or (limits["choices"] and value not in limits["choices"])
        or (kind in (int, float) and not (limits["low"] <= value <= limits["high"] and value > limits["above"]))
        or (kind is float and not math.isfinite(value))
    ):
        raise ConfigError(f"run config: '{name}' is {value!r}, but must be {accepted(kind, spec)}.")
    return value


def accepted(kind: type, spec: dataclasses.Field) -> str:
    """Say in words which values a key accepts."""
    limits = spec.metadata
    if limits["choices"]:
        return "one of " + ", ".join(f"'{choice}'" for choice in limits["choices"])
    words = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}[kind]
    bounds = []
    if limits["above"] > -math.inf:
        bounds.append(f"above {limits['above']:g}")
    if limits["low"] > -math.inf:
        bounds.append(f"at least {limits['low']:g}")
    if limits["high"] < math.inf:
        bounds.append(f"at most {limits['high']:g}")
    return " ".join([words, " and ".join(bounds)]).strip()


def as_toml_value(value: Scalar) -> str:
    """Render a value as TOML."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)
