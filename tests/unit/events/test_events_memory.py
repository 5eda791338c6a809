"""What a writer guesses of the rows it saw: only what simply goes on, and nothing of what it forgot."""

from __future__ import annotations

import dataclasses
import time
from datetime import UTC, datetime, timedelta

import pytest

from netra import ids
from netra.events.v1 import events_pb2
from services.events import frames, heads, ledger, log, memory

_NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
_USER, _THREAD = ids.uuid7(), ids.uuid7()
_RUNS = sorted(ids.uuid7() for _ in range(3))


def _head(run_id: str = _RUNS[0], user_id: str = _USER) -> ledger.Head:
    shared = frames.envelope(user_id=user_id, thread_id=_THREAD, run_id=run_id, request_id="r", correlation_id="c", trace_id="t")
    return ledger.Head(run_id, user_id, _THREAD, shared, "free", _NOW, 1, 1, b"", 0, 0, _NOW, False, "")


def _known(*heads: ledger.Head) -> memory.Memory:
    known = memory.Memory()
    known.of("g1", _NOW, time.monotonic())
    for head in heads or (_head(),):
        known.opened(head, ledger.Cursor(7, _NOW))
    return known


def _append(first_seq: int = 1, *, run_id: str = _RUNS[0], epoch: int = 1, end: bool = False, steps: bool = False) -> log.Append:
    events = [] if steps else [events_pb2.NewEvent(event_id=ids.uuid7(), type="agent_thinking", data=b"{}")]
    made = [events_pb2.Step(key="s1", result=b"1")] if steps else []
    return log.checked(events_pb2.AppendRequest(run_id=run_id, epoch=epoch, first_seq=first_seq, events=events, steps=made, end=end))


def _guessed(known: memory.Memory, *appends: log.Append) -> tuple[ledger.Ledger, memory.Seen]:
    guess = known.guess(appends)
    assert guess is not None
    return guess


def test_what_goes_on_is_guessed_and_goes_on_from_there_once_it_is_written() -> None:
    known = _known()
    book, seen = _guessed(known, _append(1), _append(2, steps=True), _append(2))
    assert [outcome.last_cursor for outcome in book.outcomes] == [8, 8, 9]
    assert (seen.generation, list(seen.cursors)) == ("g1", [(_USER, 7, _NOW)])
    assert list(seen.heads) == [(_RUNS[0], 1, 1, 0, _NOW, b"")]
    known.written(book)
    _, seen = _guessed(known, _append(3))
    assert seen.heads[0][:4] == (_RUNS[0], 1, 3, 9)
    assert seen.cursors[0][:2] == (_USER, 9)


def _first(run_id: str = _RUNS[1], user_id: str = _USER, *, epoch: int = 1) -> log.Append:
    """An append that opens its run."""
    opens = heads.NewHead(run_id, user_id, ids.uuid7(), _THREAD, "r", "c", "t", "free", None)
    return dataclasses.replace(_append(1, run_id=run_id, epoch=epoch), opens=opens)


def test_a_run_that_is_opened_and_was_not_seen_is_guessed_to_be_new() -> None:
    known = _known()
    assert known.cold([_first(), _append(1)]) == []
    book, seen = _guessed(known, _append(1), _first(epoch=3))
    assert [outcome.last_cursor for outcome in book.outcomes] == [8, 9]
    # there is no row of it that could be another
    assert [row[0] for row in seen.heads] == [_RUNS[0]]
    assert list(book.new) == [_RUNS[1]]
    made = book.heads[_RUNS[1]]
    assert (made.epoch, made.next_seq, made.last_cursor, made.shared) == (3, 2, 9, _head(_RUNS[1]).shared)
    assert made.opened_at <= made.last_at
    known.written(book)
    book, seen = _guessed(known, _append(2, run_id=_RUNS[1], epoch=3))
    assert (book.new, seen.heads[0][:4]) == ({}, (_RUNS[1], 3, 2, 9))


def test_a_run_that_is_opened_and_whose_users_cursor_was_not_seen_is_opened_before() -> None:
    known, append = _known(), _first(user_id=ids.uuid7())
    assert known.cold([_append(1), append]) == [append]
    assert known.guess([append]) is None


@pytest.mark.parametrize("other", [_first(_RUNS[0], ids.uuid7()), _first(_RUNS[0], epoch=2)], ids=["user", "epoch"])
def test_a_run_that_was_seen_is_not_opened_for_another(other: log.Append) -> None:
    known = _known()
    known.have_cursor([_USER])
    assert known.guess([other]) is None


def test_what_opened_a_run_before_is_looked_up() -> None:
    known, first = _known(), _first()
    known.written(_guessed(known, first)[0])
    assert known.guess([first]) is None
    # nor is it guessed twice at once
    assert _known().guess([first, first]) is None


def test_rows_are_named_in_the_order_of_the_locks() -> None:
    users = [ids.uuid7() for _ in range(3)]
    known = _known(*(_head(run, user) for run, user in zip(_RUNS, reversed(users), strict=True)))
    _, seen = _guessed(known, *(_append(run_id=run) for run in reversed(_RUNS)))
    assert [user for user, _, _ in seen.cursors] == sorted(users)
    assert [row[0] for row in seen.heads] == _RUNS


def test_nothing_is_guessed_of_what_was_not_seen() -> None:
    assert memory.Memory().guess([_append()]) is None
    assert _known().guess([_append(), _append(run_id=_RUNS[1])]) is None


@pytest.mark.parametrize(
    "append", [_append(2), _append(1, epoch=2), _append(1, epoch=0)], ids=["gap", "higher epoch", "lower epoch"]
)  # fmt: skip
def test_what_does_not_simply_go_on_is_looked_up(append: log.Append) -> None:
    assert _known().guess([append]) is None


def test_what_was_sent_before_is_looked_up() -> None:
    first, steps = _append(1), _append(2, steps=True)
    for again in (first, steps):
        known = _known()
        known.written(_guessed(known, first, steps)[0])
        assert known.guess([again]) is None


def test_nothing_is_guessed_after_an_end() -> None:
    known = _known()
    assert known.guess([_append(1, end=True), _append(2)]) is None
    known = _known()
    known.written(_guessed(known, _append(1, end=True))[0])
    assert known.guess([_append(2)]) is None


def test_what_was_guessed_and_not_written_is_forgotten() -> None:
    known = _known()
    _guessed(known, _append(1))
    assert known.guess([_append(1)]) is None


def test_who_keeps_the_book_keeps_what_was_written() -> None:
    known = _known()
    book = _guessed(known, _append(1))[0]
    known.written(book)
    _guessed(known, _append(2))
    assert (book.heads[_RUNS[0]].next_seq, book.cursors[_USER].last) == (2, 8)
    book.heads[_RUNS[0]].epoch = 5


def test_steps_alone_leave_the_time_of_the_users_record_where_it_is() -> None:
    known = _known()
    book = _guessed(known, _append(1, steps=True))[0]
    assert book.cursors[_USER] == ledger.Cursor(7, _NOW)
    assert book.moved == {}
    assert book.heads[_RUNS[0]].last_at >= _NOW


def test_another_generation_of_the_record_is_another_record() -> None:
    known = _known()
    book = _guessed(known, _append(1))[0]
    known.written(book)
    assert known.unmarked(book) == {}
    known.of("g2", _NOW, time.monotonic())
    assert known.unmarked(book) == book.marks
    assert known.guess([_append(2)]) is None


def test_an_opening_that_looked_earlier_does_not_take_back_the_cursor() -> None:
    known = _known()
    known.written(_guessed(known, _append(1))[0])
    known.opened(_head(_RUNS[1]), ledger.Cursor(7, _NOW))
    assert _guessed(known, _append(1, run_id=_RUNS[1]))[1].cursors[0][:2] == (_USER, 8)


def test_after_guesses_that_were_wrong_it_looks_longer_and_longer_and_guesses_again() -> None:
    known = _known()
    tries: list[int] = []
    for _ in range(6):
        tries.append(0)
        while known.guess([_append()]) is None:
            tries[-1] += 1
        known.wrong()
        known.opened(_head(), ledger.Cursor(7, _NOW))
    assert tries == [0, 0, 1, 3, 7, 15]
    known.right(_NOW + timedelta(seconds=1), time.monotonic())
    known.wrong()
    assert known.guess([_append()]) is not None
