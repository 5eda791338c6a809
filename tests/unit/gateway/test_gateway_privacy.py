"""An export over HTTP: at the pace of its reader, to its end or visibly not."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from chassis import identity
from gateway import privacy
from netra import errors, ids
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2


class Peer:
    """The other end of one HTTP request; takes so many parts, then nothing more."""

    def __init__(self, takes: int = 1_000) -> None:
        self.sent: list[dict[str, Any]] = []
        self.takes, self.cut = takes, 0
        self.gone, self.full = asyncio.Event(), asyncio.Event()
        self.scope: Any = {"type": "http", "method": "GET", "state": {"cut": self._cut}}

    def _cut(self) -> None:
        self.cut += 1
        self.gone.set()

    async def receive(self) -> dict[str, Any]:
        """What the server hears."""
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        """What the server says."""
        if len(self.sent) >= self.takes:
            self.full.set()
            await asyncio.Event().wait()
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        """What came."""
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def whole(self) -> bool:
        """Whether the end came."""
        return not self.sent[-1].get("more_body", True)


class Lines:
    """What is exported; knows how much of it was read, and whether it was ended."""

    def __init__(self, *parts: bytes | Exception, endless: bool = False) -> None:
        self._parts, self._endless = parts, endless
        self.read, self.ended = 0, False

    async def __call__(self) -> AsyncGenerator[bytes]:
        """One after another."""
        try:
            while True:
                for part in self._parts:
                    self.read += 1
                    if isinstance(part, Exception):
                        raise part
                    yield part
                if not self._endless:
                    return
        finally:
            self.ended = True


async def _exported(lines: Lines, peer: Peer, *, revoked: bool = False) -> None:
    answer = privacy._Export(lines(), lambda: revoked, stall_s=0.05)
    await answer(peer.scope, peer.receive, peer.send)


async def test_all_lines_and_the_end() -> None:
    lines, peer = Lines(b'{"kind":"thread"}\n', b'{"kind":"end"}\n'), Peer()
    await _exported(lines, peer)
    assert (peer.body, peer.whole, peer.cut) == (b'{"kind":"thread"}\n{"kind":"end"}\n', True, 0)
    headers = dict(peer.sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"application/x-ndjson")
    assert b"content-length" not in headers
    assert lines.ended


async def test_who_asks_for_the_head_alone_gets_it_alone() -> None:
    lines, peer = Lines(b"1\n", endless=True), Peer()
    peer.scope["method"] = "HEAD"
    await _exported(lines, peer)
    assert (peer.body, peer.whole, lines.read, lines.ended) == (b"", True, 1, True)


async def test_what_is_refused_before_the_first_line_is_an_error_and_no_answer() -> None:
    lines, peer = Lines(errors.Unavailable("away")), Peer()
    with pytest.raises(errors.Unavailable):
        await _exported(lines, peer)
    assert (peer.sent, peer.cut) == ([], 0)


async def test_what_breaks_in_between_is_cut_and_has_no_end() -> None:
    lines, peer = Lines(b"1\n", errors.Unavailable("away")), Peer()
    await _exported(lines, peer)
    assert (peer.body, peer.whole, peer.cut) == (b"1\n", False, 1)


async def test_a_session_that_ends_ends_its_export() -> None:
    lines, peer = Lines(b"1\n", b"2\n", endless=True), Peer()
    await _exported(lines, peer, revoked=True)
    assert (peer.body, peer.whole, peer.cut) == (b"1\n", False, 1)


async def test_a_reader_that_takes_nothing_is_cut_and_nothing_is_read_ahead_of_it() -> None:
    lines, peer = Lines(b"x" * 1000, endless=True), Peer(takes=3)
    await _exported(lines, peer)
    # the head and two parts were taken; one more was on its way
    assert (lines.read, lines.ended, peer.cut) == (3, True, 1)


async def test_a_client_that_goes_away_stops_it() -> None:
    lines, peer = Lines(b"x", endless=True), Peer(takes=5)
    answer = privacy._Export(lines(), lambda: False, stall_s=60)
    async with asyncio.TaskGroup() as group, asyncio.timeout(10):
        task = group.create_task(answer(peer.scope, peer.receive, peer.send))
        await peer.full.wait()
        peer.gone.set()
        await task
    assert (lines.ended, peer.whole) == (True, False)


def test_an_event_is_shown_as_its_user_got_it() -> None:
    event = events_pb2.Event(cursor=3, type="agent_started", frame=b'{"type":"agent_started","cursor":3}')
    line = privacy._line(event)
    assert line.endswith(b"\n")
    assert json.loads(line) == {"kind": "event", "event": {"type": "agent_started", "cursor": 3}}


def principal() -> identity.Principal:
    return identity.Principal(ids.UserId.new(), ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", time.time() + 600, "t")


class Parts:
    """A stream of a service."""

    def __init__(self, *parts: Any) -> None:
        self._parts, self.cancelled = iter(parts), False

    def __call__(self, _request: Any, metadata: Any) -> Parts:
        assert metadata
        return self

    def __aiter__(self) -> Parts:
        return self

    async def __anext__(self) -> Any:
        for part in self._parts:
            return part
        raise StopAsyncIteration

    def cancel(self) -> None:
        """Nothing more is wanted."""
        self.cancelled = True


def _of_context(*lines: bytes) -> Parts:
    return Parts(*(context_pb2.ExportDataResponse(lines=some) for some in lines))


def _of_events(*frames: bytes) -> Parts:
    return Parts(events_pb2.ExportEventsResponse(events=[events_pb2.Event(frame=frame) for frame in frames]))


def _put_together(context: Parts, events: Parts, runs: Parts | None = None) -> privacy.Privacy:
    services: Any = SimpleNamespace(
        context=SimpleNamespace(ExportData=context),
        events=SimpleNamespace(ExportEvents=events),
        dispatcher=SimpleNamespace(ExportRuns=runs or Parts()),
    )
    edge: Any = SimpleNamespace()
    return privacy.Privacy(edge, services)


async def _read(one: privacy.Privacy, who: identity.Principal) -> bytes:
    return b"".join([some async for some in one._lines(who)])


# what a user wrote may look like an end, and is none
LOOKS = b'{"kind" : "message", "content" : "{\\"kind\\":\\"end\\"}"}\n'


@pytest.mark.parametrize(
    "lines",
    [
        [LOOKS, b'{"kind":"end","lines":1}\n'],
        [LOOKS + b'{"kind":"end","lines":1}\n'],
    ],
)
async def test_the_parts_of_all_services_have_one_end(lines: list[bytes]) -> None:
    context, events = _of_context(*lines), _of_events(b'{"a":1}', b'{"a":2}')
    runs = Parts(dispatcher_pb2.ExportRunsResponse(lines=b'{"kind":"run"}\n{"kind":"vote"}\n'))
    found = await _read(_put_together(context, events, runs), principal())
    events_shown = b'{"kind":"event","event":{"a":1}}\n{"kind":"event","event":{"a":2}}\n'
    assert found == LOOKS + b'{"kind":"run"}\n{"kind":"vote"}\n' + events_shown + b'{"kind":"end","lines":5}\n'
    assert (context.cancelled, runs.cancelled, events.cancelled) == (True, True, True)


async def test_a_part_without_its_end_is_not_taken_for_the_whole() -> None:
    one = _put_together(_of_context(LOOKS), _of_events(b"{}"))
    with pytest.raises(errors.Unavailable):
        await _read(one, principal())


async def test_a_user_has_one_export_at_a_time() -> None:
    context = _of_context(LOOKS, b'{"kind":"end","lines":1}\n')
    one, who = _put_together(context, _of_events()), principal()
    going_on = one._lines(who)
    assert await anext(going_on) == LOOKS
    with pytest.raises(errors.RateLimited):
        await anext(one._lines(who))
    # one that is given up gives its place back, and what it held
    await going_on.aclose()
    assert context.cancelled
    assert await _read(one, who)


async def test_what_others_take_for_an_end_of_a_line_is_none() -> None:
    text = "a\x85b\u2028c\u2029d\u00c2\u2027"
    said = [json.dumps({"kind": "message", "content": text}, ensure_ascii=False).encode() + b"\n", b'{"kind":"end","lines":1}\n']
    frame = json.dumps({"text": text}, ensure_ascii=False).encode()
    found = (await _read(_put_together(_of_context(*said), _of_events(frame)), principal())).decode()
    lines = [json.loads(line) for line in found.splitlines()]
    assert [line["kind"] for line in lines] == ["message", "event", "end"]
    assert (lines[0]["content"], lines[1]["event"]["text"]) == (text, text)
