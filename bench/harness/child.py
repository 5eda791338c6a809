"""A process of a measurement that does nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from pathlib import Path
from typing import Any

_PAGE, _TICKS = os.sysconf("SC_PAGESIZE"), os.sysconf("SC_CLK_TCK")


def rss_kib(pid: int) -> float:
    """The memory that a process has now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE / 1024


def cpu_s(pid: int) -> float:
    """The seconds of CPU that a process has spent, in user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def all_cpu_s(*pids: int) -> float:
    """The seconds of CPU that processes have spent, with all that they started and those of these that are gone."""
    parents: dict[int, int] = {}
    spent: dict[int, float] = {}
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = (place / "stat").read_text().rpartition(")")[2].split()
            parents[int(place.name)], spent[int(place.name)] = int(fields[1]), sum(map(int, fields[11:15])) / _TICKS
    return sum(took for pid, took in spent.items() if _is_of(pid, parents, pids))


def _is_of(pid: int, parents: Mapping[int, int], roots: Collection[int]) -> bool:
    while pid and pid not in roots:
        pid = parents.get(pid, 0)
    return pid != 0


class Child:
    """A process that does nothing else; it tells its CPU time when asked."""

    def __init__(self, *words: str) -> None:
        self._process = subprocess.Popen(  # noqa: S603 - a file of this folder
            [sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.told: dict[str, Any] = json.loads(self._line())

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def ask(self, word: str = "cpu") -> float:
        """Say a word; the seconds of CPU spent until it was answered."""
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)
        return float(self._line())

    def rss_kib(self) -> float:
        """The memory it has now."""
        return rss_kib(self._process.pid)

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


async def _nothing(_: str) -> None:
    pass


async def answer(told: dict[str, Any], heed: Callable[[str], Awaitable[None]] = _nothing, apart: Callable[[], float] = float) -> None:
    """The other side of `Child`: tell what the parent must know, then heed its words until it is gone.

    Each is answered with the CPU time so far, less what was spent `apart`.
    """
    print(json.dumps(told), flush=True)
    while word := await asyncio.to_thread(sys.stdin.readline):
        await heed(word.strip())
        print(time.process_time() - apart(), flush=True)
