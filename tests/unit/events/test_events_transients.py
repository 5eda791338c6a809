"""What is shown and not recorded: in its place, of the owner only, bounded, and without asking anybody."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson
import pytest

from chassis import lifecycle
from netra import ids
from netra.events.v1 import events_pb2
from services.events import announce, commit, frames, intake, ledger, log, transients

_NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
_USER, _THREAD, _RUN = ids.uuid7(), ids.uuid7(), ids.uuid7()


class _Announcer:
    """Keeps what is told, in order."""

    def __init__(self) -> None:
        self.told: list[log.Recorded | log.Transient] = []

    def announce(self, events: Sequence[log.Recorded]) -> None:
        self.told += events

    def show(self, transient: log.Transient) -> None:
        self.told.append(transient)

    @property
    def said(self) -> list[tuple[str, int]]:
        """The text of what is shown, and the user's cursor it is shown at."""
        return [(orjson.loads(one.frame)["data"]["text"], one.cursor) for one in self.told if isinstance(one, log.Transient)]


class _World:
    """What is shown on a replica, and the commits of it."""

    def __init__(self) -> None:
        self.announcer = _Announcer()
        self.passing = transients.Transients(self.announcer)
        self.missed: list[str] = []

    def commit(self, *, last_seq: int, cursor: int, epoch: int = 1, ended: bool = False, run_id: str = _RUN) -> None:
        """A transaction of the run's."""
        shared = frames.envelope(user_id=_USER, thread_id=_THREAD, run_id=run_id, request_id="r", correlation_id="c", trace_id="t")
        head = ledger.Head(run_id, _USER, _THREAD, shared, "free", _NOW, epoch, last_seq + 1, b"", 0, cursor, _NOW, ended, "")
        self.passing.committed(ledger.Ledger({run_id: head}, {_USER: ledger.Cursor(cursor, _NOW)}, _NOW))

    def show(self, text: str, after_seq: int, *, epoch: int = 1, run_id: str = _RUN) -> log.Outcome:
        """The owner shows something."""
        return self.passing.show(_request(text, after_seq, epoch=epoch, run_id=run_id))


def _request(text: str, after_seq: int, *, epoch: int = 1, run_id: str = _RUN) -> events_pb2.AppendRequest:
    shown = events_pb2.Transient(type="agent_delta", data=orjson.dumps({"text": text}), after_seq=after_seq)
    return events_pb2.AppendRequest(append_id=9, run_id=run_id, epoch=epoch, transients=[shown])


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> _World:
    """A replica that has committed nothing yet."""
    made = _World()
    monkeypatch.setattr(announce, "missed", lambda reason, number=1: made.missed.extend([reason] * number))
    return made


def test_what_follows_the_last_event_is_shown_at_once_as_a_frame_without_a_place_in_the_record(world: _World) -> None:
    world.commit(last_seq=3, cursor=40)
    assert world.show("a", 3) == log.Outcome(9, last_cursor=40)
    (shown,) = world.announcer.told
    assert isinstance(shown, log.Transient)
    assert (shown.user_id, shown.run_id, shown.thread_id, shown.kind, shown.cursor, shown.after_seq) == (
        _USER, _RUN, _THREAD, "agent_delta", 40, 3,
    )  # fmt: skip
    frame = orjson.loads(shown.frame)
    assert frame.pop("timestamp").endswith("Z")
    assert frame == {
        "type": "agent_delta", "after_seq": 3, "user_id": _USER, "thread_id": _THREAD, "run_id": _RUN, "request_id": "r",
        "correlation_id": "c", "trace_id": "t", "data": {"text": "a"},
    }  # fmt: skip


def test_what_comes_too_early_waits_for_its_event_and_what_comes_too_late_is_dropped(world: _World) -> None:
    world.show("early", 1)
    world.show("never", 2)
    world.show("later", 3)
    assert world.announcer.told == []
    world.commit(last_seq=1, cursor=5)
    assert world.announcer.said == [("early", 5)]
    world.commit(last_seq=3, cursor=8)
    world.show("late", 2)
    assert world.announcer.said == [("early", 5), ("later", 8)]
    assert world.missed == ["late", "late"]


def test_another_run_of_the_user_moves_the_cursor_that_is_shown_at(world: _World) -> None:
    world.commit(last_seq=1, cursor=5)
    world.commit(last_seq=1, cursor=6, run_id=ids.uuid7())
    world.show("a", 1)
    assert world.announcer.said == [("a", 6)]


def test_nothing_is_shown_once_the_run_has_ended(world: _World) -> None:
    world.commit(last_seq=1, cursor=5)
    world.show("waits", 2)
    world.commit(last_seq=2, cursor=6, ended=True)
    assert world.show("after", 2).refused is None
    assert world.announcer.told == []
    assert world.missed == ["late"]


@pytest.mark.parametrize("by", ["open", "commit"])
def test_an_owner_that_was_replaced_shows_nothing(world: _World, by: str) -> None:
    world.commit(last_seq=1, cursor=5)
    world.show("waits", 2)
    if by == "open":
        world.passing.opened(_RUN, 2)
    else:
        world.commit(last_seq=1, cursor=5, epoch=2)
    refused = world.show("old", 1).refused
    assert refused is not None
    assert refused.code == "FENCED"
    # a transaction that began before the run was opened again may be heard of after it
    world.commit(last_seq=2, cursor=6)
    assert world.announcer.told == []
    world.show("new", 2, epoch=2)
    assert world.announcer.said == [("new", 6)]


def test_the_next_owner_waits_for_its_first_commit(world: _World) -> None:
    world.commit(last_seq=1, cursor=5)
    world.show("new", 2, epoch=2)
    world.commit(last_seq=2, cursor=6)
    assert world.announcer.told == []
    world.commit(last_seq=2, cursor=6, epoch=2)
    assert world.announcer.said == [("new", 6)]


def test_what_is_large_is_dropped_and_what_waits_is_bounded(world: _World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.commit(last_seq=1, cursor=5)
    world.show("x" * log.MAX_TRANSIENT_BYTES, 1)
    assert world.missed == ["large"]
    for number in range(100):
        world.show(str(number), 2)
    assert world.missed.count("waiting") == 100 - transients._HELD_OF_RUN
    monkeypatch.setattr(transients, "_HELD_BYTES", world.passing._held_bytes + 30)
    world.show("a", 7, run_id=ids.uuid7())
    world.show("b" * 30, 7, run_id=ids.uuid7())
    assert world.missed.count("waiting") == 101 - transients._HELD_OF_RUN
    world.commit(last_seq=2, cursor=6)
    assert len(world.announcer.told) == transients._HELD_OF_RUN
    assert world.passing._held_bytes == len(b'{"text":"a"}')


def test_what_waits_for_a_run_that_is_not_heard_of_is_forgotten(world: _World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.show("a", 1)
    monkeypatch.setattr(transients, "_PATIENCE_S", -1.0)
    world.show("b", 1, run_id=ids.uuid7())
    assert world.missed == ["waiting"]
    world.commit(last_seq=1, cursor=5)
    assert world.announcer.told == []


def test_what_is_known_is_bounded(world: _World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transients, "_KNOWN", 10)
    for cursor in range(1, 31):
        world.commit(last_seq=1, cursor=cursor, run_id=ids.uuid7())
    assert len(world.passing._heads) == 10


class _Writer:
    """Commits the first event of a run, when it may."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def commit(self, appends: Sequence[log.Append], *, pass_over: bool = False) -> ledger.Ledger:
        await self.go.wait()
        shared = frames.envelope(user_id=_USER, thread_id=_THREAD, run_id=_RUN, request_id="r", correlation_id="c", trace_id="t")
        head = ledger.Head(_RUN, _USER, _THREAD, shared, "free", _NOW, 1, 1, b"", 0, 0, _NOW, False, "")
        book = ledger.Ledger({_RUN: head}, {_USER: ledger.Cursor(0, _NOW)}, _NOW)
        for append in appends:
            book.add(append)
        return book


async def test_what_shows_only_is_acknowledged_without_a_commit_and_told_after_the_event_before_it() -> None:
    announcer, writer, tasks = _Announcer(), _Writer(), lifecycle.Tasks()
    passing = transients.Transients(announcer)
    committer = commit.Committer(writer, announcer, passing.committed)
    tasks.spawn(committer.run(), "commit")
    unused: Any = None
    taken = intake.Intake(committer, unused, tasks, passing.show)
    event = events_pb2.NewEvent(event_id=ids.uuid7(), type="agent_thinking", data=b"{}")

    async def requests() -> AsyncIterator[events_pb2.AppendRequest]:
        yield events_pb2.AppendRequest(append_id=1, run_id=_RUN, epoch=1, first_seq=1, events=[event])
        yield _request("a", 1)
        yield _request("wrong", 1, run_id="no run")

    async with asyncio.timeout(5):
        answers = taken.answers(requests())
        assert await anext(answers) == [log.Outcome(9)]
        ((refused,),) = [[outcome.refused for outcome in await anext(answers)]]
        assert refused is not None
        assert refused.details["field"] == "run_id"
        writer.go.set()
        assert await anext(answers) == [log.Outcome(1, last_cursor=1)]
        assert [answer async for answer in answers] == []
    assert [type(one) for one in announcer.told] == [log.Recorded, log.Transient]
    await tasks.close()
