"""Stop what a launcher left behind: ``python -m deploy.common.watchdog TOKEN`` sweeps when its standard input ends.

The launcher holds the other end of that pipe, and the system closes it when the launcher ends, in any way.
"""

import signal
import sys

from deploy.common.processes import sweep

if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    sweep(sys.argv[1])
