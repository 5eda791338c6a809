"""What a process and all below it use of memory and processor, as the kernel counts it; pure but for reading /proc."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

_MEMORY = re.compile(r"^Rss(?:Anon|Shmem):\s*(\d+) kB", re.MULTILINE)
_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a tree of processes: bytes of memory that no file backs, what is shared by several counted for each; seconds of processor time."""

    memory: int = 0
    cpu_s: float = 0.0


def of(pid: int) -> Usage:
    """What the process and its descendants use; nothing for those that are gone."""
    memory, ticks, left, seen = 0, 0, [pid], set[int]()
    while left:
        if (one := left.pop()) in seen:
            continue
        seen.add(one)
        with contextlib.suppress(OSError, IndexError, ValueError):
            folder = Path(f"/proc/{one}")
            status = (folder / "status").read_text(encoding="utf-8", errors="replace")
            memory += 1024 * sum(map(int, _MEMORY.findall(status)))
            # user, system, and both of children that were waited for
            ticks += sum(map(int, (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[11:15]))
            for task in (folder / "task").iterdir():
                left += map(int, (task / "children").read_text(encoding="ascii").split())
    return Usage(memory, ticks / _TICK)
