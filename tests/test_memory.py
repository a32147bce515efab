import subprocess
import sys

import pytest

from fedtune_strategies.memory import peak_memory

HOLES = """
import psutil
from fedtune_strategies.memory import prefer_memory, release_memory

def resident():
    return psutil.Process().memory_info().rss

{first}
bytearray(16 * 2**20)  # from now on glibc keeps pieces of this size and less
before = resident()
pieces = [bytearray(b"x") * 2**21 for _ in range(100)]
kept = pieces[::10]
del pieces
{then}
print((resident() - before) // 2**20)
"""


def held(first="", then=""):
    """Return the MiB that a process holds of 200, of which it has freed 180 in pieces between those in use."""
    command = [sys.executable, "-c", HOLES.format(first=first, then=then)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_the_peak_is_this_process_s_own():
    """Not that of a larger one that started it."""
    ballast = bytearray(b"x") * 200_000_000
    show = [sys.executable, "-c", "from fedtune_strategies.memory import peak_memory; print(peak_memory())"]
    child = int(subprocess.run(show, capture_output=True, text=True, check=True).stdout)
    assert 5_000_000 < child < 100_000_000 < len(ballast) < peak_memory()


@pytest.mark.parametrize("way", [{"then": "release_memory()"}, {"first": "prefer_memory()"}])
def test_what_was_freed_between_pieces_in_use_goes_back(way):
    assert held(**way) < 40 < 150 < held()
