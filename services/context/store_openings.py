"""SQL that opens contexts, many of them in one statement: each as the user it is for, behind that user's walls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

import orjson

from chassis.postgres import Transaction
from netra import errors
from netra.context import UserExecutionContext
from services.context.contexts import Line
from services.context.drafts import First

# `made`; `taken`: the request id is; `none`: no such thread for the user; `read`: one that they may only read
Outcome = Literal["made", "taken", "none", "read"]
# texts go as one, with this in between, which ids and names have not and JSON writes as a number: an array takes the driver longer
_BETWEEN = "\x1f"
# the places in a row of what may be missing or empty, or is no text, or any text: arrays
_ARRAYS = frozenset({5, 8, 11, 12, 13, 15, 16, 17, 18, 21, 22, 23, 24})
_COLUMNS = 25
_NOTHING_SAID = (None,) * 4
_GIVEN = [f"${place + 2}" if place in _ARRAYS else f"string_to_array(${place + 2}, '{_BETWEEN}')" for place in range(_COLUMNS)]
_OPEN = f"SELECT context.open_contexts($1, {', '.join(_GIVEN)}) AS outcomes"


@dataclass(frozen=True, slots=True)
class Opening:
    """A root context to store, with a line of the audit trail, its thread when that is new, and a message that begins it.

    `until` is when its token ends.
    """

    frame: UserExecutionContext
    asked: bytes
    line: Line
    until: datetime
    new_thread: bool
    first: First | None = None


async def store(transaction: Transaction, openings: Sequence[Opening]) -> list[Outcome]:
    """What became of each; it waits for others."""
    outcomes: list[Outcome] = await transaction.value(*statement(openings))
    return outcomes


def statement(openings: Sequence[Opening], patience: str = "") -> tuple[Any, ...]:
    """What opens all of them, and its arguments. It waits for others no longer than `patience`, when that is told."""
    columns = zip(*map(_row, openings), strict=True)
    given = [list(column) if place in _ARRAYS else _together(column) for place, column in enumerate(columns)]
    return _OPEN, patience, *given


def _together(texts: Sequence[str]) -> str:
    joined = _BETWEEN.join(texts)
    if joined.count(_BETWEEN) != len(texts) - 1:
        # else what is one user's would stand beside another's name
        raise errors.Internal("A text of a context holds what separates them.")
    return joined


def _row(opening: Opening) -> tuple[Any, ...]:
    frame, line, first = opening.frame, opening.line, opening.first
    said = _NOTHING_SAID if first is None else (first.message_id, first.draft.request_id, first.draft.role, first.draft.content)
    return (
        frame.context_id, frame.user_id, frame.tenant_id, frame.session_id, frame.thread_id, opening.new_thread, frame.run_id,
        frame.request_id, frame.connection_id, " ".join(frame.roles), frame.tier, " ".join(sorted(frame.scope or ())), frame.created_at,
        frame.deadline, frame.correlation_id, frame.canonical_agent_context, frame.canonical_audit_metadata, opening.asked, opening.until,
        line.actor, orjson.dumps(line.detail).decode(), *said,
    )  # fmt: skip
