"""Holds a command on a leash: it and all it has started end when whoever holds the other end does, however that ends.

A program of its own, run by its path, on the standard library alone: `python leash.py GRACE_S COMMAND…`. Its standard
input is the leash: a pipe on which nothing is ever said. When that ends, because its holder let go or was killed, the
command's whole process group gets SIGTERM, and after the grace time SIGKILL. That is more than a signal at the parent's
death (PR_SET_PDEATHSIG) can do, which reaches one process only and Linux only; the command gets that too, against a
leash that is killed itself. What was started by a command that has ended is ended as well.

The first line on standard output is `leash: PID` with the group's id; everything else there is the command's. The exit
code is the command's, 128 + n if signal n has ended it, 127 if it can't be started.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

_PR_SET_PDEATHSIG = 1
_LEFT_OVER_S = 1.0
"""What a command that has ended by itself has left running gets so long for its last words."""
_LOOK_EVERY_S = 0.05


def hold(command: Sequence[str], grace_s: float) -> int:
    """Run a command until it ends or standard input does; return its exit code."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    told: list[int] = []
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        child = subprocess.Popen(  # noqa: S603 - what to run is what this is told
            command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_die_with_parent
        )
    except OSError as error:
        print(f"leash: {command[0]} can't be run: {error.strerror}", flush=True)
        return 127
    print(f"leash: {child.pid}", flush=True)
    while child.poll() is None:
        ready, _, _ = select.select([sys.stdin, reader], [], [])
        if reader in ready:
            os.read(reader, 4096)
        if told or (sys.stdin in ready and not os.read(sys.stdin.fileno(), 4096)):
            _end(child, grace_s)
    _end(child, _LEFT_OVER_S)
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


def _end(child: subprocess.Popen[bytes], grace_s: float) -> None:
    """End the whole group: politely, then not."""
    deadline = time.monotonic() + grace_s
    there = _signal(child.pid, signal.SIGTERM)
    while there and time.monotonic() < deadline:
        time.sleep(_LOOK_EVERY_S)
        child.poll()  # else it would stay in its group as a zombie
        there = _signal(child.pid, 0)
    _signal(child.pid, signal.SIGKILL)
    child.wait()


def _signal(group: int, number: int) -> bool:
    """Send a signal to a group; whether anybody was there."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    except PermissionError:  # macOS says so of zombies
        return False
    return True


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(hold(sys.argv[2:], float(sys.argv[1])))
