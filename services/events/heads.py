"""The head of a run's record: what it is made of, and what its new owner is told; pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from netra import errors, ids
from netra.context import UserExecutionContext
from netra.events.v1 import events_pb2

_TRACE = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class NewHead:
    """A run as its signed context describes it, with its trace and its retention class."""

    run_id: str
    user_id: str
    tenant_id: str
    thread_id: str
    request_id: str
    correlation_id: str
    trace_id: str
    retention: str
    deadline: float | None
    # one of a session's calls: its context is that of others as well
    of_calls: bool = False


@dataclass(frozen=True, slots=True)
class Opened:
    """The record of a run at the moment its owner changed."""

    next_seq: int
    ended: bool
    terminal_type: str
    open_tool_calls: Sequence[str]


@dataclass(frozen=True, slots=True)
class Steps:
    """Some steps of a run, key and result, by their keys; after the last of them the next page goes on, if it is not empty."""

    found: Sequence[tuple[str, bytes]]
    next_after: str


def require(context: UserExecutionContext, run_id: ids.RunId) -> None:
    """Raises `PermissionDenied` when the context is of another run. That of a session's calls serves all its user's runs in its thread."""
    if context.run_id != run_id and not context.serves_calls:
        raise errors.PermissionDenied("The execution context belongs to another run.")


def framed(context: UserExecutionContext, run_id: str, told: events_pb2.Call | None) -> UserExecutionContext:
    """The frame of what is to be recorded: the context, or, when that is of a session's calls, the one of the call that is `told`.

    Raises `InvalidPayload` or `InvalidContext` naming the field.
    """
    if context.serves_calls != (told is not None):
        raise errors.InvalidPayload("call goes with the context of a session's calls, and with no other", field="call")
    return context if told is None else context.of_call(run_id or context.run_id, told.request_id, told.correlation_id)


def new(context: UserExecutionContext, run_id: ids.RunId, trace_id: str, told: events_pb2.Call | None = None) -> NewHead:
    """Bind a run to the user of its context. Raises `PermissionDenied` when the context is of another run, `InvalidPayload`."""
    require(context, run_id)
    frame = framed(context, run_id, told)
    if trace_id and not _TRACE.fullmatch(trace_id):
        raise errors.InvalidPayload("trace_id must be 32 hexadecimal digits in lower case", field="trace_id")
    deadline = frame.deadline.timestamp() if frame.deadline is not None else None
    # what a tier keeps for how long is decided when partitions are dropped, not here
    return NewHead(
        run_id, frame.user_id, frame.tenant_id, frame.thread_id, frame.request_id, frame.correlation_id, trace_id, frame.tier, deadline,
        frame.serves_calls,
    )  # fmt: skip
