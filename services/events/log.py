"""What the record holds, and what an append must be before anything else is looked at; pure."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime

import orjson

from netra import errors
from netra.context import UserExecutionContext
from netra.events.v1 import events_pb2
from services.events import heads

MAX_APPEND_BYTES = 1024 * 1024
# what goes by reference from 256 KiB on, and room for the fields around it
MAX_EVENT_BYTES = 320 * 1024
MAX_ENTRIES = 1000
MAX_TRANSIENT_BYTES = 16 * 1024
# the event that a run is put away with, and the field of its data that says until when it may wait
_SUSPENDED, _UNTIL = "agent_suspended", "until"
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
class Transient:
    """What is shown and not recorded. `cursor` is the user's when it was shown: who has less, or more, is not shown it."""

    user_id: str
    cursor: int
    run_id: str
    after_seq: int
    thread_id: str
    kind: str
    frame: bytes

    def message(self) -> events_pb2.TransientEvent:
        """As it is sent."""
        return events_pb2.TransientEvent(
            user_id=self.user_id, run_id=self.run_id, thread_id=self.thread_id, type=self.kind, frame=self.frame,
            after_seq=self.after_seq, after_cursor=self.cursor,
        )  # fmt: skip


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
    """One append that needs nothing but the head of its run to be judged; or, with a context, the user's cursor.

    One that `opens` its run is the first one of it.
    """

    request: events_pb2.AppendRequest
    digest: bytes
    size: int
    # whose events they are, when they belong to no run
    context: UserExecutionContext | None = None
    opens: heads.NewHead | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether anything of it is; else it only shows something."""
        return bool(self.request.events or self.request.steps)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an append: the user's cursor after it, or why it was refused."""

    append_id: int
    last_cursor: int = 0
    refused: errors.NetraError | None = None


def checked(request: events_pb2.AppendRequest, context: UserExecutionContext | None = None, opens: heads.NewHead | None = None) -> Append:
    """Everything that can be said without the record. Raises `InvalidPayload` or `TooLarge`, naming the field.

    `context` is that of the request's token, verified, when its events belong to no run; `opens` is the run that the request opens, by
    another such token.
    """
    _check_place(request, with_context=context is not None)
    if not (request.events or request.steps or request.transients):
        raise errors.InvalidPayload("An append needs at least one event, step or transient.", field="events")
    if request.end and not request.events:
        raise errors.InvalidPayload("An end needs its event.", field="end")
    if request.HasField("call") and context is None and opens is None:
        raise errors.InvalidPayload("A call is told of with open, or with events without a run.", field="call")
    if opens is not None and (request.epoch < 1 or request.first_seq != 1):
        raise errors.InvalidPayload("The append that opens a run has an epoch from 1 on, and the first_seq 1.", field="open")
    size = _size(request)
    for event in request.events:
        _check_event(event, without_run=context is not None)
    for step in request.steps:
        if not 1 <= len(step.key) <= 200:
            raise errors.InvalidPayload("The key of a step has 1 to 200 characters.", field="steps.key")
    for transient in request.transients:
        _check_kind(transient.type, "transients")
        _check_data(transient.data, "transients")
    return Append(request, _digest(request), size, context, opens)


def waits_until(event: events_pb2.NewEvent) -> datetime | None:
    """Until when the run waits that this event puts away; None of any other event, and of one that does not say."""
    if event.type != _SUSPENDED:
        return None
    try:
        until = datetime.fromisoformat(orjson.loads(event.data)[_UNTIL])
    except (KeyError, TypeError, ValueError):
        return None
    return until.astimezone(UTC) if until.tzinfo is not None else until.replace(tzinfo=UTC)


def _check_place(request: events_pb2.AppendRequest, *, with_context: bool) -> None:
    if not with_context:
        if not _UUID.fullmatch(request.run_id):
            raise errors.InvalidPayload("run_id must be a UUID in lower case", field="run_id")
    elif (
        request.run_id or request.epoch or request.first_seq or request.steps or request.end or request.transients
        or request.HasField("open")
    ):  # fmt: skip
        message = (
            "Events without a run have no run_id, epoch, first_seq, steps, transients, open or end; events of a run need no context_token."
        )
        raise errors.InvalidPayload(message, field="context_token")
    elif len({event.event_id for event in request.events}) < len(request.events):
        raise errors.InvalidPayload("Each event has an event_id of its own.", field="events.event_id")


def _size(request: events_pb2.AppendRequest) -> int:
    if len(request.events) + len(request.steps) + len(request.transients) > MAX_ENTRIES:
        raise errors.TooLarge(f"An append holds at most {MAX_ENTRIES} events and steps; send several.", field="events", limit=MAX_ENTRIES)
    size = sum(len(step.key) + len(step.result) for step in request.steps) + sum(len(one.data) for one in request.transients)
    for event in request.events:
        if len(event.data) > MAX_EVENT_BYTES:
            message = f"The data of an event has at most {MAX_EVENT_BYTES} bytes; put what is bigger into an artifact and refer to it."
            raise errors.TooLarge(message, field="events.data", limit=MAX_EVENT_BYTES)
        size += len(event.data) + len(event.type) + len(event.event_id) + len(event.tool_call_id)
    if size > MAX_APPEND_BYTES:
        message = f"An append has at most {MAX_APPEND_BYTES} bytes; send several, and put what is big into an artifact."
        raise errors.TooLarge(message, field="events" if request.events else "steps", limit=MAX_APPEND_BYTES)
    return size


def _check_event(event: events_pb2.NewEvent, *, without_run: bool) -> None:
    _check_kind(event.type, "events")
    if not _UUID.fullmatch(event.event_id):
        raise errors.InvalidPayload("event_id must be a UUID in lower case", field="events.event_id")
    if without_run and event.event_id[14] != "7":
        # the time in it tells where in the record the same one would be
        raise errors.InvalidPayload("event_id must be a UUIDv7", field="events.event_id")
    if len(event.tool_call_id) > 64:
        raise errors.InvalidPayload("tool_call_id has at most 64 characters", field="events.tool_call_id")
    _check_data(event.data, "events")


def _check_kind(kind: str, field: str) -> None:
    if not _KIND.fullmatch(kind):
        raise errors.InvalidPayload("The type of an event is 1 to 64 characters out of a-z and _.", field=f"{field}.type")


def _check_data(data: bytes, field: str) -> None:
    # a frame that is no JSON would stop every client that resumes over it, for ever: the one look into the data is here
    if not data.startswith(b"{"):
        raise errors.InvalidPayload("The data of an event is one JSON object.", field=f"{field}.data")
    try:
        orjson.loads(data)
    except orjson.JSONDecodeError:
        raise errors.InvalidPayload("The data of an event is not JSON in UTF-8.", field=f"{field}.data") from None


def _digest(request: events_pb2.AppendRequest) -> bytes:
    content = events_pb2.AppendRequest(first_seq=request.first_seq, events=request.events, steps=request.steps, end=request.end)
    return hashlib.sha256(content.SerializeToString(deterministic=True)).digest()
