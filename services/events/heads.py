"""The head of a run's record: what it is made of, and what its new owner is told; pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from netra import errors, ids
from netra.context import UserExecutionContext

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
    """Raises `PermissionDenied` when the context is of another run."""
    if context.run_id != run_id:
        raise errors.PermissionDenied("The execution context belongs to another run.")


def new(context: UserExecutionContext, run_id: ids.RunId, trace_id: str) -> NewHead:
    """Bind a run to the user of its context. Raises `PermissionDenied` when the context is of another run, `InvalidPayload`."""
    require(context, run_id)
    if trace_id and not _TRACE.fullmatch(trace_id):
        raise errors.InvalidPayload("trace_id must be 32 hexadecimal digits in lower case", field="trace_id")
    deadline = context.deadline.timestamp() if context.deadline is not None else None
    # what a tier keeps for how long is decided when partitions are dropped, not here
    return NewHead(
        run_id, context.user_id, context.tenant_id, context.thread_id, context.request_id, context.correlation_id, trace_id, context.tier,
        deadline,
    )  # fmt: skip
