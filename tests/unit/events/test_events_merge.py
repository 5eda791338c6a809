"""Record and live tail, merged: whatever comes in whatever order, each reader sees what the record holds, or is told what is gone."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from chassis import lifecycle
from netra import errors, ids
from services.events import announce, fanout, feed, log

T = TypeVar("T")
_USER = ids.uuid7()
_RUNS = (ids.uuid7(), ids.uuid7())
_ROUNDS = 20
SHOWN: list[log.Transient] = []


class _Page:
    """A page that was asked for. It may tell how things were then, or how they are when it is answered."""

    def __init__(self, record: _Record, after: int, limit: int, run_id: str) -> None:
        self._record, self._asked = record, (after, limit, run_id)
        self.then = record.read(*self._asked)
        self.answer: asyncio.Future[log.Page] = asyncio.get_running_loop().create_future()

    def give(self, stale: bool) -> None:
        if not self.answer.done():
            self.answer.set_result(self.then if stale else self._record.read(*self._asked))

    def refuse(self) -> None:
        if not self.answer.done():
            self.answer.set_exception(errors.Unavailable())


class _Record:
    """The record, whose pages are answered when the test wants."""

    def __init__(self) -> None:
        self.events: list[log.Recorded] = []
        self.oldest = 1
        self.id = 0
        self.asked: list[_Page] = []

    def append(self, run_id: str) -> None:
        cursor = len(self.events) + 1
        self.events.append(log.Recorded(_USER, cursor, run_id, cursor, "", "agent_thinking", b'{"of":%d}' % self.id))

    def read(self, after: int, limit: int, run_id: str) -> log.Page:
        start, last = max(after, self.oldest - 1), len(self.events)
        position = log.Position(last, self.oldest)
        if last <= start:
            return log.Page([], max(after, last), position)
        found = [event for event in self.events[start:] if run_id in ("", event.run_id)]
        whole = len(found) < limit
        return log.Page(found[:limit], last if whole else found[limit - 1].cursor, position)

    async def page(self, user_id: str, after: int, *, limit: int, max_bytes: int, run_id: str = "") -> log.Page:
        page = _Page(self, after, limit, run_id)
        self.asked.append(page)
        return await page.answer

    async def positions(self, users: Iterable[str]) -> Mapping[str, log.Position]:
        return {user: log.Position(len(self.events), self.oldest) for user in users}

    async def generation(self) -> str:
        return str(self.id)


class _Reader:
    """Checks what it is given against the record, and takes more only when it is let."""

    def __init__(self, record: _Record, stream: feed.Stream, after: int, run_id: str, *, told: bool) -> None:
        self.record, self.stream, self.run_id = record, stream, run_id
        self.at = after
        # the pump of a gateway sees for itself that a cursor is missing; 0 is wherever the record begins
        self._told_all, self._may_skip = told, not told or after == 0
        self.go = asyncio.Event()
        self.ended = False

    async def run(self) -> None:
        try:
            async for events in self.stream.batches():
                self._told(self.stream.take_truncated())
                for event in events:
                    self._saw(event)
                shown = self.stream.take_shown()
                for transient in shown:
                    self._was_shown(transient)
                if events or shown:
                    await self.go.wait()
                    self.go.clear()
        except errors.Unavailable:
            self.ended = True

    def _told(self, truncated_to: int) -> None:
        if truncated_to:
            assert self.at + 1 < truncated_to <= self.record.oldest
            self.at = truncated_to - 1

    def _saw(self, event: log.Recorded) -> None:
        assert event == self.record.events[event.cursor - 1]
        assert event.cursor > self.at
        missed = self.owed(self.at, event.cursor - 1)
        assert not missed or (self._may_skip and missed[-1] < self.record.oldest)
        self.at = event.cursor
        self._may_skip = not self._told_all

    def _was_shown(self, transient: log.Transient) -> None:
        """It comes after all that is before it, but for what is gone, and before anything else."""
        assert transient.run_id in ("", self.run_id) or not self.run_id
        assert self.at <= transient.cursor
        missed = self.owed(self.at, transient.cursor)
        assert not missed or (self._may_skip and missed[-1] < self.record.oldest)
        SHOWN.append(transient)

    def owed(self, after: int, to: int) -> list[int]:
        return [event.cursor for event in self.record.events[after:to] if self.run_id in ("", event.run_id)]


class Merge(RuleBasedStateMachine):
    """One user, one record, one process that tells some readers."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.failures: list[BaseException] = []
        self.tasks = lifecycle.Tasks(on_failure=self.failures.append)
        self.record = _Record()
        unused: Any = None
        self.live = fanout.Fanout(unused, self.record, self.record, self.tasks, 60, 60)
        self.readers: list[_Reader] = []

    def do(self, work: Any) -> Any:
        """Run it, and all that follows from it."""
        result = self.loop.run_until_complete(work)
        self.loop.run_until_complete(_settled())
        return result

    @initialize(back=st.integers(0, 4))
    def start(self, back: int) -> None:
        self.append([*_RUNS, *_RUNS])
        self.begin(back, "")
        self.flow()

    @rule(runs=st.lists(st.sampled_from(_RUNS), min_size=1, max_size=5))
    def append(self, runs: list[str]) -> None:
        for run_id in runs:
            self.record.append(run_id)

    @rule(back=st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=8))
    def announce(self, back: list[tuple[int, bool]]) -> None:
        """Some of the latest events: several times, not at all, in any order, without their frames."""

        async def told() -> None:
            for ago, big in back:
                if ago <= len(self.record.events):
                    event = self.record.events[-ago]
                    fields = announce.encoded([dataclasses.replace(event, frame=b"") if big else event])
                    self.live._dispatch({str(key).encode(): bytes(value) for key, value in fields.items()})  # type: ignore[arg-type]

        self.do(told())

    @rule(ahead=st.integers(-2, 2), run_id=st.sampled_from(_RUNS))
    def show(self, ahead: int, run_id: str) -> None:
        """Something that is not recorded, about when what is before it was told of."""
        topic = self.live._topics.get(_USER)
        cursor = min((topic.last if topic is not None else 0) + ahead, len(self.record.events))

        async def told() -> None:
            fields = announce.encoded([], [log.Transient(_USER, cursor, run_id, cursor, "", "agent_delta", b"{}")])
            self.live._dispatch({str(key).encode(): bytes(value) for key, value in fields.items()})  # type: ignore[arg-type]

        if cursor > 0:
            self.do(told())

    @rule(runs=st.lists(st.sampled_from(_RUNS), min_size=1, max_size=3), ahead=st.integers(-1, 0))
    def go_on(self, runs: list[str], ahead: int) -> None:
        """Everybody has read what there was; then an event is told of at a time, and something is shown between them."""
        for _ in range(3):
            self.flow()
        for run_id in runs:
            self.record.append(run_id)
            self.announce([(1, False)])
            self.show(ahead, run_id)

    @rule()
    def compare(self) -> None:
        self.do(self.live._compare())

    @rule(which=st.integers(0, 5), how=st.sampled_from(["now", "stale", "away"]))
    def answer(self, which: int, how: str) -> None:
        if not self.record.asked:
            return
        page = self.record.asked.pop(which % len(self.record.asked))

        async def answered() -> None:
            page.refuse() if how == "away" else page.give(how == "stale")

        self.do(answered())

    @rule(which=st.integers(0, 5))
    def read(self, which: int) -> None:
        async def let() -> None:
            if self.readers:
                self.readers[which % len(self.readers)].go.set()

        self.do(let())

    @rule()
    def flow(self) -> None:
        """All that was asked is answered, and everybody reads."""
        for _ in range(len(self.record.asked)):
            self.answer(0, "now")
        for which in range(len(self.readers)):
            self.read(which)

    @precondition(lambda self: len(self.readers) < 3)
    @rule(back=st.none() | st.integers(0, 12), run_id=st.sampled_from(["", *_RUNS]))
    def begin(self, back: int | None, run_id: str) -> None:
        """A reader from some cursor on; or one that is told of what happens from now on."""

        async def begun() -> None:
            stream = feed.Stream(self.live, self.record, self.tasks)
            topic, position = (await self.live.join([_USER]))[_USER]
            if back is None:
                after = max(topic.last, position.last)
                stream.follow(topic, after)
            else:
                after = max(position.last - back, 0)
                after = after if after == 0 or after >= position.oldest - 1 else position.oldest - 1
                stream.follow(topic, after, behind=True, run_id=run_id)
            reader = _Reader(self.record, stream, after, "" if back is None else run_id, told=back is not None)
            self.readers.append(reader)
            self.tasks.spawn(reader.run(), "reader")

        self.do(begun())

    @precondition(lambda self: self.readers)
    @rule(which=st.integers(0, 5), really=st.integers(0, 3))
    def leave(self, which: int, really: int) -> None:
        if really != 3:
            return
        reader = self.readers.pop(which % len(self.readers))
        reader.stream.end()
        reader.stream.close()

    @rule(lost=st.lists(st.sampled_from(_RUNS), max_size=3), kept=st.integers(0, 12))
    def truncate(self, lost: list[str], kept: int) -> None:
        """Drop the oldest events, perhaps such that nobody was told of."""
        self.append(lost)
        self.record.oldest = max(self.record.oldest, len(self.record.events) + 1 - kept)

    @rule(kept=st.integers(0, 8), really=st.integers(0, 3))
    def restore(self, kept: int, really: int) -> None:
        """A backup takes the place of the record; all readers are told to begin again."""
        if really != 3:
            return
        old, readers = self.record, self.readers
        self.record.events = self.record.events[:kept]
        self.record.oldest = min(old.oldest, len(self.record.events) + 1)
        self.record.id += 1
        self.record.events = [dataclasses.replace(event, frame=b'{"of":%d}' % self.record.id) for event in self.record.events]
        for page in self.record.asked:
            page.refuse()
        self.record.asked = []

        async def told() -> None:
            await self.live._compare()
            for reader in readers:
                reader.go.set()

        known = self.live.generation
        self.do(told())
        if known:
            assert all(reader.ended for reader in readers)
        for reader in readers:
            reader.stream.close()
        self.readers = []

    @rule()
    def rest(self) -> None:
        """When all is answered and read, all is seen."""
        for _ in range(200):
            self.compare()
            while self.record.asked:
                self.answer(0, "now")
            for which in range(len(self.readers)):
                self.read(which)
            if not self.record.asked and not any(reader.go.is_set() is False and self._due(reader) for reader in self.readers):
                break
        assert [self._due(reader) for reader in self.readers] == [[]] * len(self.readers)

    def _due(self, reader: _Reader) -> list[int]:
        return [cursor for cursor in reader.owed(reader.at, len(self.record.events)) if cursor >= self.record.oldest]

    @invariant()
    def nothing_failed_and_little_is_held(self) -> None:
        assert self.failures == []
        assert all(reader.stream._number <= feed._MAX_QUEUED_EVENTS for reader in self.readers)

    def teardown(self) -> None:
        self.rest()
        self.nothing_failed_and_little_is_held()
        for reader in self.readers:
            reader.stream.close()
        self.loop.run_until_complete(self.tasks.close())
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


async def _settled() -> None:
    for _ in range(_ROUNDS):
        await asyncio.sleep(0)


def test_each_reader_sees_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name, value in [
        (feed, "MAX_BATCH_EVENTS", 3), (feed, "_MAX_QUEUED_EVENTS", 4), (feed, "_MAX_HELD_EVENTS", 2), (feed, "_RETRY_S", 0),
        (fanout, "_PAGE_EVENTS", 3), (fanout, "_RETRY_S", 0),
    ]:  # fmt: skip
        monkeypatch.setattr(module, name, value)
    SHOWN.clear()
    run_state_machine_as_test(Merge, settings=settings(max_examples=30, stateful_step_count=30, deadline=None, derandomize=True))
    # not all of them come too late
    assert len(SHOWN) > 20
