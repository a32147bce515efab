"""What is checked before a run is submitted. Each function returns what it found, or raises what is wrong."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from deploy.common.flower_cli import Control
from deploy.common.units import size
from deploy.operator.announcement import EXAMPLES
from deploy.operator.members import Members
from deploy.plan import plan
from fedtune_strategies.config import Config, Scalar
from fedtune_strategies.cost import Cost
from fedtune_strategies.errors import LedgerError, NodesError, ResourceError
from fedtune_strategies.language.data import read_rows
from fedtune_strategies.language.model import check_model
from fedtune_strategies.language.model_files import count_parameters, model_folder, weight_files, weights_dtype
from fedtune_strategies.method import load_method
from fedtune_strategies.run_config import parse
from fedtune_strategies.words import counted

FEW_CORES = 1e11  # floating-point operations in a second


def with_config(settings: Mapping[str, Scalar]) -> str:
    """Check the run configuration."""
    config = parse(settings)
    own = len(settings.keys() - {"run.dir", "method.name", "model.name", "num-server-rounds", "round.first-nodes"})
    return f"{config.method.name}, {counted(config.num_server_rounds, 'round')}, {counted(own, 'other key')} set"


def run_model(settings: Mapping[str, Scalar]) -> str:
    """Check that the base model is here, whole, and can be tuned."""
    name = parse(settings).model.name
    folder, _ = check_model(name)
    return f"{name}: {count_parameters(weight_files(folder)) / 1e6:.1f} million parameters, {folder}"


def run_folder(settings: Mapping[str, Scalar]) -> str | None:
    """Check that the run's folder fits ``run.resume``: the ServerApp would end at once."""
    config = parse(settings).run
    folder = Path(config.dir).expanduser()
    there = (folder / "ledger.sqlite").exists()
    if there and config.resume == "never":
        raise LedgerError(f"{folder} holds a run already: choose another --out, or set 'run.resume' to 'auto'.")
    if not there and config.resume == "always":
        raise LedgerError(f"{folder} holds no run to resume: check --out, or set 'run.resume' to 'auto'.")
    return f"{folder}: {'continues its run' if there else 'a new run'}"


def held_out_data(settings: Mapping[str, Scalar]) -> str | None:
    """Check that the held-out file reads to its end."""
    config = parse(settings).eval
    if not config.data:
        return None
    return f"{config.data}: {counted(len(read_rows(Path(config.data), config.format)), 'example')}"


def room(settings: Mapping[str, Scalar]) -> str:
    """Check that the run's folder has room for its record and for the exported model."""
    config = parse(settings)
    base = model_folder(config.model.name)
    needed = weights_dtype(base, config.model.dtype).itemsize * count_parameters(weight_files(base))  # the export
    saved = 0
    if cost := _cost(config):
        needed += cost.record_bytes(config.num_server_rounds, config.run.prune)
        saved = 0 if config.run.prune else config.num_server_rounds * cost.replies
    folder = Path(config.run.dir).expanduser()
    there = next(parent for parent in [folder, *folder.parents] if parent.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        remedy = f", or save {size(saved)} with --set run.prune=true" if saved >= needed - free else ""
        raise ResourceError(
            f"{there} has {size(free)} free, the run needs about {size(needed)}: choose another --out{remedy}"
        )
    return f"{size(free)} free in {there}, about {size(needed)} needed"


def in_time(settings: Mapping[str, Scalar]) -> str | None:
    """Say how fast a node must be to answer before the round's deadline."""
    config = parse(settings)
    if not (cost := _cost(config)):
        return None
    rate = cost.flop / config.round.deadline
    told = f"a task is at most {cost.flop / 1e12:,.1f} TFLOP: a node needs {rate / 1e9:,.1f} GFLOP/s to be in time"
    if rate <= FEW_CORES:
        return told
    return f"{told}, a few cores do about 100: lower train.local-steps or train.batch-size, or raise round.deadline"


def _cost(config: Config) -> Cost | None:
    """Plan a run; None where its method does not say what it costs."""
    if load_method(config.method.name).cost is None:
        return None
    nodes = max(config.strategy.min_nodes, config.round.first_nodes)
    return plan(config, model_folder(config.model.name), nodes, EXAMPLES)


def who_is_there(control: Control, settings: Mapping[str, Scalar]) -> str:
    """Count the members that are online."""
    members = [member for member in Members(control.folder).all().values() if member.state == "member"]
    states = control.node_states()
    if not states:
        raise NodesError("nobody has joined yet: `fedtune nodes invite NAME`, and give the token to the owner")
    online = [node for node, state in states.items() if state == "online"]
    names = [member.name for member in members if member.node_id in online]
    needed = int(settings.get("strategy.min-nodes", 1))
    wait = "" if len(online) >= needed else f"; the run waits for {needed}"
    return f"{len(online)} of {len(states)} online: {', '.join(names)}{wait}"
