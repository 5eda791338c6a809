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
# a column goes as one text, with this in between, which ids, names and numbers have not and JSON writes as a number: an array takes the
# driver longer, a microsecond for each value
_BETWEEN = "\x1f"
_COLUMNS, _CONTENTS = 25, 24
# the places in a row of what may be missing, and is nothing then; and of what is no text
_OPTIONAL = frozenset({8, 11, 13, 21, 22, 23})
_TYPES = {5: "boolean", 12: "timestamptz", 13: "timestamptz", 15: "bytea", 16: "bytea", 17: "bytea", 18: "timestamptz"}
_NOTHING_SAID = ("", "", "", None)


def _given(place: int) -> str:
    """A column as the database has it. What users say is any text: an array."""
    if place == _CONTENTS:
        return f"${place + 2}"
    missing = ", ''" if place in _OPTIONAL else ""
    return f"string_to_array(${place + 2}, '{_BETWEEN}'{missing})::{_TYPES.get(place, 'text')}[]"


_GIVEN = [_given(place) for place in range(_COLUMNS)]
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
    *columns, contents = zip(*map(_row, openings), strict=True)
    return _OPEN, patience, *map(_together, columns), list(contents)


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
        frame.context_id, frame.user_id, frame.tenant_id, frame.session_id, frame.thread_id, "t" if opening.new_thread else "f",
        frame.run_id, frame.request_id, frame.connection_id or "", " ".join(frame.roles), frame.tier, " ".join(sorted(frame.scope or ())),
        frame.created_at.isoformat(), frame.deadline.isoformat() if frame.deadline else "", frame.correlation_id,
        _hex(frame.canonical_agent_context), _hex(frame.canonical_audit_metadata), _hex(opening.asked), opening.until.isoformat(),
        line.actor, orjson.dumps(line.detail).decode(), *said,
    )  # fmt: skip


def _hex(raw: bytes) -> str:
    return f"\\x{raw.hex()}"
