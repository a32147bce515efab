"""Coverage-guided fuzzing in a few lines: inputs that reach a new line are kept, and mutated further."""

import random
import sys
import tracemalloc
from collections.abc import Callable, Sequence

# What often breaks a reader: ends of ranges, and the characters that its formats are made of.
PIECES = [b"", b"\0", b"\xff" * 8, b"\x7f", b"{", b"}", b"[" * 5000, b'"', b"\\", b",", b":", b"\n", b"-1", b"1e999"]
PIECES += [b"null", b"NaN", b"9" * 30, (2**62).to_bytes(8, "little"), b"\xf0\x9f", b"../", b"header"]


def explore(
    target: Callable[[bytes], None], seeds: Sequence[bytes], runs: int, rooms: Sequence[str], seed: int = 0
) -> tuple[int, int]:
    """Call a target with ever stranger inputs; whatever it raises ends the search.

    Parameters
    ----------
    target : callable
        Takes bytes, and raises only where something is wrong.
    seeds : sequence of bytes
        Good inputs to begin with.
    runs : int
        How many inputs to try.
    rooms : sequence of str
        Parts of file names whose lines count as coverage.

    Returns
    -------
    tuple of int and int
        Lines reached, and the most bytes that Python held for one input.
    """
    rng, corpus, reached = random.Random(seed), list(seeds), set()
    tracemalloc.start()
    try:
        for run in range(runs):
            data = corpus[run] if run < len(seeds) else _mutated(rng, corpus)
            new = _lines(target, data, rooms) - reached
            if new:
                reached |= new
                corpus.append(data)
        return len(reached), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def _lines(target, data, rooms):
    lines = set()

    def trace(frame, event, argument):
        name = frame.f_code.co_filename
        if not any(room in name for room in rooms):
            return None
        if event == "line":
            lines.add((name, frame.f_lineno))
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        target(data)
    except Exception as error:
        raise AssertionError(f"{type(error).__name__}: {error} for {data[:300]!r}") from error
    finally:
        sys.settrace(before)
    return lines


def _mutated(rng, corpus):
    data = bytearray(rng.choice(corpus))
    for _ in range(rng.randint(1, 4)):
        at = rng.randint(0, len(data))
        match rng.randrange(5):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at:at] = rng.choice(PIECES)
            case 2:
                del data[at : at + rng.randint(1, 16)]
            case 3:
                other = rng.choice(corpus)
                cut = rng.randint(0, len(other))
                data[at : at + 32] = other[cut : cut + 32]
            case 4:
                data[at : at + 8] = rng.choice(PIECES)
    return bytes(data[:100_000])
