"""SQL that opens contexts, many of them in one statement: each as the user it is for, behind that user's walls."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from chassis.postgres import Transaction
from netra.context import UserExecutionContext
from services.context.contexts import Line

# `made`; `taken`: the request id is; `none`: no such thread for the user; `read`: one that they may only read
Outcome = Literal["made", "taken", "none", "read"]
_OPEN = f"SELECT context.open_contexts({', '.join(f'${number}' for number in range(1, 23))})"


@dataclass(frozen=True, slots=True)
class Opening:
    """A root context to store, with a line of the audit trail, and its thread when that is new; until when its token lasts."""

    frame: UserExecutionContext
    asked: bytes
    line: Line
    until: datetime
    new_thread: bool


async def store(transaction: Transaction, openings: Sequence[Opening], patience: str = "") -> list[Outcome]:
    """What became of each. It waits for others no longer than `patience`, when that is told."""
    outcomes: list[Outcome] = await transaction.value(_OPEN, patience, *map(list, zip(*map(_row, openings), strict=True)))
    return outcomes


def _row(opening: Opening) -> tuple[object, ...]:
    frame, line = opening.frame, opening.line
    return (
        frame.context_id, frame.user_id, frame.tenant_id, frame.session_id, frame.thread_id, opening.new_thread, frame.run_id,
        frame.request_id, frame.connection_id, " ".join(frame.roles), frame.tier, " ".join(sorted(frame.scope or ())), frame.created_at,
        frame.deadline, frame.correlation_id, frame.canonical_agent_context, frame.canonical_audit_metadata, opening.asked, opening.until,
        line.actor, json.dumps(line.detail),
    )  # fmt: skip
