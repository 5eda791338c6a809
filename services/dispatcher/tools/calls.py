"""Calls of tools as they are told: what is called, what became of it, and to whom that is told; pure."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from netra import errors, ids
from services.dispatcher.tools import results

_STATUS = {"DEADLINE_EXCEEDED": "timeout", "PERMISSION_DENIED": "denied", "CANCELLED": "cancelled"}
TRUSTED: Mapping[str, object] = {"tier": "trusted", "backend": "asyncio"}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one tool."""

    tool_call_id: ids.ToolCallId
    tool: str
    version: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Degraded:
    """Another tool answered: who was asked, who answered, and the code of the error that the one who was asked came to."""

    asked: str
    answered: str
    reason: str

    def told(self) -> dict[str, str]:
        """Its fields in an event."""
        return {"from": self.asked, "to": self.answered, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call: `status` is success, error, timeout, denied, cancelled or unknown.

    `attempts` is how often a function was called for it (0: it was refused before), `enforcement` how what gave the result was contained.
    `stopped` is one that whoever waited for it stopped; `at` is when it was over, in seconds since 1970.
    """

    call: Call
    status: str
    result: results.Result | None
    error: errors.NetraError | None
    execution_time_ms: float
    attempts: int = 1
    degraded: Degraded | None = None
    enforcement: Mapping[str, object] = field(default_factory=lambda: TRUSTED)
    stopped: bool = False
    at: float = field(default_factory=time.time, compare=False)

    def unwrap(self) -> Any:
        """The result. Raises the error when there is none."""
        if self.error is not None:
            raise self.error
        return self.result.value if self.result is not None else None


@dataclass(frozen=True, slots=True)
class Stopped:
    """A call that was running when its run was cancelled; `stopped_at` by the monotonic clock."""

    tool_call_id: ids.ToolCallId
    stopped_at: float
    confirmed: bool


class Reporter(Protocol):
    """Where calls are told of."""

    def tool_executing(self, call: Call, step_key: str, effects: bool) -> None:
        """A call begins; `effects` when its tool changes something outside."""

    def tool_progress(self, call: Call, progress: float | None, message: str | None) -> None:
        """How far a call has come, 0 to 100; shown, not recorded."""

    def tool_completed(self, outcome: Outcome, enforcement: Mapping[str, object], step_key: str) -> None:
        """A call is over; its result is kept under the step's key."""

    def security_violation(self, violation: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        """What a call ran has tried what its sandbox forbids."""

    async def barrier(self) -> None:
        """Returns when everything told so far is in the record."""

    def require_lease(self) -> None:
        """Raises `Fenced` when somebody else may own the run in a moment: nothing outside is changed for it any more."""


def status_of(error: errors.NetraError | None) -> str:
    """How a call went that came to this."""
    return "success" if error is None else _STATUS.get(error.code, "error")
