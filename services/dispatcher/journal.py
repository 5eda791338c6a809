"""AgentWebSocketBridge: tells the record, and through it every socket, what a run does; the only writer, one method per kind."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from netra import errors, ids
from netra.events.v1 import events_pb2
from services.dispatcher import kinds, ledger, masks, outbox
from services.dispatcher.tools import calls, results

# what a step is kept as: its key, and its result
Step = tuple[str, Mapping[str, Any]]
# what has an effect begins no later than this before the end of the lease, and ends what it runs by then
MARGIN_S = 1.0
_PARTING_S = 1.0


@dataclass(frozen=True, slots=True)
class Health:
    """How far a run is ahead of its record."""

    waiting: int
    waiting_bytes: int
    unanswered_s: float


class AgentWebSocketBridge:
    """What one run has to tell, and in whose name: the agent of the run, or one that does a part of its work.

    Every method raises `InvalidPayload` naming the field when its data is not what the kind promises; then nothing is told.
    """

    def __init__(
        self,
        to: outbox.Appends,
        run: outbox.Owned,
        next_seq: int,
        agent_name: str,
        *,
        agent_version: str = "",
        ends_with_tool: bool = False,
    ) -> None:
        self._record, self._run = outbox.Outbox(to, run, next_seq), run
        self._add: Callable[[outbox.Entry], None] = self._record.add
        self._agent = {"agent_id": run.run_id, "agent_name": agent_name}
        self._version = agent_version
        self._ends_with_tool = ends_with_tool
        # the calls that were told to begin here, and have not ended: whether each has effects
        self._begun: dict[str, bool] = {}

    def under(self, agent_name: str) -> AgentWebSocketBridge:
        """The same record, told in the name of another agent."""
        other = copy.copy(self)
        other._agent = {**self._agent, "agent_name": agent_name}
        return other

    def started(self, depth: int, message: str, step: Step | None = None) -> None:
        """The run begins."""
        data = {"status": "started", "agent_version": self._version, "message": message, "depth": depth}
        self._emit("agent_started", data, step=_kept(step), held=True)

    def thinking(self, reasoning: str, step_number: int, progress: float | None, step_key: str, at: float = 0.0) -> None:
        """The agent considers something; a step of its own, which ends `at` this time, in seconds since 1970."""
        data = {"reasoning": reasoning, "step_number": step_number, "status": "thinking", **_given(progress_percentage=progress)}
        self._emit("agent_thinking", data, step=(step_key, orjson.dumps({"at": at})), held=True)

    def delta(self, text: str) -> None:
        """Text as it is produced: shown to those who watch, not recorded."""
        self._show("agent_delta", {"text": text})

    def step(self, key: str, result: object, *, opens: str = "") -> None:
        """A step without an event. One that says that another begins (`opens`) is left out when that one is over by then."""
        self._add(outbox.Entry(None, events_pb2.Step(key=key, result=orjson.dumps(result)), opens=opens, held=bool(opens)))

    def tool_executing(self, call: calls.Call, step_key: str, effects: bool) -> None:
        """A call begins, as this step. One without `effects` waits a moment: it may be over before it is recorded."""
        intent, masked = _intent(call, step_key)
        data = {
            "tool_name": call.tool, "tool_version": call.version, "tool_call_id": call.tool_call_id,
            "parameters": intent.arguments, "status": "executing", **_paths(masked),
        }  # fmt: skip
        step = intent.step() if step_key else None
        self._begun[call.tool_call_id] = effects
        self._emit("tool_executing", data, tool_call_id=call.tool_call_id, step=step, opens=step_key, held=not effects)

    def tool_again(self, call: calls.Call, step_key: str, attempt: int) -> None:
        """A call that an earlier owner began is made again, by its owner of this number; it was told when it began."""
        key, kept = _intent(call, step_key, attempt)[0].step()
        self._add(outbox.Entry(None, events_pb2.Step(key=key, result=kept), opens=step_key))

    def tool_progress(self, call: calls.Call, progress: float | None, message: str | None, *, transient: bool = True) -> None:
        """How far a call has come; shown to those who watch, or recorded as well."""
        data = {
            "tool_name": call.tool, "tool_call_id": call.tool_call_id, "status": "executing",
            **_given(progress_percentage=progress, message=message),
        }  # fmt: skip
        (self._show if transient else self._emit)("tool_progress", data)

    def tool_completed(self, outcome: calls.Outcome, enforcement: Mapping[str, object], step_key: str, settled: str = "") -> None:
        """A call is over; its result is kept under the step's key, as it is. `settled` says how one that an earlier owner left was.

        One without effects waits a moment for what comes next; one with effects only as long as a step takes to follow at once.
        """
        call, kept = outcome.call, kept_of(outcome)
        effects = None if self._ends_with_tool else self._begun.pop(call.tool_call_id, None)
        data = {
            "tool_name": call.tool, "tool_call_id": call.tool_call_id,
            "execution_time_ms": outcome.execution_time_ms, "attempts": outcome.attempts, "enforcement": dict(enforcement),
            **kept, **_masked(outcome.result, outcome.error), **_given(settled=settled or None),
            **_given(degraded=outcome.degraded and outcome.degraded.told()),
        }  # fmt: skip
        step = ledger.committed(
            step_key, kept, tool=call.tool, version=call.version, tool_call_id=call.tool_call_id, attempts=outcome.attempts,
            execution_time_ms=outcome.execution_time_ms, enforcement=enforcement,
            answered_by=outcome.degraded.answered if outcome.degraded is not None else "", stopped=outcome.stopped, at=outcome.at,
        )  # fmt: skip
        self._emit(
            "tool_completed",
            data,
            tool_call_id=call.tool_call_id,
            step=(step_key, orjson.dumps(step)) if step_key else None,
            end=self._ends_with_tool,
            held=effects is False,
            brief=effects is True,
        )

    def message_created(self, message_id: str, role: str, content: str, step: Step | None = None) -> None:
        """A message was added to the thread."""
        self._emit("message_created", {"message_id": message_id, "role": role, "content": content}, step=_kept(step), held=True)

    def suspended(
        self, waits_for: str, message: str | None = None, approval_id: str | None = None, until: str | None = None, step: Step | None = None
    ) -> None:
        """The run waits for a `message`, an `approval` or a `timer`; until when at the latest, RFC 3339."""
        data = {"status": "suspended", "waits_for": waits_for, **_given(message=message, approval_id=approval_id, until=until)}
        self._emit("agent_suspended", data, step=_kept(step))

    def resumed(self, reason: str, suspended_ms: float, step: Step | None = None) -> None:
        """The run goes on: because of a `message`, an `approval` or a `timeout`."""
        self._emit("agent_resumed", {"status": "resumed", "reason": reason, "suspended_ms": suspended_ms}, step=_kept(step))

    def approval_requested(
        self, approval_id: str, message: str, call: calls.Call | None = None, expires_at: str | None = None, quorum: int = 1,
        step: Step | None = None,
    ) -> None:  # fmt: skip
        """A person is to decide, or several are, perhaps about a call."""
        masked = masks.Masked()
        about = {} if call is None else {"tool_name": call.tool, "parameters": masked.of(call.arguments, "parameters"), **_paths(masked)}
        more = _given(expires_at=expires_at, quorum=quorum if quorum > 1 else None)
        self._emit("approval_requested", {"approval_id": approval_id, "message": message, **about, **more}, step=_kept(step))

    def approval_resolved(
        self, approval_id: str, decision: str, by: str | None = None, comment: str | None = None, together: Sequence[str] = (),
        step: Step | None = None,
    ) -> None:  # fmt: skip
        """It was decided: `approve` or `reject`, by the last of those who did so together; or `expired` when nobody did in time."""
        more = _given(by=by, comment=comment, together=list(together) or None)
        self._emit("approval_resolved", {"approval_id": approval_id, "decision": decision, **more}, step=_kept(step))

    def quality_alert(self, severity: str, metric: str, current_value: float, threshold: float, message: str) -> None:
        """A measure of the agent's answers has crossed its threshold; of the user's record, but of no run."""
        data = {"severity": severity, "metric": metric, "current_value": current_value, "threshold": threshold, "message": message}
        self._emit("quality_alert", data, beside=True)

    def security_violation(self, violation: str, message: str, details: Mapping[str, Any] | None = None) -> None:
        """Something was tried that is not allowed; of the user's record, but of no run."""
        masked = masks.Masked()
        more = {} if details is None else {"details": masked.of(details, "details"), **_paths(masked)}
        self._emit("security_violation", {"violation": violation, "message": message, **more}, beside=True)

    def custom(self, kind: str, data: Mapping[str, Any], step: Step | None = None) -> None:
        """Something of an agent's own kind. Raises `InvalidPayload` for a kind that is the platform's."""
        if kind in kinds.KINDS:
            raise errors.InvalidPayload(f"{kind} is told by the platform alone; choose another name.", field="kind")
        masked = masks.Masked()
        self._emit(kind, {**masked.of(data, "data"), **_paths(masked)}, step=_kept(step))

    def completed(self, result: results.Result, execution_time_ms: float, usage: Mapping[str, object]) -> None:
        """The run has a result."""
        shown = {**result.told(), **_masked(result, None)}
        data = {"status": "completed", **shown, "execution_time_ms": execution_time_ms, "usage": dict(usage)}
        self._emit("agent_completed", data, end=True)

    def failed(self, error: errors.NetraError) -> None:
        """The run could not finish."""
        self._emit("agent_failed", {"message": error.message, **_masked(None, error)}, end=True)

    def timed_out(self, error: errors.NetraError) -> None:
        """The deadline passed."""
        self._emit("agent_timed_out", {"message": error.message, **_masked(None, error)}, end=True)

    def cancelled(self, by: str, stopped: Sequence[Mapping[str, object]], after_ms: float, *, confirmed: bool = True) -> None:
        """The run was cancelled, and what it ran is gone; or its agent did not heed it, and that is not `confirmed`."""
        data = {"by": by, "tools_stopped": list(stopped), "after_ms": after_ms, **({} if confirmed else {"confirmed": False})}
        self._emit("agent_cancelled", data, end=True)

    def fits(self, tell: Callable[[AgentWebSocketBridge], None]) -> bool:
        """Whether the record takes what waits, and what `tell` would tell after it, as it is: nothing of it is kept elsewhere before."""
        draft, entries = copy.copy(self), list[outbox.Entry]()
        draft._add = entries.append
        try:
            tell(draft)
        except errors.NetraError:
            return False
        return not self._record.has_large and not any(entry.is_large for entry in entries)

    async def barrier(self) -> None:
        """Returns when everything told so far is in the record. Raises `Fenced` when another owns the run."""
        await self._record.barrier()

    async def begun(self) -> None:
        """Returns when the begin of the run is in the record: one that has not begun there is not carried on. Raises as `barrier` does."""
        await self._record.begun()

    async def room(self) -> None:
        """Returns when the record has, or is about to have, what was told: an agent must not run away from its record."""
        await self._record.room()

    def mend(self) -> None:
        """Forget what the record refused, and what came after it; go on with the seq that was refused."""
        self._record.mend()

    def health(self) -> Health:
        """How far the run is ahead of its record."""
        return Health(*self._record.waiting, round(self._record.unanswered_s, 3))

    def leave(self) -> None:
        """Take nothing more: the process lets go of the run, and what it stops for that did not end."""
        self._record.leave()

    @property
    def left(self) -> bool:
        """Whether the process has let go of the run."""
        return self._record.left

    async def part(self) -> None:
        """Let go of the run, and give the record a moment for what was told until now: whoever goes on need not do it again."""
        self.leave()
        with contextlib.suppress(errors.NetraError, TimeoutError):
            async with asyncio.timeout(_PARTING_S):
                await self.barrier()

    def require_lease(self) -> None:
        """Raises `Fenced`, and lets go of the run, when another process may own it in a moment; or when this one has let go of it already:
        what was told since then is not in the record, that something begins with it.
        """
        until = self._run.leased_until()
        if self.left or (until and time.monotonic() > until - MARGIN_S):
            self.leave()
            raise errors.Fenced("The lease of the run is about to end, or was given up.")

    async def close(self) -> None:
        """Nothing more is told."""
        await self._record.close()

    def _emit(
        self, kind: str, data: Mapping[str, Any], *, tool_call_id: str = "", step: tuple[str, bytes] | None = None, end: bool = False,
        beside: bool = False, opens: str = "", held: bool = False, brief: bool = False,
    ) -> None:  # fmt: skip
        event = events_pb2.NewEvent(event_id=ids.EventId.new(), type=kind, data=self._checked(kind, data), tool_call_id=tool_call_id)
        if beside:
            self._record.add_beside(event)
            return
        kept = None if step is None else events_pb2.Step(key=step[0], result=step[1])
        self._add(outbox.Entry(event, kept, end, opens=opens, held=held, brief=brief))

    def _show(self, kind: str, data: Mapping[str, Any]) -> None:
        self._record.show(kind, self._checked(kind, data))

    def _checked(self, kind: str, data: Mapping[str, Any]) -> bytes:
        return kinds.written(kind, {**self._agent, **data})


def _intent(call: calls.Call, step_key: str, attempt: int = 1) -> tuple[ledger.Intent, masks.Masked]:
    """What is kept of a call before it is made, and what of it is not: secrets are not kept."""
    masked = masks.Masked()
    shown = masked.of(call.arguments, "parameters")
    return ledger.Intent(step_key, call.tool, call.version, call.tool_call_id, shown, not masked.paths, attempt), masked


def kept_of(outcome: calls.Outcome) -> dict[str, Any]:
    """An outcome as it is kept: status, with the result as it is, or the error."""
    kept: dict[str, Any] = {"status": outcome.status}
    kept |= outcome.result.told() if outcome.result is not None else {}
    return kept | ({"error": error_data(outcome.error)} if outcome.error is not None else {})


def _kept(step: Step | None) -> tuple[str, bytes] | None:
    return None if step is None else (step[0], orjson.dumps(step[1]))


def _given(**fields: object) -> dict[str, Any]:
    """The fields that there are."""
    return {name: value for name, value in fields.items() if value is not None}


def _paths(masked: masks.Masked) -> dict[str, Any]:
    return {"masked": masked.paths} if masked.paths else {}


def _masked(result: results.Result | None, error: errors.NetraError | None) -> dict[str, Any]:
    """Result and error as an event shows them: what keys call a secret is not in it."""
    is_elsewhere = result is not None and result.artifact is not None
    masked = masks.Masked(results.PREVIEW_BYTES if is_elsewhere else math.inf)
    shown: dict[str, Any] = {}
    if result is not None:
        value = masked.of(result.value, "result")
        if not is_elsewhere:
            shown["result"] = value
        elif masked.paths:
            shown |= {**result.told(), "preview": results.preview_of(orjson.dumps(value))}
    if error is not None:
        data = error_data(error)
        shown["error"] = {**data, "details": masked.of(data["details"], "error.details")}
    return {**shown, **_paths(masked)}


def error_data(error: errors.NetraError) -> dict[str, Any]:
    """The error as events carry it."""
    data: dict[str, Any] = {"code": error.code, "message": error.message, "details": dict(error.details)}
    if "support_code" in error.details:
        data["support_code"] = error.details["support_code"]
    return data
