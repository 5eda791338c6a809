"""Frames leave in order, many in one write, while the peer takes them; one that takes nothing is sent away."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway import close_codes, delivery, envelope, writer
from tests.fixtures import ready


@dataclass(eq=False)
class _Line:
    """A connection whose peer takes `room` bytes."""

    room: int = 10_000_000
    gone: bool = False
    writes: list[bytes] = field(default_factory=list)
    taken: int = 0
    told: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.heard: Callable[[], None] = lambda: None

    @property
    def blocked(self) -> bool:
        return self.unwritten() > 0

    def moved(self, told: Callable[[], None]) -> None:
        self.told = told

    def put(self, frames: bytes) -> bool:
        if not self.gone:
            self.writes.append(frames)
        return not self.gone

    def unwritten(self) -> int:
        return max(sum(map(len, self.writes)) - self.room, 0)

    def end(self, close: close_codes.Close) -> None:
        """The session ends it, not the writer."""

    @property
    def frames(self) -> list[bytes]:
        return ready.payloads(b"".join(self.writes))


@dataclass(eq=False)
class _Owner:
    ended: list[close_codes.Close] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    fed: int = 0
    notes: list[str] = field(default_factory=list)

    def end(self, close: close_codes.Close) -> None:
        self.ended.append(close)
        self.over.set()

    def feed(self) -> None:
        self.fed += 1

    def notified(self, event: delivery.Event) -> None:
        self.notes.append(event.run_id)


def _event(cursor: int, payload: bytes = b"", kind: str = "x") -> delivery.Event:
    return delivery.Event(cursor, cursor, f"r{cursor}", "", kind, envelope.text(payload or b"%d" % cursor))


async def _settled() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def _owed(last: int = 0) -> delivery.Delivery:
    return delivery.Delivery(last, last, 1000, 10_000_000)


async def test_what_waits_leaves_in_one_write_in_order() -> None:
    line, owner, owed = _Line(), _Owner(), _owed()
    writer.Writer(owed, line, owner, 5)
    for cursor in range(1, 101):
        owed.offer(_event(cursor))
    owed.say(b"0")
    await _settled()
    assert (len(line.writes), line.frames) == (1, [b"%d" % number for number in range(101)])


async def test_a_write_is_not_longer_than_it_must_be() -> None:
    line, owed = _Line(), _owed()
    writer.Writer(owed, line, _Owner(), 5)
    for cursor in range(1, 11):
        owed.offer(_event(cursor, b"x" * 30_000))
    await _settled()
    assert [len(ready.payloads(write)) for write in line.writes] == [3, 3, 3, 1]


async def test_the_end_of_a_run_is_noted_once_it_was_put() -> None:
    line, owner, owed = _Line(), _Owner(), _owed()
    writer.Writer(owed, line, owner, 5)
    for cursor, kind in enumerate(("agent_started", "agent_completed", "x", "agent_cancelled"), 1):
        owed.offer(_event(cursor, kind=kind))
    await _settled()
    assert owner.notes == ["r2", "r4"]
    line.gone = True
    owed.offer(_event(5, kind="agent_failed"))
    await _settled()
    assert (owner.notes, owed.over) == (["r2", "r4"], True)


async def test_a_peer_that_makes_room_is_sent_more() -> None:
    line, owner, owed = _Line(room=0), _Owner(), _owed()
    writer.Writer(owed, line, owner, 5)
    owed.offer(_event(1))
    await _settled()
    owed.offer(_event(2))
    await _settled()
    assert line.frames == [b"1"]
    line.room = 1000
    line.told()
    await _settled()
    assert (line.frames, owner.ended) == ([b"1", b"2"], [])


async def test_a_peer_that_takes_a_little_stays_and_one_that_takes_nothing_goes() -> None:
    line, owner, owed = _Line(room=0), _Owner(), _owed()
    sending = writer.Writer(owed, line, owner, 3600)
    owed.offer(_event(1, b"x" * 1000))
    await _settled()
    for _ in range(4):
        line.room += 1
        sending._look()
    assert owner.ended == []
    sending._look()
    assert (owner.ended, owed.over) == ([close_codes.SLOW_READER], True)


async def test_a_peer_is_looked_after() -> None:
    line, owner, owed = _Line(room=0), _Owner(), _owed()
    writer.Writer(owed, line, owner, 0.01)
    owed.offer(_event(1))
    async with asyncio.timeout(5):
        await owner.over.wait()
    assert owner.ended == [close_codes.SLOW_READER]


async def test_a_socket_that_is_behind_is_fed_when_nothing_waits() -> None:
    line, owner, owed = _Line(), _Owner(), _owed()
    writer.Writer(owed, line, owner, 5)
    owed.offer(_event(1))
    owed.offer(_event(3))
    await _settled()
    assert (line.frames, owner.fed) == ([b"1"], 1)


async def test_the_last_word_comes_after_what_was_queued() -> None:
    line, owner, owed = _Line(), _Owner(), _owed()
    sending = writer.Writer(owed, line, owner, 5)
    owed.offer(_event(1))
    owed.stop()
    sending.finish()
    await _settled()
    assert line.frames == [b"1", b'{"type":"draining","cursor":1}']
    assert owner.ended == [close_codes.DRAINING]
