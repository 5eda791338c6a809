"""What happens meanwhile: everybody acts and watches, and processes die, stop, and forget."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
from collections.abc import Callable
from typing import Any

from tests.fixtures import sockets
from tests.prove import faults
from tests.prove.isolation.answers import frame
from tests.prove.isolation.judge import Judge
from tests.prove.isolation.people import Party
from tests.prove.isolation.place import Place
from tests.prove.isolation.pulse import BROKEN
from tests.prove.isolation.world import World

FAULTS: dict[str, faults.Fault[Place]] = {
    "kill -9 auth": faults.killed("auth"),
    "kill -9 context": faults.killed("context"),
    "kill -9 events": faults.killed("events"),
    "kill -9 dispatcher": faults.killed("dispatcher"),
    "kill -9 gateway": faults.killed("gateway"),
    "kill -9 valkey": faults.killed("valkey"),
    "kill -9 postgres": faults.killed("postgres"),
    "SIGSTOP context": faults.stopped("context"),
    "SIGSTOP events": faults.stopped("events"),
    "SIGSTOP postgres": faults.stopped("postgres"),
    "wipe valkey": faults.wiped,
}


async def act(world: World, who: Party, judge: Judge, over: asyncio.Event, chance: random.Random) -> None:
    """Start runs and keep files, again and again: what others must not hear of. Every other run is in the thread that they name."""
    named = ("", who.things["thread_id"])
    for at in itertools.count():
        if over.is_set():
            return
        with contextlib.suppress(*BROKEN):
            run = await world.started(who, thread_id=named[at % len(named)])
            await world.ended(who, run.run_id)
            await world.kept(who)
        await asyncio.sleep(chance.uniform(0, 0.3))


async def watch(world: World, who: Party, judge: Judge, over: asyncio.Event, chance: random.Random) -> None:
    """Everything that a socket of theirs says, from the beginning of the record; again when it is thrown off."""
    while not over.is_set():
        with contextlib.suppress(*BROKEN):
            async with sockets.opened(world.system, who.token, "resume.0", proxy=None) as socket:
                while not over.is_set():
                    told = await _heard(socket)
                    if told is not None:
                        judge.findings.heard += 1
                        judge.search(f"what a socket of {who.name} hears", who, frame(told))
        await asyncio.sleep(chance.uniform(0, 0.3))


async def _heard(socket: sockets.Socket) -> dict[str, Any] | None:
    try:
        async with asyncio.timeout(1.0):
            found: dict[str, Any] = json.loads(await socket.connection.recv())
    except TimeoutError:
        return None
    return {"code": "", "message": "", "details": {}, **found}


async def strike(where: Place, many: int, within_s: float, chance: random.Random, told: Callable[[str], None]) -> dict[str, int]:
    """So many faults, evenly over the time."""
    return dict(await faults.strike(FAULTS, where, many, within_s, chance, told))


async def recovered(world: World) -> None:
    """Returns when the gateway says that everything serves again."""
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(*BROKEN):
                if (await world.http.get("/readyz")).status_code == 200:
                    return
            await asyncio.sleep(0.2)
