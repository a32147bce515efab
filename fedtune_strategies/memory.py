"""Memory of this process."""

from __future__ import annotations

import ctypes
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

LARGE = 2**17  # the hidden states of a few hundred tokens are larger
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    if sys.platform == "linux":
        # What getrusage says begins with the peak of the process that started this one.
        (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return 1024 * int(peak)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def private_peak() -> int:
    """Return the peak memory of this process in bytes without what it has mapped from files, which others share.

    The system keeps no such peak: it is the resident peak less the mapped pages that are resident now, and at least
    what is private now.
    """
    if sys.platform != "linux":
        return peak_memory()
    status = Path("/proc/self/status").read_text()
    kilobytes = dict(re.findall(r"(VmHWM|RssAnon|RssFile):\s+(\d+) kB", status))
    peak, private, mapped = (int(kilobytes[name]) for name in ("VmHWM", "RssAnon", "RssFile"))
    return 1024 * max(private, peak - mapped)


def release_memory() -> None:
    """Give what was freed back to the system.

    glibc keeps freed memory in pieces between those in use. Does nothing with another C library.
    """
    _glibc("malloc_trim")(0)


def prefer_memory() -> None:
    """From now on, let each piece of `LARGE` bytes or more go back to the system as soon as it is freed.

    Otherwise glibc keeps them for the next ones, and a process may hold half as much again as it uses. A step takes up
    to a tenth longer, since new memory must be zeroed. Does nothing with another C library.
    """
    _glibc("mallopt")(_M_MMAP_THRESHOLD, LARGE)


def _glibc(name: str) -> Callable[..., int]:
    try:
        return getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError):  # another C library, or no handle of the program itself
        return lambda *_: 0
