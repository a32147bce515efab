import subprocess
import sys

from fedtune_strategies.memory import peak_memory


def test_the_peak_is_this_process_s_own():
    """Not that of a larger one that started it."""
    ballast = bytearray(b"x") * 200_000_000
    show = [sys.executable, "-c", "from fedtune_strategies.memory import peak_memory; print(peak_memory())"]
    child = int(subprocess.run(show, capture_output=True, text=True, check=True).stdout)
    assert 5_000_000 < child < 100_000_000 < len(ballast) < peak_memory()
