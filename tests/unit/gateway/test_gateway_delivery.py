"""Live events and pages of the record become one stream: in order, without a hole, without a double."""

from __future__ import annotations

import json

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gateway import delivery


def _frame(cursor: int) -> bytes:
    return b"%d" % cursor


def _page(after: int, last: int, size: int, oldest: int = 1) -> delivery.Page:
    first = max(after + 1, oldest)
    cursors = range(first, min(last, first + size - 1) + 1)
    return delivery.Page(tuple((cursor, _frame(cursor)) for cursor in cursors), last, oldest)


def _taken(owed: delivery.Delivery) -> list[int]:
    found = []
    while (frame := owed.take()) is not None:
        found.append(int(frame))
    return found


def test_live_events_pass_in_order() -> None:
    owed = delivery.Delivery(3, 3, 10, 1000)
    for cursor in (4, 5, 6):
        owed.offer(cursor, _frame(cursor))
    assert _taken(owed) == [4, 5, 6]
    assert owed.sent == 6


def test_what_was_seen_is_dropped() -> None:
    owed = delivery.Delivery(3, 3, 10, 1000)
    for cursor in (2, 3, 4, 4):
        owed.offer(cursor, _frame(cursor))
    assert _taken(owed) == [4]


def test_a_gap_is_filled_from_the_record() -> None:
    owed = delivery.Delivery(0, 0, 10, 1000)
    owed.offer(3, _frame(3))
    assert owed.behind
    assert owed.fill(owed.generation, _page(0, 3, 100))
    owed.offer(4, _frame(4))
    assert _taken(owed) == [1, 2, 3, 4]


def test_a_slow_reader_is_bounded_and_fed_from_the_record() -> None:
    owed = delivery.Delivery(0, 0, 4, 1000)
    for cursor in range(1, 101):
        owed.offer(cursor, _frame(cursor))
    assert owed.behind
    assert _taken(owed) == [1, 2, 3, 4]
    seen = []
    while owed.behind:
        owed.fill(owed.generation, _page(owed.last, 100, 10))
        seen += _taken(owed)
    assert seen == list(range(5, 101))


def test_the_queue_is_bounded_in_bytes_but_takes_one_event_of_any_size() -> None:
    owed = delivery.Delivery(0, 0, 100, 10)
    owed.offer(1, b"x" * 50)
    owed.offer(2, b"x" * 50)
    assert (owed.last, owed.behind) == (1, True)


def test_a_rewind_drops_the_queue_and_a_page_on_its_way() -> None:
    owed = delivery.Delivery(5, 5, 10, 1000)
    owed.offer(6, _frame(6))
    before = owed.generation
    owed.rewind(0)
    owed.say(b"0")
    owed.fill(before, _page(6, 6, 10))
    assert owed.behind
    owed.fill(owed.generation, _page(0, 6, 10))
    assert _taken(owed) == [0, 1, 2, 3, 4, 5, 6]


def test_what_retention_took_is_said() -> None:
    owed = delivery.Delivery(2, 12, 10, 1000)
    owed.fill(owed.generation, _page(2, 12, 10, oldest=10))
    first = owed.take()
    assert first is not None
    assert json.loads(first) == {"type": "history_truncated", "oldest": 10}
    assert _taken(owed) == [10, 11, 12]


def test_after_stop_nothing_more_is_taken() -> None:
    owed = delivery.Delivery(0, 0, 10, 1000)
    owed.offer(1, _frame(1))
    owed.stop()
    owed.offer(2, _frame(2))
    assert _taken(owed) == [1]


class _Merge(RuleBasedStateMachine):
    """A record that grows, a tail that loses and repeats, a reader of any speed: the reader sees each event once, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.record = 0
        self.owed = delivery.Delivery(0, 0, 3, 1000)
        self.seen = 0

    @rule(count=st.integers(1, 6), heard=st.integers(0, 6))
    def append(self, count: int, heard: int) -> None:
        """The record grows; the tail tells of the first `heard` of it."""
        for index in range(count):
            self.record += 1
            if index < heard:
                self.owed.offer(self.record, _frame(self.record))

    @rule(back=st.integers(0, 5))
    def repeat(self, back: int) -> None:
        """The tail tells again."""
        if self.record > back:
            self.owed.offer(self.record - back, _frame(self.record - back))

    @rule()
    def rejoin(self) -> None:
        """The tail was opened again and says where the record stands."""
        self.owed.notice(self.record)

    @rule(size=st.integers(1, 4), stale=st.booleans())
    def page(self, size: int, stale: bool) -> None:
        """A page comes, perhaps read a while ago."""
        if self.owed.behind and self.owed.idle:
            self.owed.fill(self.owed.generation, _page(self.owed.last, self.record - int(stale and self.record > self.owed.tail), size))

    @rule(count=st.integers(1, 5))
    def read(self, count: int) -> None:
        """The socket takes some."""
        for _ in range(count):
            frame = self.owed.take()
            if frame is not None:
                assert int(frame) == self.seen + 1
                self.seen += 1

    @rule(after=st.integers(0, 30))
    def rewind(self, after: int) -> None:
        """RESUME."""
        after = min(after, self.owed.tail)
        self.owed.rewind(after)
        self.seen = after

    @invariant()
    def ends_complete(self) -> None:
        """Whoever is not behind has or will get everything the tail told of."""
        if not self.owed.behind:
            assert self.owed.last >= self.owed.tail


TestMerge = _Merge.TestCase
TestMerge.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
