"""What is counted of calls: of each dispatcher for its user, exact; of the process for its operators, by tool."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from datetime import UTC, datetime

from chassis import tally, telemetry
from netra import ids
from services.dispatcher.tools import calls

_calls = tally.Tally("netra.tools.calls", "Calls of tools that ended, by tool and status.", "tool", "status")
_retries = telemetry.meter.create_counter("netra.tools.retries", description="Attempts after the first one, by tool.")
_degraded = telemetry.meter.create_counter("netra.tools.degraded", description="Calls that another tool answered, by the tool asked.")
_refused = telemetry.meter.create_counter("netra.tools.refused", description="Calls that were not let in, by reason.")
_violations = telemetry.meter.create_counter("netra.tools.violations", description="Times that code tried what is forbidden, by tool.")
_seconds = tally.Durations("netra_tools_seconds", "How long calls took, by tool.", "tool")
_waiting = telemetry.meter.create_up_down_counter("netra.tools.waiting", description="Calls that wait for a place of their tool.")
_running = tally.Tally("netra.tools.running", "Calls that were let in and have not ended.", kind="gauge")
_live = tally.Tally("netra.tools.dispatchers", "Dispatchers that are open.", kind="gauge")
_open = telemetry.meter.create_up_down_counter("netra.tools.breakers_open", description="Tools that are left alone for all, by tool.")
_opened = telemetry.meter.create_counter(
    "netra.tools.breaker_opened", description="Times that a tool began to be left alone, by tool, for whom."
)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What one dispatcher has done so far. Every call that ended is one of `tools_executed`, and was successful or failed."""

    dispatcher_id: str
    user_id: str
    created_at: datetime
    tools_executed: int = 0
    successful_executions: int = 0
    failed_executions: int = 0
    total_execution_time_ms: float = 0.0
    websocket_events_sent: int = 0
    permission_checks: int = 0
    permission_denials: int = 0
    security_violations: int = 0
    last_execution_time: datetime | None = None


class Metrics:
    """Counts what one dispatcher does. Only the event loop's thread touches it, so that no count is lost."""

    def __init__(self, user_id: str) -> None:
        self.dispatcher_id = ids.uuid7()
        self._first = Snapshot(self.dispatcher_id, user_id, datetime.now(UTC))
        self._executed = self._successful = self._events = self._checks = self._denials = self._violations = 0
        self._total_ms = 0.0
        self._last: datetime | None = None

    def told(self) -> None:
        """An event went out."""
        self._events += 1

    def checked(self) -> None:
        """Permission was asked for."""
        self._checks += 1

    def denied(self) -> None:
        """Permission was refused."""
        self._denials += 1

    def violated(self, tool: str) -> None:
        """Foreign code tried what is forbidden."""
        self._violations += 1
        _violations.add(1, {"tool": tool})

    def ended(self, outcome: calls.Outcome, tool: str) -> None:
        """A call is over. `tool` is its name, or `?` when there is none of that name: a caller must not make up labels."""
        self._executed += 1
        self._successful += outcome.error is None
        self._total_ms += outcome.execution_time_ms
        self._last = datetime.now(UTC)
        _calls.add(1, tool, outcome.status)
        _seconds.add(outcome.execution_time_ms / 1000, tool)
        if outcome.attempts > 1:
            _retries.add(outcome.attempts - 1, {"tool": tool})
        if outcome.degraded is not None:
            _degraded.add(1, {"tool": tool})

    def snapshot(self) -> Snapshot:
        """As it is now."""
        return dataclasses.replace(
            self._first, tools_executed=self._executed, successful_executions=self._successful,
            failed_executions=self._executed - self._successful, total_execution_time_ms=round(self._total_ms, 3),
            websocket_events_sent=self._events, permission_checks=self._checks, permission_denials=self._denials,
            security_violations=self._violations, last_execution_time=self._last,
        )  # fmt: skip


def refused(reason: str) -> None:
    """A call was not let in."""
    _refused.add(1, {"reason": reason})


def waits(count: int, tool: str) -> None:
    """So many more wait for a place of a tool; negative when they do not any more."""
    _waiting.add(count, {"tool": tool})


def runs(count: int) -> None:
    """So many more calls are let in; negative when they ended."""
    _running.add(count)


def live(count: int) -> None:
    """So many more dispatchers are open; negative when they closed."""
    _live.add(count)


def breaker(opened: bool, tool: str, whom: str) -> None:
    """A tool is left alone now, or not any more: for `all`, or for a `user`, who may never come back to it."""
    if opened:
        _opened.add(1, {"tool": tool, "for": whom})
    if whom == "all":
        _open.add(1 if opened else -1, {"tool": tool})
