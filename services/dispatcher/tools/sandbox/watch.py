"""The process that ends the tools' processes when their owner has died, was stopped, or does not get to its work any more.

Run as a script by an isolated interpreter, so it imports nothing of ours: it must stay small, and nothing that a tool does may hold it up.
Notes come on standard input, each of one length, so that several writers never mix: what it is, and a number in digits, which a shell
can write as well.
"""

import os
import select
import signal
import sys
import time

DIGITS = 20
_LENGTH = 1 + DIGITS
# the owner lives: CLOCK_MONOTONIC in ns as it was then; a process group to end with the owner; one that is gone
BEAT, GUARD, RELEASE = b"b", b"+", b"-"
_STDIN = 0
_AGAIN_S = 0.05


def note(kind: bytes, number: int) -> bytes:
    """What is written at once, and never in parts."""
    return b"%b%0*d" % (kind, DIGITS, number)


def _kill(groups: dict[int, None]) -> None:
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue


def main(heartbeat_s: float) -> None:
    """Read notes until the last writer is gone."""
    # killed in the order of their notes: what leaves one group for another that was told of later is met in one of them
    groups: dict[int, None] = {}
    beat, pending = time.monotonic(), b""
    notes = select.poll()
    notes.register(_STDIN, select.POLLIN)
    while True:
        left_s = beat + heartbeat_s - time.monotonic()
        if left_s <= 0:
            # until the owner is back, also what is only being started
            _kill(groups)
        notes.poll(1000 * (left_s if left_s > 0 else _AGAIN_S))
        try:
            found = os.read(_STDIN, 4096)
        except BlockingIOError:
            continue
        if not found:
            _kill(groups)
            return
        pending += found
        while len(pending) >= _LENGTH:
            kind, number = pending[:1], int(pending[1:_LENGTH])
            pending = pending[_LENGTH:]
            if kind == BEAT:
                beat = max(beat, number / 1e9)
            elif kind == GUARD:
                groups[number] = None
            else:
                groups.pop(number, None)


if __name__ == "__main__":
    os.set_blocking(_STDIN, False)
    main(float(sys.argv[1]))
