"""The first code of a worker process: ties its life to its parent's, then becomes the module it is for."""

from __future__ import annotations

import contextlib
import ctypes
import os
import runpy
import signal
import sys

from services.dispatcher.tools.sandbox import watch

_PR_SET_PDEATHSIG = 1


def main(parent: int, module: str, door: int | None = None) -> None:
    """Run the module as `__main__`, for as long as the parent lives; its guardian hears of it through the door before it runs."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            # when memory runs out, this process goes, not the one that runs everybody's agents
            file.write("1000")
    if os.getppid() != parent:  # it died before the signal was armed
        sys.exit(os.EX_TEMPFAIL)
    if door is not None:
        try:
            os.write(door, watch.note(watch.GUARD, os.getpid()))
        except OSError:  # no guardian, no work
            sys.exit(os.EX_TEMPFAIL)
        os.close(door)
    sys.argv = [module]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
