"""Which implementation of the kernels serves a device."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TypeVar

import torch

from fedtune_strategies.seed_space import reference

T = TypeVar("T")


def kernels(device: torch.device) -> ModuleType:
    """Choose the fastest kernels for a device, by numba, Triton or torch alone; all give the same bits."""
    return _fast(device.type)


def thread_count(device: torch.device) -> int:
    """Count the threads over which the caller splits a tensor; the reference is split by torch itself."""
    return 1 if kernels(device) is reference or device.type != "cpu" else torch.get_num_threads()


def spread(function: Callable[[T], object], items: Sequence[T], device: torch.device) -> None:
    """Call a function for every item, on as many threads as the device's kernels may use; begin in the items' order."""
    threads = min(thread_count(device), len(items))
    if threads <= 1:
        for item in items:
            function(item)
    else:
        list(_executor(threads, os.getpid()).map(function, items))


@cache
def _executor(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads that stay: starting them takes longer than a small tensor. A forked process has none of its parent's."""
    return ThreadPoolExecutor(threads)


@cache
def _fast(device_type: str) -> ModuleType:
    try:
        if device_type in ("cpu", "cuda"):  # ROCm devices are called cuda too
            return import_module(f"fedtune_strategies.seed_space.{device_type}")
    except ImportError:
        pass
    return reference
