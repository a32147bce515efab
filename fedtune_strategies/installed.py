"""The names of the methods that are installed, from entry points: nothing of a method is loaded."""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint, entry_points

from fedtune_strategies.errors import ConfigError

GROUP = "fedtune.methods"


@cache
def points() -> dict[str, EntryPoint]:
    """Return the entry point of each method by its name."""
    found: dict[str, EntryPoint] = {}
    for point in entry_points(group=GROUP):
        if found.setdefault(point.name, point).value != point.value:
            raise ConfigError(
                f"two installed packages bring a method '{point.name}' ({found[point.name].value}, {point.value}): "
                "uninstall one."
            )
    return found


def installed_methods() -> tuple[str, ...]:
    """Return the names of all methods, FedTune's before those of other packages."""
    own = own_methods()
    return (*own, *sorted(set(points()) - set(own)))


def own_methods() -> tuple[str, ...]:
    """Return the names of the methods that FedTune brings, sorted."""
    return tuple(sorted(name for name, point in points().items() if point.dist and point.dist.name == "fedtune"))
