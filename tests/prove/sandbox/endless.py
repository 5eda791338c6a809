"""Plain functions that worker processes run for the proof."""

from __future__ import annotations

import os
from pathlib import Path


def echo(mark: str) -> str:
    """What it is given."""
    return mark


def spin(mark: str) -> None:
    """For ever, in two processes that bear the mark."""
    Path("/proc/self/comm").write_text(mark)
    if os.fork() == 0:
        while True:
            pass
    while True:
        pass
