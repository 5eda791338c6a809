"""What a tail says about a join: refused, or joined; an outage is neither."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from types import SimpleNamespace
from typing import Any

import jwt
import pytest

from chassis import identity, lifecycle
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from netra.events.v1 import events_pb2
from services.events import fanout, log, tail

_WHO = identity.Principal(ids.UserId.new(), ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", time.time() + 86_400, "t")


class _Live:
    """A fanout whose record is away for the first join."""

    generation = "g"
    degraded = False

    def __init__(self) -> None:
        self.asked = asyncio.Event()
        self.released: list[str] = []

    async def join(self, users: Sequence[str]) -> dict[str, tuple[fanout.Topic, log.Position]]:
        if not self.asked.is_set():
            self.asked.set()
            raise errors.Unavailable
        topics = {user: fanout.Topic(user) for user in users}
        for topic in topics.values():
            topic.last = 7
        return {user: (topic, log.Position(7)) for user, topic in topics.items()}

    def release(self, topic: fanout.Topic) -> None:
        self.released.append(topic.user_id)


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
    following = tail.Tail(live, unused, unused, _Verifier(), tasks, 1.0).follow(requests())  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        first = await anext(following)
        while not first.positions:
            first = await anext(following)
    assert [(position.joined, position.reason, position.cursor) for position in first.positions] == [(True, "", 7)]
    await following.aclose()  # type: ignore[attr-defined]
    await tasks.close()


class _Strict(_Verifier):
    async def principal(self, token: str) -> identity.Principal:
        if token == _SPENT:
            raise errors.Unauthenticated("The token is refused.")
        return _WHO


_SPENT = jwt.encode({"sub": _WHO.user_id}, "k" * 32, "HS256")


async def test_an_answer_names_the_join_and_what_comes_by_itself_names_none() -> None:
    live, tasks = _Live(), lifecycle.Tasks()
    live.asked.set()
    asked: asyncio.Queue[events_pb2.JoinUser] = asyncio.Queue()

    async def requests() -> AsyncIterator[events_pb2.TailRequest]:
        while True:
            yield events_pb2.TailRequest(join=await asked.get())

    unused: Any = None
    streams = tail.Tail(live, unused, unused, _Strict(), tasks, 1.0)  # type: ignore[arg-type]
    following = streams.follow(requests())

    async def told() -> list[tuple[str, bool, str]]:
        while not (batch := await anext(following)).positions:
            pass
        return [(position.join_id, position.joined, position.reason) for position in batch.positions]

    async with asyncio.timeout(5):
        asked.put_nowait(events_pb2.JoinUser(access_token="t", join_id="one"))
        assert await told() == [("one", True, "")]
        asked.put_nowait(events_pb2.JoinUser(access_token=_SPENT, join_id="two"))
        assert await told() == [("two", True, "The token is refused.")]
        streams.revoked(auth_pb2.Revocation(session_id=_WHO.session_id))
        assert await told() == [("", False, "The session has ended.")]
        asked.put_nowait(events_pb2.JoinUser(access_token=_SPENT, join_id="three"))
        assert await told() == [("three", False, "The token is refused.")]
    await following.aclose()  # type: ignore[attr-defined]
    await tasks.close()


class _Record:
    """A user's record of which only the end of one run is known."""

    def __init__(self, pages: Sequence[log.Page], ends: Sequence[int | None]) -> None:
        self._pages, self._ends = list(pages), list(ends)

    async def page(self, user_id: str, after: int, *, limit: int, max_bytes: int, run_id: str = "") -> log.Page:
        return self._pages.pop(0) if len(self._pages) > 1 else self._pages[0]

    async def end_of(self, user_id: str, run_id: str) -> int:
        end = self._ends.pop(0)
        if end is None:
            raise errors.NotFound("There is no such run.")
        return end


def _page(cursors: range, last: int, oldest: int) -> log.Page:
    events = [log.Recorded(_WHO.user_id, cursor, "r", cursor, "", "agent_thinking", b"{}") for cursor in cursors]
    return log.Page(events, cursors[-1] if cursors else last, log.Position(last, oldest))


def _tail(record: _Record, tasks: lifecycle.Tasks) -> tail.Tail:
    live = _Live()
    live.asked.set()
    return tail.Tail(live, record, record, _Verifier(), tasks, 1.0)  # type: ignore[arg-type]


async def test_a_subscriber_is_told_what_retention_takes_meanwhile_and_before_the_events_after_it() -> None:
    tasks = lifecycle.Tasks()
    pages = [_page(range(1, 4), 7, 1), _page(range(6, 8), 7, 6)]
    parts = _tail(_Record(pages, []), tasks).subscribe(_WHO, 0, "")
    async with asyncio.timeout(5):
        seen = [await anext(parts), await anext(parts)]
    assert [([event.cursor for event in part.events], part.truncated_to) for part in seen] == [([1, 2, 3], 0), ([6, 7], 6)]
    await parts.aclose()  # type: ignore[attr-defined]
    await tasks.close()


@pytest.mark.parametrize("end", [7, None])
async def test_a_subscriber_to_a_run_whose_end_is_gone_waits_for_nothing(end: int | None) -> None:
    tasks = lifecycle.Tasks()
    parts = _tail(_Record([_page(range(0), 7, 8)], [0, end]), tasks).subscribe(_WHO, 3, "r")
    async with asyncio.timeout(5):
        assert [(part.events, part.truncated_to) async for part in parts] == [([], 8)]
    await tasks.close()


async def test_whose_session_ends_while_joining_is_refused_and_not_served_on() -> None:
    tasks, live, verifier, unused = lifecycle.Tasks(), _Live(), _Verifier(), None
    live.asked.set()
    verifier.trust = SimpleNamespace(revoked=lambda who: True)
    parts = tail.Tail(live, unused, unused, verifier, tasks, 1.0).subscribe(_WHO, 0, "")  # type: ignore[arg-type]
    with pytest.raises(errors.Unauthenticated):
        await anext(parts)
    assert live.released == [_WHO.user_id]
    await tasks.close()


async def test_a_tail_says_every_other_second_that_it_is_alive_and_how_it_is() -> None:
    tasks, live, unused = lifecycle.Tasks(), _Live(), None

    async def requests() -> AsyncIterator[events_pb2.TailRequest]:
        await asyncio.Event().wait()
        yield events_pb2.TailRequest()

    following = tail.Tail(live, unused, unused, _Verifier(), tasks, 1.0).follow(requests())  # type: ignore[arg-type]
    said = []
    for degraded in (False, True, True):
        live.degraded = degraded
        async with asyncio.timeout(2):
            batch = await anext(following)
        said.append(batch.degraded)
        assert not batch.events
        assert not batch.positions
    assert said == [False, True, True]
    await following.aclose()  # type: ignore[attr-defined]
    await tasks.close()
