"""The tools of the proof. What they change is outside: a line in a ledger for each execution, with the key of the step it is for."""

from __future__ import annotations

import asyncio
import os
import time
import zlib
from collections.abc import Mapping
from typing import Any

from netra.tool import Settled, ToolContext, tool
from tests.prove.runs import outside

# no call of the proof ends for its time
_LONG_S = 300.0
_BEAT_S = 0.02
# such a call is made once at most, whatever happens to the process that makes it
ONCE = frozenset({"book", "pay"})
EFFECTS = frozenset({"put", "book", "pay", "ship"})


def value(key: str) -> int:
    """What a tool answers: the same for the same step."""
    return zlib.crc32(key.encode()) % 1000


def _of(key: str) -> str:
    """The mark of the run whose step this is the key of."""
    return key.partition(".")[0]


async def _done(file: str, name: str, folder: str, key: str, gate: str) -> dict[str, int]:
    outside.note(folder, file, key, name)
    # what it changed is changed; nobody but this process knows it yet
    await outside.held(folder, gate, _of(key), f"{key.partition('.')[2]}:in")
    return {"value": value(key)}


async def _booked(context: ToolContext, arguments: Mapping[str, Any]) -> Settled | None:
    key = arguments["key"]
    done = outside.has(arguments["folder"], outside.EFFECTS, key)
    return Settled(done=done, result={"value": value(key)} if done else None)


@tool(timeout_s=_LONG_S)
async def look(folder: str, key: str, gate: str = "") -> dict[str, int]:
    """Changes nothing; that it was called can be seen."""
    return await _done(outside.LOOKS, "look", folder, key, gate)


@tool(side_effects=True, idempotent=True, timeout_s=_LONG_S)
async def put(folder: str, key: str, gate: str = "") -> dict[str, int]:
    """Changes something, and may do it again."""
    return await _done(outside.EFFECTS, "put", folder, key, gate)


@tool(side_effects=True, reconcile=_booked, timeout_s=_LONG_S)
async def book(folder: str, key: str, gate: str = "") -> dict[str, int]:
    """Changes something once, and can be asked whether it did."""
    return await _done(outside.EFFECTS, "book", folder, key, gate)


@tool(side_effects=True, timeout_s=_LONG_S)
async def pay(folder: str, key: str, gate: str = "") -> dict[str, int]:
    """Changes something once, and nobody can be asked whether it did."""
    return await _done(outside.EFFECTS, "pay", folder, key, gate)


@tool(side_effects=True, idempotent=True, timeout_s=_LONG_S)
def ship(folder: str, key: str, gate: str = "", when: str = "in") -> dict[str, int]:
    """Changes something in a process of its own, and may do it again."""
    mark, _, step = key.partition(".")
    if when == "before":
        outside.held_here(folder, gate, mark, f"{step}:before")
    outside.note(folder, outside.EFFECTS, key, "ship")
    if when == "in":
        outside.held_here(folder, gate, mark, f"{step}:in")
    return {"value": value(key)}


@tool(timeout_s=_LONG_S)
async def refuse(key: str) -> dict[str, int]:
    """Fails, each time."""
    raise ValueError(f"{key} cannot be done")


@tool(timeout_s=_LONG_S)
async def linger(folder: str, mark: str) -> None:
    """Goes on until it is ended."""
    while True:
        outside.note(folder, outside.BEATS, mark, "linger")
        await asyncio.sleep(_BEAT_S)


@tool(timeout_s=_LONG_S)
def toil(folder: str, mark: str) -> None:
    """Goes on until it is ended, in two processes of its own."""
    os.fork()
    while True:
        outside.note(folder, outside.BEATS, mark, "toil")
        time.sleep(_BEAT_S)


ALL = (look, put, book, pay, ship, refuse, linger, toil)
