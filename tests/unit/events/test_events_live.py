"""The live tail: contiguous whatever Valkey does and however slow the reader is."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import Any

import pytest

from chassis import lifecycle
from netra import errors, ids
from services.events import announce, fanout, feed, log

_USER, _RUN = ids.uuid7(), ids.uuid7()


def _event(cursor: int, *, run_id: str = _RUN, frame: bytes = b"{}", ends: bool = False) -> log.Recorded:
    return log.Recorded(_USER, cursor, run_id, cursor, "", "agent_thinking", frame, ends)


class _Record:
    """A record that grows, and may be away."""

    def __init__(self) -> None:
        self.events: list[log.Recorded] = []
        self.away = False
        self.pages = 0
        self.id = "g"
        self.oldest = 1

    def grow(self, **fields: object) -> log.Recorded:
        self.events.append(_event(len(self.events) + 1, **fields))  # type: ignore[arg-type]
        return self.events[-1]

    async def page(self, user_id: str, after: int, *, limit: int, max_bytes: int, run_id: str = "") -> log.Page:
        self.pages += 1
        if self.away:
            raise errors.Unavailable
        last = len(self.events)
        found = [event for event in self.events[max(after, self.oldest - 1) : last] if not run_id or event.run_id == run_id]
        await asyncio.sleep(0)
        whole = len(found) <= limit
        events = found[:limit]
        return log.Page(events, last if whole else events[-1].cursor, log.Position(last, self.oldest))

    async def positions(self, users: Iterable[str]) -> Mapping[str, log.Position]:
        return {user: log.Position(len(self.events)) for user in users}

    async def generation(self) -> str:
        return self.id


class _Valkey:
    """Streams that the test fills."""

    def __init__(self) -> None:
        # None is an outage
        self.entries: asyncio.Queue[dict[bytes, bytes] | None] = asyncio.Queue()

    def announce(self, events: Sequence[log.Recorded], transients: Sequence[log.Transient] = ()) -> None:
        fields = announce.encoded(events, transients)
        self.entries.put_nowait({str(key).encode(): bytes(value) for key, value in fields.items()})  # type: ignore[arg-type]

    async def ends(self, streams: Sequence[str]) -> dict[str, str]:
        return dict.fromkeys(streams, "0-0")

    async def generation(self) -> str:
        return "v"

    async def read(self, positions: Mapping[str, str], *, block_ms: int) -> list[tuple[str, str, dict[bytes, bytes]]]:
        if (entry := await self.entries.get()) is None:
            raise errors.Unavailable
        return [(announce.partition(_USER), "1-0", entry)]


class _World:
    """A fanout over a record and a Valkey of the test's own."""

    def __init__(self) -> None:
        self.record, self.valkey = _Record(), _Valkey()
        self.tasks = lifecycle.Tasks(on_failure=lambda error: None)
        self.live = fanout.Fanout(self.valkey, self.record, self.record, self.tasks, 60, 60)
        self.tasks.spawn(self.live.run(), "run")

    def add(self, count: int, **fields: object) -> list[log.Recorded]:
        return [self.record.grow(**fields) for _ in range(count)]

    async def stream(self, *, after: int | None = None, run_id: str = "") -> feed.Stream:
        stream = feed.Stream(self.live, self.record, self.tasks)
        topic, position = (await self.live.join([_USER]))[_USER]
        stream.follow(topic, position.last if after is None else after, behind=after is not None, run_id=run_id)
        return stream


@pytest.fixture
async def world() -> AsyncIterator[_World]:
    made = _World()
    yield made
    await made.tasks.close()


async def _until(stream: feed.Stream, cursor: int) -> list[int]:
    seen: list[int] = []
    async with asyncio.timeout(5):
        async for events in stream.batches():
            seen += [event.cursor for event in events]
            if seen and seen[-1] >= cursor:
                return seen
    return seen


async def test_live_events_come_once_in_order(world: _World) -> None:
    world.add(5)
    stream = await world.stream()
    for event in world.add(10):
        world.valkey.announce([event])
        world.valkey.announce([event])
    assert await _until(stream, 15) == list(range(6, 16))
    assert world.record.pages == 0


async def test_a_gap_is_filled_from_the_record(world: _World) -> None:
    stream = await world.stream()
    added = world.add(10)
    world.valkey.announce([added[0], added[9]])
    assert await _until(stream, 10) == list(range(1, 11))


async def test_a_frame_too_big_for_valkey_is_read_from_the_record(world: _World) -> None:
    stream = await world.stream()
    big = world.record.grow(frame=b"{" + b" " * 100_000 + b"}")
    world.valkey.announce([big])
    assert await _until(stream, 1) == [1]


async def test_replay_then_live_without_hole_or_double(world: _World) -> None:
    world.add(1000)
    stream = await world.stream(after=10)
    rng = random.Random(7)

    async def append() -> None:
        for _ in range(300):
            world.valkey.announce(world.add(rng.randint(1, 5)))
            await asyncio.sleep(0)
        world.valkey.announce(world.add(1, ends=True))

    task = world.tasks.spawn(append(), "append")
    seen: list[int] = []
    async with asyncio.timeout(10):
        async for events in stream.batches():
            seen += [event.cursor for event in events]
            if events and events[-1].ends:
                break
    await task
    assert seen == list(range(11, len(world.record.events) + 1))


async def test_a_reader_that_sleeps_is_fed_from_the_record_with_bounded_memory(world: _World) -> None:
    stream = await world.stream()
    for _ in range(100):
        world.valkey.announce(world.add(100))
        await asyncio.sleep(0)
    for _ in range(100):
        await asyncio.sleep(0)
    assert world.valkey.entries.empty()
    assert stream._number <= 4096
    assert await _until(stream, 10_000) == list(range(1, 10_001))
    world.valkey.announce(world.add(1))
    assert await _until(stream, 10_001) == [10_001]


async def test_only_one_run_when_asked_for(world: _World) -> None:
    other = ids.uuid7()
    for _ in range(20):
        world.add(1)
        world.add(1, run_id=other)
    stream = await world.stream(after=0, run_id=other)
    world.valkey.announce([*world.add(1), *world.add(1, run_id=other)])
    assert await _until(stream, 42) == [*range(2, 41, 2), 42]


async def test_record_that_is_away_delays_but_loses_nothing(world: _World) -> None:
    stream = await world.stream()
    world.record.away = True
    asked = world.record.pages
    world.valkey.announce(world.add(5)[4:])
    async with asyncio.timeout(10):
        while world.record.pages == asked:  # noqa: ASYNC110 - the record is asked by a task of its own
            await asyncio.sleep(0)
    world.record.away = False
    assert await _until(stream, 5) == [1, 2, 3, 4, 5]


async def test_nothing_is_served_after_the_last_has_left(world: _World) -> None:
    stream = await world.stream()
    stream.close()
    assert not world.live._topics
    world.valkey.announce(world.add(1))
    for _ in range(100):
        await asyncio.sleep(0)


def test_entries_go_to_the_partition_of_their_user_and_come_back_equal() -> None:
    events = [_event(cursor, ends=cursor == 70) for cursor in range(1, 71)]
    made = announce.entries(events)
    assert {stream for stream, _ in made} == {announce.partition(_USER)}
    back = [event for _, fields in made for event in _sent(fields)[1]]
    assert back == events


def _transient(cursor: int, text: str = "", *, run_id: str = _RUN, user_id: str = _USER) -> log.Transient:
    return log.Transient(user_id, cursor, run_id, cursor, "", "agent_delta", text.encode() or b"%d" % cursor)


async def _told(stream: feed.Stream, last: int | str) -> list[int | str]:
    """Cursors of events, and what is shown, up to something."""
    told: list[int | str] = []
    async with asyncio.timeout(5):
        async for events in stream.batches():
            told += [event.cursor for event in events] + [one.frame.decode() for one in stream.take_shown()]
            if last in told:
                return told
    return told


async def test_what_is_not_recorded_is_shown_between_the_events_it_belongs_between(world: _World, monkeypatch: pytest.MonkeyPatch) -> None:
    # nothing waits until something else happens
    monkeypatch.setattr(feed, "_TICK_S", 60.0)
    world.add(5)
    stream = await world.stream()
    world.valkey.announce([], [_transient(5, "first")])
    world.valkey.announce(world.add(2), [_transient(7, "a"), _transient(7, "b"), _transient(6, "late")])
    world.valkey.announce(world.add(1))
    assert await _told(stream, 8) == ["first", 6, 7, "a", "b", 8]


async def test_what_is_not_recorded_waits_for_an_event_that_comes_from_the_record(world: _World) -> None:
    stream = await world.stream()
    big = world.record.grow(frame=b"{" + b" " * 20_000 + b"}")
    world.valkey.announce([big], [_transient(1, "a")] * 50)
    assert await _told(stream, 1) == [1, *["a"] * fanout._MAX_WAITING]
    # nobody has told of the event, but what comes after it does
    world.add(1)
    world.valkey.announce([], [_transient(2, "b")])
    assert await _told(stream, 2) == [2, "b"]
    # a page that has the next one too leaves it its place
    world.add(2)
    world.valkey.announce([], [_transient(3, "c")])
    world.valkey.announce([world.record.events[-1]])
    assert await _told(stream, 4) == [3, "c", 4]


async def test_a_reader_of_one_run_is_shown_that_run_only(world: _World) -> None:
    world.add(1)
    stream, other = await world.stream(after=1, run_id=_RUN), ids.uuid7()
    world.add(1, run_id=other)
    async with asyncio.timeout(5):
        batches = stream.batches()
        while stream.followers[_USER].behind:
            await anext(batches)
    world.valkey.announce([world.record.events[-1]], [_transient(2, "theirs", run_id=other), _transient(2, "ours")])
    world.valkey.announce(world.add(1))
    assert await _told(stream, 3) == ["ours", 3]


async def test_who_is_ahead_by_the_record_is_not_shown_what_is_before(world: _World) -> None:
    world.add(2)
    stream = await world.stream(after=0)
    # nobody was told of this one yet
    world.add(1)
    assert await _told(stream, 3) == [1, 2, 3]
    world.valkey.announce([], [_transient(2, "late")])
    world.valkey.announce(world.record.events[2:])
    world.valkey.announce(world.add(1))
    assert await _told(stream, 4) == [4]


async def test_who_waits_for_a_page_is_not_shown_what_may_come_before_its_events(world: _World) -> None:
    world.add(2)
    behind, live = await world.stream(after=2), await world.stream()
    asked, held, whole = asyncio.Event(), asyncio.Event(), world.record.page

    async def late(*given: Any, **more: Any) -> log.Page:
        asked.set()
        await held.wait()
        return await whole(*given, **more)

    world.record.page = late  # type: ignore[method-assign]
    reader = world.tasks.spawn(_told(behind, 3), "reader")
    async with asyncio.timeout(5):
        await asked.wait()
        world.valkey.announce([], [_transient(2, "late")])
        assert await _told(live, "late") == ["late"]
        world.add(1)
        held.set()
        assert await reader == [3]


async def test_who_does_not_keep_up_is_shown_nothing_beside_the_record(world: _World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "_MAX_QUEUED_EVENTS", 8)
    stream, other = await world.stream(), await world.stream()
    world.valkey.announce(world.add(3), [_transient(3, text) for text in "abc"])
    world.valkey.announce(world.add(20), [_transient(23, "d")])
    await _until(other, 23)
    assert stream._number == 8
    assert await _told(stream, 23) == [1, 2, 3, "a", *range(4, 24)]


async def test_what_is_shown_stays_behind_the_event_before_it_when_it_is_sent() -> None:
    other = ids.uuid7()
    theirs = log.Recorded(other, 1, _RUN, 1, "", "x", b"{}")
    told: list[announce.Told] = [
        _event(1),
        _transient(1),
        theirs,
        _transient(1, "more"),
        _event(2),
        theirs,
        _transient(1, user_id=other),
        _event(3),
    ]
    made = [_sent(fields)[1] for stream, fields in announce.entries(told) if stream == announce.partition(_USER)]
    assert [one for entry in made for one in entry if one.user_id == _USER] == [one for one in told if one.user_id == _USER]
    assert len(made) <= 3
    assert _sent(announce.encoded([]))[1] == []


class _Streams:
    """Valkey, which may be away."""

    def __init__(self) -> None:
        self.away = asyncio.Event()
        self.sent: asyncio.Queue[list[Any]] = asyncio.Queue()

    async def append(self, entries: Sequence[tuple[str, Mapping[bytes | str, bytes | str | int]]], *, keep: int) -> None:
        self.sent.put_nowait([one for _, fields in entries for one in _sent(fields)[1]])
        if self.away.is_set():
            raise errors.Unavailable

    async def trim(self, streams: Sequence[str], *, older_than_s: int) -> None:
        """Nothing is kept."""


async def test_what_is_not_recorded_is_dropped_while_valkey_is_away_or_much_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    missed: list[tuple[str, int]] = []
    monkeypatch.setattr(announce, "missed", lambda reason, number=1: missed.append((reason, number)))
    streams, tasks = _Streams(), lifecycle.Tasks()
    announcer = announce.Announcer(streams, 10)
    announcer.announce([_event(1)])
    announcer.show(_transient(1))
    tasks.spawn(announcer.run(), "announce")
    async with asyncio.timeout(5):
        assert await streams.sent.get() == [_event(1), _transient(1)]
        streams.away.set()
        announcer.show(_transient(1))
        announcer.announce([_event(2)])
        announcer.show(_transient(2))
        await streams.sent.get()
        streams.away.clear()
        big = _event(3, frame=b"x" * announce._BUSY_BYTES)
        announcer.announce([big])
        announcer.show(_transient(3))
        announcer.show(_transient(3, "busy"))
        await streams.sent.get()
        announcer.show(_transient(3, "again"))
        assert await streams.sent.get() == [_transient(3, "again")]
    assert missed == [("away", 2), ("busy", 1)]
    await tasks.close()


def _sent(fields: Mapping[Any, Any]) -> tuple[int, list[Any]]:
    """How big an entry is, and what comes out of it."""
    sent = {str(key).encode(): bytes(value) for key, value in fields.items()}
    events, transients = announce.decoded(sent)
    return sum(map(len, sent.values())), [*events, *transients]


def test_an_entry_is_bounded_in_bytes_and_bigger_frames_are_left_out() -> None:
    events = [_event(cursor, frame=b"{" + b" " * size + b"}") for cursor, size in enumerate([16_000] * 10 + [300_000] * 40 + [9], 1)]
    made = [_sent(fields) for _, fields in announce.entries(events)]
    assert [event.cursor for _, back in made for event in back] == [event.cursor for event in events]
    assert max(size for size, _ in made) < 72 * 1024
    assert [len(back) for _, back in made] == [4, 4, 32, 11]
    assert {len(event.frame) for _, back in made for event in back} == {16_002, 0, 11}
    shown = [_transient(1, "x" * 16_600)] * 10
    assert [len(_sent(fields)[1]) for _, fields in announce.entries(shown)] == [3, 3, 3, 1]


class _Told:
    """What is told of whether Valkey is heard."""

    def __init__(self) -> None:
        self.said: list[bool] = []
        self._changed = asyncio.Event()

    async def __call__(self, heard: bool) -> None:
        self.said.append(heard)
        self._changed.set()

    async def until(self, *said: bool) -> None:
        async with asyncio.timeout(5):
            while self.said != list(said):
                self._changed.clear()
                await self._changed.wait()


async def test_while_valkey_is_away_the_record_is_polled_and_that_is_told(world: _World) -> None:
    told = _Told()
    world.live._poll_s = 0.01
    world.tasks.spawn(world.live.watch(told), "watch")
    stream = await world.stream()
    world.valkey.announce(world.add(1))
    assert await _until(stream, 1) == [1]
    await told.until(False, True)
    world.valkey.entries.put_nowait(None)
    await told.until(False, True, False)
    world.add(5)
    assert await _until(stream, 6) == [2, 3, 4, 5, 6]
    world.valkey.announce([])
    await told.until(False, True, False, True)


async def test_an_announcement_that_was_lost_is_found_by_comparing(world: _World) -> None:
    world.live._compare_s = 0.05
    world.tasks.spawn(world.live.watch(_Told()), "watch")
    stream = await world.stream()
    world.valkey.announce([])
    world.add(3)
    assert await _until(stream, 3) == [1, 2, 3]


async def test_a_page_that_does_not_come_holds_up_nobody_else(world: _World) -> None:
    world.add(1)
    stream = await world.stream(after=0)
    held = asyncio.Event()
    whole = world.record.page

    async def late(*given: Any, **more: Any) -> log.Page:
        await held.wait()
        return await whole(*given, **more)

    world.record.page = late  # type: ignore[method-assign]
    async with asyncio.timeout(5):
        batches = stream.batches()
        assert [await anext(batches) for _ in range(2)] == [[], []]
    held.set()
    assert await _until(stream, 1) == [1]


async def test_who_is_replaced_by_a_backup_must_begin_again(world: _World) -> None:
    stream = await world.stream()
    world.record.id = "another"
    await world.live._compare()
    with pytest.raises(errors.Unavailable):
        await _until(stream, 1)


async def test_who_joins_while_the_record_is_replaced_must_join_again(world: _World, monkeypatch: pytest.MonkeyPatch) -> None:
    await world.stream()
    found, asked = world.record.positions, asyncio.Event()

    async def late(users: Iterable[str]) -> Mapping[str, log.Position]:
        asked.set()
        await asyncio.sleep(0.02)
        return await found(users)

    monkeypatch.setattr(world.record, "positions", late)
    joining = world.tasks.spawn(world.live.join([_USER]), "joining")
    await asked.wait()
    world.record.id = "another"
    monkeypatch.setattr(world.record, "positions", found)
    await world.live._compare()
    with pytest.raises(errors.Unavailable, match="replaced"):
        await joining
    stream = await world.stream()
    world.valkey.announce(world.add(1))
    assert await _until(stream, 1) == [1]


async def test_a_reader_of_one_run_looks_when_retention_has_taken_what_was_to_come(world: _World) -> None:
    world.add(2)
    stream = await world.stream(after=2, run_id=_RUN)
    reader = world.tasks.spawn(_parts(stream, 9), "reader")
    await asyncio.sleep(0.02)
    # the end of the run is dropped before anybody told of it; then another run goes on
    world.add(3)
    world.record.oldest = 6
    topic = world.live._topics[_USER]
    topic.last = 5
    world.valkey.announce(world.add(1, run_id=ids.uuid7()))
    await asyncio.sleep(0.05)
    world.valkey.announce(world.add(3))
    told = await reader
    assert told[0][0] == 6
    assert [cursor for _, cursors in told for cursor in cursors] == [7, 8, 9]


async def _parts(stream: feed.Stream, cursor: int) -> list[tuple[int, list[int]]]:
    """What a subscriber is told, up to a cursor: where the record begins now, and events."""
    told: list[tuple[int, list[int]]] = []
    async with asyncio.timeout(5):
        async for events in stream.batches():
            truncated_to = stream.take_truncated()
            if events or truncated_to:
                told.append((truncated_to, [event.cursor for event in events]))
            if events and events[-1].cursor >= cursor:
                break
    return told


@pytest.mark.parametrize("before", [0, 3])
async def test_what_is_dropped_before_it_was_told_is_said(world: _World, before: int) -> None:
    world.add(before)
    stream = await world.stream(after=0)
    reader = world.tasks.spawn(_parts(stream, before + 5), "reader")
    await asyncio.sleep(0.02)
    # nobody heard of these, and three of them are gone when somebody looks
    world.add(5)
    world.record.oldest = before + 4
    await world.live._compare()
    told = await reader
    assert told[-1] == (before + 4, [before + 4, before + 5])
    assert told[:-1] == ([(0, [1, 2, 3])] if before else [])


def _followed(tasks: lifecycle.Tasks) -> tuple[fanout.Topic, feed.Stream, feed.Follower]:
    unused: Any = None
    topic, stream = fanout.Topic(_USER), feed.Stream(unused, unused, tasks)
    topic.last = 0
    return topic, stream, stream.follow(topic, 0)


def _batches(stream: feed.Stream) -> list[list[int]]:
    found = []
    while batch := stream._queued():
        found.append([event.cursor for event in batch])
    return found


def test_of_events_that_come_together_those_that_have_room_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "_MAX_QUEUED_EVENTS", 5)
    topic, stream, follower = _followed(lifecycle.Tasks())
    topic.offer([_event(cursor) for cursor in range(1, 4)])
    topic.offer([_event(cursor) for cursor in range(4, 9)])
    assert (topic.last, follower.queued_to, follower.behind, follower.queued, stream._number) == (8, 5, True, 5, 5)
    assert _batches(stream) == [[1, 2, 3, 4, 5]]
    assert (follower.sent_to, follower.queued, stream._number, stream._bytes) == (5, 0, 0, 0)


def test_of_events_that_come_together_none_is_queued_beyond_the_bytes_that_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "_MAX_QUEUED_BYTES", 250)
    topic, stream, follower = _followed(lifecycle.Tasks())
    topic.offer([_event(cursor, frame=b"x" * 100) for cursor in range(1, 6)])
    # as one by one: the last one that is taken may pass the bound
    assert (follower.queued_to, follower.behind, stream._number, stream._bytes) == (3, True, 3, 300)
    assert _batches(stream) == [[1, 2, 3]]


def test_events_that_came_together_are_parted_where_a_batch_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "MAX_BATCH_EVENTS", 3)
    topic, stream, follower = _followed(lifecycle.Tasks())
    topic.offer([_event(1), _event(2)])
    topic.offer([_event(cursor) for cursor in range(3, 9)])
    assert _batches(stream) == [[1, 2, 3], [4, 5, 6], [7, 8]]
    monkeypatch.setattr(feed, "MAX_BATCH_BYTES", 250)
    topic.offer([_event(cursor, frame=b"x" * 100) for cursor in (9, 10, 11)])
    topic.offer([_event(12, frame=b"x" * 300), _event(13)])
    assert _batches(stream) == [[9, 10, 11], [12], [13]]
    assert (follower.sent_to, follower.queued, stream._number, stream._bytes) == (13, 0, 0, 0)


def test_of_events_that_come_together_none_behind_a_hole_is_sent() -> None:
    topic, stream, _ = _followed(lifecycle.Tasks())
    topic.offer([_event(1), _event(2), _event(4)])
    assert (topic.last, topic.target, _batches(stream)) == (2, 4, [[1, 2]])
    topic.offer([_event(2), _event(3), _event(4, frame=b""), _event(5)])
    assert (topic.last, topic.target, _batches(stream)) == (3, 5, [[3]])


def test_what_waits_to_be_shown_comes_in_its_place_among_events_that_come_together() -> None:
    topic, stream, _ = _followed(lifecycle.Tasks())
    topic.show(_transient(2))
    topic.offer([_event(cursor) for cursor in (1, 2, 3)])
    assert [event.cursor for event in stream._queued()] == [1, 2]
    assert stream.take_shown() == [_transient(2)]
    assert _batches(stream) == [[3]]


def test_what_is_queued_of_a_user_who_left_is_not_sent() -> None:
    topic, stream, follower = _followed(lifecycle.Tasks())
    topic.offer([_event(1), _event(2)])
    follower.gone = True
    assert _batches(stream) == []
    assert (stream._number, stream._bytes, follower.queued) == (0, 0, 0)
