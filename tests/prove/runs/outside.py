"""What is outside of the system under proof: a folder with a line for each effect of a tool, and gates at which runs are held."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# one file each: what tools changed, what they looked at, who stands at a gate, what a tool is that goes on until it is ended
EFFECTS, LOOKS, HELD, BEATS = "effects", "looks", "held", "beats"
# a dispatcher with this file claims nothing
IDLE = "idle-"
_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class Line:
    """What a process wrote: of what (the key of an effect, the mark of a run), as what (the tool, the place), who and when."""

    of: str
    name: str
    pid: int
    at: float


def note(folder: str, file: str, of: str, name: str) -> None:
    """Add a line, whole or not at all, whoever else writes."""
    line = json.dumps([of, name, os.getpid(), time.time()]).encode() + b"\n"
    descriptor = os.open(f"{folder}/{file}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def lines(folder: str | Path, file: str) -> list[Line]:
    """All lines so far."""
    with contextlib.suppress(FileNotFoundError), open(f"{folder}/{file}", encoding="ascii") as written:
        return [Line(*json.loads(line)) for line in written if line.endswith("\n")]
    return []


def has(folder: str, file: str, of: str) -> bool:
    """Whether there is a line of it; quick, for it is asked where others wait."""
    with contextlib.suppress(FileNotFoundError), open(f"{folder}/{file}", "rb") as written:
        return json.dumps([of])[:-1].encode() + b"," in written.read()
    return False


def is_open(gate: str) -> bool:
    """Whether whoever comes to the gate may pass."""
    return os.path.exists(gate)


async def held(folder: str, gate: str, mark: str, place: str, alive: Callable[[], object] = lambda: None) -> None:
    """Stand at a gate until it is open, and say so; `alive` is called meanwhile. An empty gate is none."""
    if not gate or is_open(gate):
        return
    note(folder, HELD, mark, place)
    while True:
        await asyncio.sleep(_LOOK_S)
        if is_open(gate):
            return
        alive()


def held_here(folder: str, gate: str, mark: str, place: str) -> None:
    """The same for a plain function, in a process of its own."""
    if not gate or is_open(gate):
        return
    note(folder, HELD, mark, place)
    while not is_open(gate):
        time.sleep(_LOOK_S)
