"""Live events and pages of the record become one stream: in order, without a hole, without a double."""

from __future__ import annotations

import asyncio
import contextlib
import json

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway import delivery, envelope, subscriptions
from netra import errors
from tests.fixtures import ready

_RUN, _OTHER = "run-1", "run-2"
_HINT = delivery.Event(0, 1, _RUN, "", "agent_delta", envelope.text(b"77"))


def _event(cursor: int, payload: bytes = b"", run_id: str = _RUN, kind: str = "x") -> delivery.Event:
    return delivery.Event(cursor, 1, run_id, "thread", kind, envelope.text(payload or b"%d" % cursor))


def _said(event: delivery.Event | None) -> bytes:
    assert event is not None
    (payload,) = ready.payloads(event.wire)
    return payload


def _page(after: int, last: int, size: int, oldest: int = 1) -> delivery.Page:
    first = max(after + 1, oldest)
    cursors = range(first, min(last, first + size - 1) + 1)
    return delivery.Page(tuple(map(_event, cursors)), last, oldest)


def _taken(owed: delivery.Delivery) -> list[int]:
    found = []
    while (frame := owed.take()) is not None:
        found.append(int(_said(frame)))
    return found


def test_live_events_pass_in_order() -> None:
    owed = delivery.Delivery(3, 3, 10, 1000)
    for cursor in (4, 5, 6):
        owed.offer(_event(cursor))
    assert _taken(owed) == [4, 5, 6]
    assert owed.sent == 6


def test_what_was_seen_is_dropped() -> None:
    owed = delivery.Delivery(3, 3, 10, 1000)
    for cursor in (2, 3, 4, 4):
        owed.offer(_event(cursor))
    assert _taken(owed) == [4]


def test_a_gap_is_filled_from_the_record() -> None:
    owed = delivery.Delivery(0, 0, 10, 1000)
    owed.offer(_event(3))
    assert owed.behind
    assert owed.fill(owed.generation, _page(0, 3, 100))
    owed.offer(_event(4))
    assert _taken(owed) == [1, 2, 3, 4]


def test_a_slow_reader_is_bounded_and_fed_from_the_record() -> None:
    owed = delivery.Delivery(0, 0, 4, 1000)
    for cursor in range(1, 101):
        owed.offer(_event(cursor))
    assert owed.behind
    assert _taken(owed) == [1, 2, 3, 4]
    seen = []
    while owed.behind:
        owed.fill(owed.generation, _page(owed.last, 100, 10))
        seen += _taken(owed)
    assert seen == list(range(5, 101))


def test_the_queue_is_bounded_in_bytes_but_takes_one_event_of_any_size() -> None:
    owed = delivery.Delivery(0, 0, 100, 10)
    owed.offer(_event(1, b"x" * 50))
    owed.offer(_event(2, b"x" * 50))
    assert (owed.last, owed.behind) == (1, True)


def test_a_rewind_drops_the_queue_and_a_page_on_its_way() -> None:
    owed = delivery.Delivery(5, 5, 10, 1000)
    owed.offer(_event(6))
    before = owed.generation
    owed.rewind(0)
    owed.say(b"0")
    # not a reason to wait: another page is asked for at once
    assert owed.fill(before, _page(6, 6, 10))
    assert owed.behind
    owed.fill(owed.generation, _page(0, 6, 10))
    assert _taken(owed) == [0, 1, 2, 3, 4, 5, 6]


def test_what_retention_took_is_said() -> None:
    owed = delivery.Delivery(2, 12, 10, 1000)
    owed.fill(owed.generation, _page(2, 12, 10, oldest=10))
    assert json.loads(_said(owed.take())) == {"type": "history_truncated", "oldest": 10}
    assert _taken(owed) == [10, 11, 12]


def test_after_stop_nothing_more_is_taken() -> None:
    owed = delivery.Delivery(0, 0, 10, 1000)
    owed.offer(_event(1))
    owed.stop()
    owed.offer(_event(2))
    assert _taken(owed) == [1]


def _filtered(run_id: str = _RUN, last: int = 0, most: int = 10) -> delivery.Delivery:
    owed = delivery.Delivery(last, last, most, 100_000)
    owed.filter.add(subscriptions.Subscription("s1", run_id=run_id))
    return owed


def _frames(owed: delivery.Delivery) -> list[object]:
    """Events as their cursors, the rest as it is."""
    found: list[object] = []
    while (frame := owed.take()) is not None:
        found.append(json.loads(_said(frame)))
    return found


def test_what_is_skipped_is_told_before_the_next_event() -> None:
    owed = _filtered()
    for cursor, run_id in enumerate([_RUN, _OTHER, _OTHER, _RUN, _RUN], 1):
        owed.offer(_event(cursor, run_id=run_id))
    assert _frames(owed) == [1, {"type": "position", "cursor": 3}, 4, 5]
    assert owed.sent == 5


def test_what_is_skipped_is_told_when_it_is_many_and_when_time_has_passed() -> None:
    owed = _filtered()
    for cursor in range(1, 301):
        owed.offer(_event(cursor, run_id=_OTHER))
    assert _frames(owed) == [{"type": "position", "cursor": 256}]
    owed.tick()
    assert _frames(owed) == [{"type": "position", "cursor": 300}]
    owed.tick()
    assert _frames(owed) == []


def test_positions_of_a_reader_that_takes_nothing_are_one() -> None:
    owed = _filtered()
    for cursor in range(1, 10_001):
        owed.offer(_event(cursor, run_id=_OTHER))
    owed.tick()
    assert _frames(owed) == [{"type": "position", "cursor": 10_000}]


def test_a_rewound_socket_keeps_its_filter_and_pages_are_skipped_through() -> None:
    owed = _filtered(last=6)
    owed.rewind(0)
    owed.fill(owed.generation, delivery.Page(tuple(_event(n, run_id=_RUN if n == 5 else _OTHER) for n in range(1, 7)), 6, 1))
    assert not owed.behind
    assert _frames(owed) == [{"type": "position", "cursor": 4}, 5]
    owed.stop()
    assert _frames(owed) == [{"type": "position", "cursor": 6}]


def test_without_its_last_subscription_a_socket_has_everything_again() -> None:
    owed = _filtered()
    owed.offer(_event(1, run_id=_OTHER))
    owed.filter.remove("s1")
    owed.offer(_event(2, run_id=_OTHER))
    assert _frames(owed) == [{"type": "position", "cursor": 1}, 2]


def test_a_hint_is_shown_in_its_place_and_dropped_for_who_does_not_keep_up() -> None:
    owed = delivery.Delivery(0, 0, 4, 1000)
    owed.offer(_event(1))
    owed.hint(_HINT, 1)
    owed.offer(_event(2))
    owed.hint(_HINT, 2)
    assert (_taken(owed), owed.sent) == ([1, 77, 2], 2)
    owed.notice(9)
    owed.hint(_HINT, 2)
    assert _taken(owed) == []


def test_a_hint_is_for_who_has_what_is_before_it_and_nothing_after_it() -> None:
    owed = delivery.Delivery(4, 4, 10, 1000)
    for after in (3, 4, 5):
        owed.hint(delivery.Event(0, 1, _RUN, "", "agent_delta", envelope.text(b"%d0" % after)), after)
    assert _taken(owed) == [40]
    owed.stop()
    owed.hint(_HINT, 4)
    assert _taken(owed) == []


def test_a_hint_makes_room_for_what_is_in_the_record() -> None:
    owed = delivery.Delivery(0, 0, 4, 1000)
    owed.offer(_event(1))
    owed.hint(_HINT, 1)
    for cursor in (2, 3, 4):
        owed.offer(_event(cursor))
    assert not owed.behind
    assert owed._bytes == sum(len(_event(cursor).wire) for cursor in (1, 2, 3, 4))
    owed.offer(_event(5))
    assert owed.behind
    assert _taken(owed) == [1, 2, 3, 4]


def test_a_hint_of_a_type_that_is_not_wanted_is_not_shown() -> None:
    owed = delivery.Delivery(0, 0, 10, 1000)
    owed.filter.add(subscriptions.Subscription("s", types=frozenset({"x"})))
    owed.hint(_HINT, 0)
    assert _taken(owed) == []
    owed.filter.add(subscriptions.Subscription("s", types=frozenset({"agent_delta"})))
    owed.offer(_event(1))
    owed.hint(_HINT, 1)
    assert (_taken(owed), owed.sent) == ([77], 0)


def test_a_stream_and_events_take_turns() -> None:
    owed = delivery.Delivery(0, 0, 100, 1000)
    for cursor in (1, 2, 3):
        owed.offer(_event(cursor))
        owed.stream("s", b"%d" % (cursor * 10))
    owed.say(b"0")
    assert _taken(owed) == [0, 1, 10, 2, 20, 3, 30]


async def test_a_stream_waits_for_room_of_its_own() -> None:
    owed = delivery.Delivery(0, 0, 100, 1000)
    sent: list[int] = []
    async with asyncio.timeout(2), asyncio.TaskGroup() as group:

        async def put() -> None:
            while len(sent) < 10 and await owed.room("s"):
                owed.stream("s", b"%d" % len(sent))
                sent.append(len(sent))

        putting = group.create_task(put())
        await asyncio.sleep(0)
        assert len(sent) < 10
        assert await owed.room("another")
        while not putting.done():
            _taken(owed)
            await asyncio.sleep(0)
    owed.end()
    assert not await owed.room("s")


async def test_whoever_waits_goes_on_when_nobody_sends_any_more() -> None:
    owed = delivery.Delivery(0, 0, 100, 1000)
    for number in range(10):
        owed.say(b"%d" % number)
        owed.stream("s", b"%d" % number)
    async with asyncio.timeout(2), asyncio.TaskGroup() as group:
        quiet, room = group.create_task(owed.quiet()), group.create_task(owed.room("s"))
        await asyncio.sleep(0)
        assert not quiet.done()
        assert not room.done()
        owed.end()
    assert room.result() is False


@pytest.mark.parametrize(
    ("wanted", "covered"),
    [
        (subscriptions.Subscription("s"), True),
        (subscriptions.Subscription("s", run_id=_RUN), True),
        (subscriptions.Subscription("s", run_id=_OTHER), False),
        (subscriptions.Subscription("s", thread_id="t"), True),
        (subscriptions.Subscription("s", thread_id="t", run_id=_OTHER), False),
        (subscriptions.Subscription("s", types=frozenset({"x", "y"})), True),
        (subscriptions.Subscription("s", run_id=_RUN, types=frozenset({"y"})), False),
    ],
)
def test_a_subscription_covers_what_fits_all_it_names(wanted: subscriptions.Subscription, covered: bool) -> None:
    assert wanted.covers(_RUN, "t", "x") is covered


def test_subscriptions_are_a_union_with_a_limit() -> None:
    mine = subscriptions.Subscriptions()
    for number in range(subscriptions.MAX_SUBSCRIPTIONS):
        mine.add(subscriptions.Subscription(f"s{number}", run_id=f"r{number}"))
    assert mine.wants("r3", "", "x")
    assert not mine.wants("r99", "", "x")
    with pytest.raises(errors.QuotaExceeded):
        mine.add(subscriptions.Subscription("one more"))
    mine.add(subscriptions.Subscription("s3", run_id="r99"))
    assert (mine.wants("r99", "", "x"), mine.wants("r3", "", "x")) == (True, False)
    with pytest.raises(errors.NotFound):
        mine.remove("unknown")


class _Noted(subscriptions.Subscriptions):
    """Remembers what was not wanted; the thread of an event is its cursor here."""

    def __init__(self, skipped: set[int]) -> None:
        super().__init__()
        self.skipped = skipped

    def wants(self, run_id: str, thread_id: str, kind: str) -> bool:
        wanted = super().wants(run_id, thread_id, kind)
        if not wanted:
            self.skipped.add(int(thread_id))
        return wanted


class _Merge(RuleBasedStateMachine):
    """A record that grows and loses its beginning, a tail that loses and repeats, filters that change, a reader of any speed that
    comes back now and then: it sees each event it wants once, in order, and knows at each moment how far it is."""

    def __init__(self) -> None:
        super().__init__()
        self.runs: list[str] = []
        self.oldest = 1
        self._connect(0)

    def _connect(self, after: int) -> None:
        self.skipped: set[int] = set()
        self.owed = delivery.Delivery(after, self.record, 3, 1000)
        self.owed.filter = _Noted(self.skipped)
        self.seen = after

    @property
    def record(self) -> int:
        return len(self.runs)

    def _event(self, cursor: int) -> delivery.Event:
        return delivery.Event(cursor, 1, self.runs[cursor - 1], str(cursor), "x", envelope.text(b"%d" % cursor))

    def _read_one(self) -> bool:
        event = self.owed.take()
        if event is None:
            return False
        said = json.loads(_said(event))
        if event.type == "x":
            assert said == event.cursor == self.seen + 1
            self.seen = said
        elif event.type == "position":
            assert set(range(self.seen + 1, said["cursor"] + 1)) <= self.skipped
            assert said["cursor"] > self.seen
            self.seen = said["cursor"]
        elif event.type == "history_truncated":
            assert self.seen + 1 < said["oldest"] <= self.oldest
            self.seen = said["oldest"] - 1
        elif event.type == "agent_delta":
            # nothing that follows it was seen, and nothing that is wanted is missing before it
            assert self.seen <= said
            assert set(range(self.seen + 1, said + 1)) <= self.skipped
            return True
        assert self.owed.sent == self.seen
        return True

    @rule(runs=st.lists(st.sampled_from([_RUN, _OTHER]), min_size=1, max_size=6), heard=st.integers(0, 6))
    def append(self, runs: list[str], heard: int) -> None:
        """The record grows; the tail tells of the first `heard` of it."""
        for index, run_id in enumerate(runs):
            self.runs.append(run_id)
            if index < heard:
                self.owed.offer(self._event(self.record))

    @rule(back=st.integers(0, 5))
    def repeat(self, back: int) -> None:
        """The tail tells again."""
        if self.record > back:
            self.owed.offer(self._event(self.record - back))

    @rule()
    def rejoin(self) -> None:
        """The tail was opened again and says where the record stands."""
        self.owed.notice(self.record)

    @rule(ago=st.integers(-1, 2))
    def hint(self, ago: int) -> None:
        """Something that is not in the record, shown at the end of it, or before."""
        after = max(self.record - ago, 0)
        self.owed.hint(delivery.Event(0, 1, _RUN, "0", "agent_delta", envelope.text(b"%d" % after)), after)

    @rule(many=st.integers(1, 8))
    def retention(self, many: int) -> None:
        """The record loses its oldest events."""
        self.oldest = min(self.oldest + many, self.record + 1)

    @rule(run_id=st.sampled_from([_RUN, _OTHER]))
    def subscribe(self, run_id: str) -> None:
        """One run, or one more."""
        self.owed.filter.add(subscriptions.Subscription(run_id, run_id=run_id))

    @rule()
    def unsubscribe(self) -> None:
        """No filter any more."""
        for run_id in (_RUN, _OTHER):
            with contextlib.suppress(errors.NotFound):
                self.owed.filter.remove(run_id)

    @rule()
    def tick(self) -> None:
        """Time passes."""
        self.owed.tick()

    @rule(size=st.integers(1, 4), stale=st.booleans())
    def page(self, size: int, stale: bool) -> None:
        """A socket that has been sent all that waited gets a page, perhaps read a while ago."""
        while self.owed.behind and self._read_one():
            pass
        if self.owed.behind:
            last = self.record - int(stale and self.record > self.owed.tail)
            first = max(self.owed.last + 1, self.oldest)
            events = tuple(map(self._event, range(first, min(last, first + size - 1) + 1)))
            self.owed.fill(self.owed.generation, delivery.Page(events, last, self.oldest))

    @rule(count=st.integers(1, 5))
    def read(self, count: int) -> None:
        """The socket takes some."""
        for _ in range(count):
            self._read_one()

    @rule(after=st.integers(0, 30))
    def rewind(self, after: int) -> None:
        """RESUME."""
        self.seen = min(after, self.owed.tail)
        self.owed.rewind(self.seen)

    @rule(wiped=st.booleans())
    def reconnect(self, wiped: bool) -> None:
        """The gateway drains, and the client resumes at another; or the record is another one, and it starts anew."""
        self.owed.stop()
        self.owed.offer(delivery.Event(self.owed.last + 1, 1, _RUN, "0", "x", envelope.text(b"-1")))
        while self._read_one():
            pass
        assert self.seen == self.owed.last
        if wiped:
            self.runs, self.oldest, self.seen = [], 1, 0
        self._connect(self.seen)

    @invariant()
    def ends_complete(self) -> None:
        """Whoever is not behind has or will get everything the tail told of."""
        if not self.owed.behind:
            assert self.owed.last >= self.owed.tail

    @invariant()
    def bounded(self) -> None:
        """At most as many events as may wait, each with one position before it."""
        assert len(self.owed._events) <= 2 * 3 + 4


TestMerge = _Merge.TestCase
TestMerge.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
