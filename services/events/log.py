"""The record: what may be appended to it, decided under the locks of its heads and cursors; pure."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

import orjson

from netra import errors
from netra.events.v1 import events_pb2
from services.events import frames

MAX_APPEND_BYTES = 1024 * 1024
MAX_ENTRIES = 1000
_KIND = re.compile(r"[a-z_]{1,64}")
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(frozen=True, slots=True)
class Recorded:
    """An event of the record. `ends` marks the last one of its run."""

    user_id: str
    cursor: int
    run_id: str
    seq: int
    thread_id: str
    kind: str
    frame: bytes
    ends: bool = False


@dataclass(frozen=True, slots=True)
class Position:
    """How far a user's record reaches."""

    last: int = 0
    oldest: int = 1


@dataclass(frozen=True, slots=True)
class Page:
    """Some of a user's record, in order. Up to `through` nothing that was asked for is missing in it."""

    events: list[Recorded]
    through: int
    position: Position


@dataclass(frozen=True, slots=True)
class Append:
    """One append that needs nothing but the head of its run to be judged."""

    request: events_pb2.AppendRequest
    digest: bytes
    size: int


@dataclass(slots=True)
class Head:
    """Where a run's record stands, locked. `user_id` to `trace_id` never change."""

    run_id: str
    user_id: str
    thread_id: str
    shared: bytes
    retention: str
    epoch: int
    next_seq: int
    last_digest: bytes
    last_first_seq: int
    last_cursor: int
    last_at: datetime
    ended: bool
    terminal_type: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an append: the user's cursor after it, or why it was refused."""

    append_id: int
    last_cursor: int = 0
    refused: errors.NetraError | None = None


def checked(request: events_pb2.AppendRequest) -> Append:
    """Everything that can be said without the head. Raises `InvalidPayload` or `TooLarge`, naming the field."""
    if not _UUID.fullmatch(request.run_id):
        raise errors.InvalidPayload("run_id must be a UUID in lower case", field="run_id")
    if not request.events and not request.steps:
        raise errors.InvalidPayload("An append needs at least one event or step.", field="events")
    if request.end and not request.events:
        raise errors.InvalidPayload("An end needs its event.", field="end")
    size = sum(len(event.data) for event in request.events) + sum(len(step.result) for step in request.steps)
    if size > MAX_APPEND_BYTES or len(request.events) + len(request.steps) > MAX_ENTRIES:
        limits = f"{MAX_APPEND_BYTES} bytes and {MAX_ENTRIES} entries"
        raise errors.TooLarge(
            f"An append holds at most {limits}; put bigger results into an artifact.", field="events", limit=MAX_APPEND_BYTES
        )
    for event in request.events:
        _check_event(event)
    for step in request.steps:
        if not 1 <= len(step.key) <= 200:
            raise errors.InvalidPayload("The key of a step has 1 to 200 characters.", field="steps.key")
    return Append(request, _digest(request), size)


def _check_event(event: events_pb2.NewEvent) -> None:
    if not _KIND.fullmatch(event.type):
        raise errors.InvalidPayload("The type of an event is 1 to 64 characters out of a-z and _.", field="events.type")
    if not _UUID.fullmatch(event.event_id):
        raise errors.InvalidPayload("event_id must be a UUID in lower case", field="events.event_id")
    if len(event.tool_call_id) > 64:
        raise errors.InvalidPayload("tool_call_id has at most 64 characters", field="events.tool_call_id")
    # a frame that is no JSON would stop every client that resumes over it, for ever: the one look into the data is here
    if not event.data.startswith(b"{"):
        raise errors.InvalidPayload("The data of an event is one JSON object.", field="events.data")
    try:
        orjson.loads(event.data)
    except orjson.JSONDecodeError:
        raise errors.InvalidPayload("The data of an event is not JSON in UTF-8.", field="events.data") from None


def _digest(request: events_pb2.AppendRequest) -> bytes:
    content = events_pb2.AppendRequest(first_seq=request.first_seq, events=request.events, steps=request.steps, end=request.end)
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()


@dataclass(slots=True)
class EventRow:
    """A row of `events`."""

    event: Recorded
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
    """One transaction: what its locked rows were, and what is to be written. A refused append leaves no trace in it."""

    heads: Mapping[str, Head]
    cursors: dict[str, int]
    now: datetime
    # (run, seq) -> (event id, type, cursor) of events that appends want to add although the head is beyond them
    earlier: Mapping[tuple[str, int], tuple[str, str, int]] = field(default_factory=dict)
    earlier_steps: frozenset[tuple[str, str]] = frozenset()
    events: list[EventRow] = field(default_factory=list)
    steps: list[StepRow] = field(default_factory=list)
    changed: dict[str, Head] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, append: Append) -> None:
        """Judge an append and, if it is good, take its rows."""
        try:
            cursor = self._admitted(append)
        except errors.NetraError as refused:
            self.outcomes.append(Outcome(append.request.append_id, refused=refused))
        else:
            self.outcomes.append(Outcome(append.request.append_id, cursor))

    def _admitted(self, append: Append) -> int:
        request = append.request
        head = self.heads.get(request.run_id)
        if head is None or head.user_id not in self.cursors:
            raise errors.NotFound("There is no such run in the record. Open it first.")
        if request.epoch != head.epoch:
            raise errors.Fenced(f"The run is owned under epoch {head.epoch}; this append comes from epoch {request.epoch}.")
        if request.first_seq == head.last_first_seq and append.digest == head.last_digest:
            return head.last_cursor
        if (cursor := self._committed_before(append, head)) is not None:
            return cursor
        if head.ended:
            raise errors.FailedPrecondition(f"The run has ended with {head.terminal_type}; nothing can follow.")
        if request.first_seq != head.next_seq:
            message = f"The next event of the run is {head.next_seq}; this append begins with {request.first_seq}."
            raise errors.FailedPrecondition(message, next_seq=head.next_seq)
        return self._take(append, head)

    def _committed_before(self, append: Append, head: Head) -> int | None:
        # the answer to a whole batch may have been lost: not only the last append of a run is sent again
        request = append.request
        if not request.events:
            known = (request.first_seq <= head.next_seq and (head.run_id, step.key) in self.earlier_steps for step in request.steps)
            return head.last_cursor if all(known) else None
        found = [self.earlier.get((head.run_id, seq)) for seq in range(request.first_seq, request.first_seq + len(request.events))]
        cursor = None
        for row, event in zip(found, request.events, strict=True):
            if row is None or row[:2] != (event.event_id, event.type):
                return None
            cursor = row[2]
        return cursor

    def _take(self, append: Append, head: Head) -> int:
        request = append.request
        head.last_at = max(self.now, head.last_at)
        at = frames.timestamp(head.last_at)
        cursor = self.cursors[head.user_id]
        for seq, event in enumerate(request.events, request.first_seq):
            cursor += 1
            frame = frames.splice(
                head.shared, kind=event.type, cursor=cursor, seq=seq, event_id=event.event_id, at=at, data=event.data
            )  # fmt: skip
            recorded = Recorded(head.user_id, cursor, head.run_id, seq, head.thread_id, event.type, frame)
            self.events.append(EventRow(recorded, head.retention, head.last_at, event.event_id, event.tool_call_id))
        self.steps += [StepRow(head.run_id, head.user_id, step.key, step.result) for step in request.steps]
        if request.end:
            self._end(head)
        self.cursors[head.user_id] = head.last_cursor = cursor
        head.last_first_seq, head.last_digest = request.first_seq, append.digest
        head.next_seq += len(request.events)
        self.changed[head.run_id] = head
        return cursor

    def _end(self, head: Head) -> None:
        last = self.events[-1]
        last.event = replace(last.event, ends=True)
        head.ended, head.terminal_type = True, last.event.kind


def overlapping(appends: Iterable[Append], heads: Mapping[str, Head]) -> list[Append]:
    """Appends that reach into what the record has already, but are not simply the last one again."""
    return [append for append in appends if (head := heads.get(append.request.run_id)) is not None and _reaches_back(append, head)]


def _reaches_back(append: Append, head: Head) -> bool:
    request = append.request
    if request.epoch != head.epoch or (request.first_seq == head.last_first_seq and append.digest == head.last_digest):
        return False
    return request.first_seq < head.next_seq or (not request.events and request.first_seq == head.next_seq)
