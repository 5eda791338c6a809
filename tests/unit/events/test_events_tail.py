"""What a tail says about a join: refused, or joined; an outage is neither."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

from chassis import identity, lifecycle
from netra import errors, ids
from netra.events.v1 import events_pb2
from services.events import fanout, log, tail

_WHO = identity.Principal(ids.UserId.new(), ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", time.time() + 600, "t")


class _Live:
    """A fanout whose record is away for the first join."""

    generation = "g"

    def __init__(self) -> None:
        self.asked = asyncio.Event()

    async def join(self, users: Sequence[str]) -> dict[str, tuple[fanout.Topic, log.Position]]:
        if not self.asked.is_set():
            self.asked.set()
            raise errors.Unavailable
        return {user: (fanout.Topic(user), log.Position(7)) for user in users}

    def release(self, topic: fanout.Topic) -> None:
        """Not counted here."""


class _Verifier:
    trust = SimpleNamespace(permissions=lambda roles, tier: frozenset({"events:read"}), revoked=lambda who: False)

    async def principal(self, token: str) -> identity.Principal:
        return _WHO


async def test_an_outage_is_not_said_to_be_a_refusal() -> None:
    live, tasks = _Live(), lifecycle.Tasks()

    async def requests() -> AsyncIterator[events_pb2.TailRequest]:
        yield events_pb2.TailRequest(join=events_pb2.JoinUser(access_token="t"))
        await live.asked.wait()
        await asyncio.sleep(0.05)
        yield events_pb2.TailRequest(join=events_pb2.JoinUser(access_token="t"))
        await asyncio.Event().wait()

    unused: Any = None
    following = tail.Tail(live, unused, _Verifier(), tasks, 1.0).follow(requests())  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        first = await anext(following)
    assert [(position.joined, position.reason, position.cursor) for position in first.positions] == [(True, "", 7)]
    await following.aclose()  # type: ignore[attr-defined]
    await tasks.close()
