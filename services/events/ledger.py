"""One transaction of appends, judged under the locks of their heads and cursors; pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, datetime

from netra import errors
from netra.context import UserExecutionContext
from netra.events.v1 import events_pb2
from services.events import days, frames, log
from services.events import heads as heads_


@dataclass(slots=True)
class Head:
    """Where a run's record stands, locked. `user_id` to `opened_at` never change."""

    run_id: str
    user_id: str
    thread_id: str
    shared: bytes
    retention: str
    opened_at: datetime
    epoch: int
    next_seq: int
    last_digest: bytes
    last_first_seq: int
    last_cursor: int
    last_at: datetime
    ended: bool
    terminal_type: str


@dataclass(slots=True)
class Cursor:
    """Where a user's record stands, locked."""

    last: int
    last_at: datetime


# user, day, class
Mark = tuple[str, date, str]


@dataclass(frozen=True, slots=True)
class Earlier:
    """An event of the record as far as is needed to know it again."""

    cursor: int
    at: datetime
    digest: bytes


@dataclass(slots=True)
class EventRow:
    """A row of `events`."""

    event: log.Recorded
    retention: str
    at: datetime
    event_id: str
    tool_call_id: str


@dataclass(slots=True)
class StepRow:
    """A row of `steps`."""

    run_id: str
    user_id: str
    key: str
    result: bytes


@dataclass(slots=True)
class Ledger:
    """What the locked rows were, and what is to be written. A refused append leaves no trace in it."""

    heads: Mapping[str, Head]
    cursors: Mapping[str, Cursor]
    now: datetime
    # (run, seq) of events, (run, key) of steps and (user, event id) of events without a run that appends want to add, perhaps again
    earlier: Mapping[tuple[str, int], Earlier] = field(default_factory=dict)
    earlier_steps: Mapping[tuple[str, str], bytes] = field(default_factory=dict)
    without_run: dict[tuple[str, str], Earlier] = field(default_factory=dict)
    events: list[EventRow] = field(default_factory=list)
    steps: list[StepRow] = field(default_factory=list)
    changed: dict[str, Head] = field(default_factory=dict)
    moved: dict[str, Cursor] = field(default_factory=dict)
    # with its first cursor, as far as this transaction knows
    marks: dict[Mark, int] = field(default_factory=dict)
    # runs that are put away, and until when they may wait
    waits: dict[str, datetime] = field(default_factory=dict)
    outcomes: list[log.Outcome] = field(default_factory=list)
    # runs whose rows another transaction holds
    held: frozenset[str] = frozenset()
    # runs that have no row yet, and get it with what is written; and what stands against opening others
    new: Mapping[str, heads_.NewHead] = field(default_factory=dict)
    unopened: Mapping[str, errors.NetraError] = field(default_factory=dict)

    def add(self, append: log.Append) -> None:
        """Judge an append and, if it is good, take its rows."""
        try:
            cursor = self._admitted(append) if append.context is None else self._noted(append, append.context)
        except errors.NetraError as refused:
            self.outcomes.append(log.Outcome(append.request.append_id, refused=refused))
        else:
            self.outcomes.append(log.Outcome(append.request.append_id, cursor))

    def goes_on(self, append: log.Append) -> bool:
        """Judge an append if it simply goes on where its run stands, and no other row than those of the run and its user is needed
        for that; false if it does not: then it is not judged.
        """
        head, request = self.heads.get(append.request.run_id), append.request
        if append.context is not None or head is None or head.ended or request.epoch != head.epoch or request.first_seq != head.next_seq:
            return False
        if request.first_seq == head.last_first_seq and append.digest == head.last_digest:
            return False
        if append.opens is not None and (append.opens.user_id, append.opens.thread_id) != (head.user_id, head.thread_id):
            return False
        # steps alone may be there already: then they are not written a second time
        self.outcomes.append(log.Outcome(request.append_id, self._take(append, head)))
        return True

    def _admitted(self, append: log.Append) -> int:
        request = append.request
        if append.opens is not None and (refused := self.unopened.get(request.run_id)) is not None:
            raise refused
        if request.run_id in self.held:
            raise errors.Unavailable("The user's record is held by another transaction just now. Send the append again.")
        head = self.heads.get(request.run_id)
        if head is None or head.user_id not in self.cursors:
            raise errors.NotFound("There is no such run in the record. Open it first.")
        if request.epoch != head.epoch:
            raise errors.Fenced(f"The run is owned under epoch {head.epoch}; this append comes from epoch {request.epoch}.")
        if request.first_seq == head.last_first_seq and append.digest == head.last_digest:
            return head.last_cursor
        if (cursor := self._committed_before(request, head)) is not None:
            return cursor
        if head.ended:
            raise errors.FailedPrecondition(f"The run has ended with {head.terminal_type}; nothing can follow.")
        if request.first_seq != head.next_seq:
            message = f"The next event of the run is {head.next_seq}; this append begins with {request.first_seq}."
            raise errors.FailedPrecondition(message, next_seq=head.next_seq)
        return self._take(append, head)

    def _committed_before(self, request: events_pb2.AppendRequest, head: Head) -> int | None:
        # the answer to a whole batch may have been lost: not only the last append of a run is sent again
        if request.first_seq > head.next_seq or not self._steps_known(request, head):
            return None
        cursor = head.last_cursor if not request.events else None
        for seq, event in enumerate(request.events, request.first_seq):
            found = self.earlier.get((head.run_id, seq))
            if found is None or found.digest != _digest(_frame(head.shared, event, found.cursor, seq, frames.timestamp(found.at))):
                return None
            cursor = found.cursor
        return cursor

    def _steps_known(self, request: events_pb2.AppendRequest, head: Head) -> bool:
        # steps are not kept long beyond the end of their run; its events are
        forgotten = head.ended and bool(request.events)
        known = (self.earlier_steps.get((head.run_id, step.key)) for step in request.steps)
        return all(
            forgotten if digest is None else digest == _digest(step.result) for digest, step in zip(known, request.steps, strict=True)
        )

    def _take(self, append: log.Append, head: Head) -> int:
        request, cursor = append.request, self.cursors[head.user_id]
        head.last_at = self._at(cursor, head.last_at)
        of = _Shared(head.user_id, head.run_id, head.thread_id, head.shared, head.retention)
        self._write(of, cursor, head.last_at, list(enumerate(request.events, request.first_seq)))
        self.steps += [StepRow(head.run_id, head.user_id, step.key, step.result) for step in request.steps]
        if request.end:
            self._end(head)
        elif request.events and (until := log.waits_until(request.events[-1])) is not None:
            self.waits[head.run_id] = until
        head.last_cursor = cursor.last
        head.last_first_seq, head.last_digest = request.first_seq, append.digest
        head.next_seq += len(request.events)
        self.changed[head.run_id] = head
        return cursor.last

    def _end(self, head: Head) -> None:
        last = self.events[-1]
        last.event = replace(last.event, ends=True)
        head.ended, head.terminal_type = True, last.event.kind

    def _noted(self, append: log.Append, context: UserExecutionContext) -> int:
        cursor = self.cursors.get(context.user_id)
        if cursor is None:
            raise errors.Unavailable("The user's record is being made, or held by another transaction. Send the append again.")
        of, user_id, events = _without_run(context), context.user_id, append.request.events
        for event in events:
            known = self.without_run.get((user_id, event.event_id))
            if known is not None and known.digest != _digest(_frame(of.shared, event, known.cursor, 0, frames.timestamp(known.at))):
                raise errors.AlreadyExists(f"Another event of the user has the id {event.event_id}.")
        new = [(0, event) for event in events if (user_id, event.event_id) not in self.without_run]
        for row in self._write(of, cursor, self._at(cursor, cursor.last_at), new):
            self.without_run[user_id, row.event_id] = Earlier(row.event.cursor, row.at, _digest(row.event.frame))
        return max(self.without_run[user_id, event.event_id].cursor for event in events)

    def _at(self, cursor: Cursor, last_at: datetime) -> datetime:
        # time does not go back, neither in a run nor in a user's record
        return max(self.now, cursor.last_at, last_at)

    def _write(
        self, of: _Shared, cursor: Cursor, last_at: datetime, events: Sequence[tuple[int, events_pb2.NewEvent]]
    ) -> Sequence[EventRow]:  # fmt: skip
        if not events:
            return ()
        cursor.last_at, at = last_at, frames.timestamp(last_at)
        self.moved[of.user_id] = cursor
        self.marks.setdefault((of.user_id, days.day_of(cursor.last_at), of.retention), cursor.last + 1)
        for seq, event in events:
            cursor.last += 1
            frame = _frame(of.shared, event, cursor.last, seq, at)
            recorded = log.Recorded(of.user_id, cursor.last, of.run_id, seq, of.thread_id, event.type, frame)
            self.events.append(EventRow(recorded, of.retention, cursor.last_at, event.event_id, event.tool_call_id))
        return self.events[-len(events) :]


@dataclass(frozen=True, slots=True)
class _Shared:
    """What the events of one append share."""

    user_id: str
    run_id: str
    thread_id: str
    shared: bytes
    retention: str


def _without_run(context: UserExecutionContext) -> _Shared:
    shared = frames.envelope(
        user_id=context.user_id, thread_id=context.thread_id, run_id="", request_id=context.request_id,
        correlation_id=context.correlation_id, trace_id="",
    )  # fmt: skip
    return _Shared(context.user_id, "", context.thread_id, shared, context.tier)


def _frame(shared: bytes, event: events_pb2.NewEvent, cursor: int, seq: int, at: bytes) -> bytes:
    return frames.splice(shared, kind=event.type, cursor=cursor, seq=seq, event_id=event.event_id, at=at, data=event.data)


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def overlapping(appends: Iterable[log.Append], heads: Mapping[str, Head]) -> list[log.Append]:
    """Appends of runs that reach into what the record has already, but are not simply the last one again."""
    return [append for append in appends if (head := heads.get(append.request.run_id)) is not None and _reaches_back(append, head)]


def _reaches_back(append: log.Append, head: Head) -> bool:
    request = append.request
    if request.epoch != head.epoch or (request.first_seq == head.last_first_seq and append.digest == head.last_digest):
        return False
    return request.first_seq < head.next_seq or (not request.events and request.first_seq == head.next_seq)
