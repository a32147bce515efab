"""Which implementation of the kernels serves a device."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from fedtune_strategies.seed_space import reference


def kernels(device: torch.device) -> ModuleType:
    """Choose the fastest implementation that is installed for a device; all give the same bits.

    Parameters
    ----------
    device : torch.device
        Where the tensors are.

    Returns
    -------
    module
        `cpu` with numba installed (extra ``fedtune[cpu]``), otherwise `reference`.
    """
    return _fast_cpu() if device.type == "cpu" else reference


def thread_count(device: torch.device) -> int:
    """Count the threads over which the caller splits a tensor; the reference is split by torch itself.

    Parameters
    ----------
    device : torch.device
        Where the tensors are.

    Returns
    -------
    int
        At least 1.
    """
    return 1 if kernels(device) is reference or device.type != "cpu" else torch.get_num_threads()


@cache
def _fast_cpu() -> ModuleType:
    try:
        from fedtune_strategies.seed_space import cpu
    except ImportError:
        return reference
    return cpu
