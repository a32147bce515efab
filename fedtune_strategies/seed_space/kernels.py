"""Which implementation of the kernels serves a device."""

from __future__ import annotations

from functools import cache
from importlib import import_module
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
        `cpu` where numba is installed (extra ``fedtune[cpu]``), `cuda` where Triton is, otherwise `reference`.
    """
    return _fast(device.type)


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
def _fast(device_type: str) -> ModuleType:
    try:
        if device_type in ("cpu", "cuda"):  # ROCm devices are called cuda too
            return import_module(f"fedtune_strategies.seed_space.{device_type}")
    except ImportError:
        pass
    return reference
