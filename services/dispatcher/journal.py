"""AgentWebSocketBridge: appends the run's events and steps to the record, in order; the only writer."""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from netra import errors, ids
from netra.events.v1 import events_pb2
from services.dispatcher import appender
from services.dispatcher.tools import dispatch, results

_MAX_ENTRIES = 128
_MAX_BYTES = 512 * 1024
_MAX_WAITING = 1024


@dataclass(frozen=True, slots=True)
class _Entry:
    """An event, a step, or an event with the step it belongs to."""

    event: events_pb2.NewEvent | None
    step: events_pb2.Step | None
    end: bool

    @property
    def size(self) -> int:
        """Bytes of what it carries."""
        return (len(self.event.data) if self.event else 0) + (len(self.step.result) if self.step else 0)


class AgentWebSocketBridge:
    """What one run has to tell, and in whose name: the agent of the run, or one that does a part of its work."""

    def __init__(
        self,
        to: appender.Appender,
        run_id: ids.RunId,
        epoch: int,
        next_seq: int,
        agent_name: str,
        *,
        agent_version: str = "",
        ends_with_tool: bool = False,
    ) -> None:
        self._record = _Record(to, run_id, epoch, next_seq)
        self._agent = {"agent_id": run_id, "agent_name": agent_name}
        self._version = agent_version
        self._ends_with_tool = ends_with_tool

    def under(self, agent_name: str) -> AgentWebSocketBridge:
        """The same record, told in the name of another agent."""
        other = copy.copy(self)
        other._agent = {**self._agent, "agent_name": agent_name}
        return other

    def started(self, depth: int, message: str) -> None:
        """The run begins."""
        data = {"status": "started", "agent_version": self._version, "message": message, "depth": depth}
        self._emit("agent_started", data)

    def thinking(self, reasoning: str, step_number: int, progress: float | None, step_key: str) -> None:
        """The agent considers something; a step of its own."""
        data: dict[str, object] = {"reasoning": reasoning, "step_number": step_number, "status": "thinking"}
        if progress is not None:
            data["progress_percentage"] = progress
        self._emit("agent_thinking", data, step=(step_key, None))

    def step(self, key: str, result: object) -> None:
        """A step without an event."""
        self._record.add(_Entry(None, events_pb2.Step(key=key, result=orjson.dumps(result)), end=False))

    def tool_executing(self, call: dispatch.Call) -> None:
        """A call begins."""
        data = {
            "tool_name": call.tool, "tool_version": call.version, "tool_call_id": call.tool_call_id,
            "parameters": dispatch.masked(call.arguments), "status": "executing",
        }  # fmt: skip
        self._emit("tool_executing", data, tool_call_id=call.tool_call_id)

    def tool_completed(self, outcome: dispatch.Outcome, enforcement: Mapping[str, object], step_key: str) -> None:
        """A call is over; its result is kept under the step's key."""
        data: dict[str, object] = {
            "tool_name": outcome.call.tool, "tool_call_id": outcome.call.tool_call_id, "status": outcome.status,
            "execution_time_ms": outcome.execution_time_ms, "attempts": 1, "enforcement": enforcement,
        }  # fmt: skip
        data |= outcome.result.told() if outcome.result is not None else {}
        data |= {"error": error_data(outcome.error)} if outcome.error is not None else {}
        kept = {name: data[name] for name in ("status", "result", "result_ref", "preview", "error") if name in data}
        self._emit(
            "tool_completed",
            data,
            tool_call_id=outcome.call.tool_call_id,
            step=(step_key, kept) if step_key else None,
            end=self._ends_with_tool,
        )

    def tool_unknown(self, tool_call_id: str) -> None:
        """Nobody knows what became of a call: its owner died."""
        error = errors.OwnerLost("The process that ran the tool died; whether the tool finished is not known.")
        data = {
            "tool_name": "", "tool_call_id": tool_call_id, "status": "unknown", "error": error_data(error),
            "execution_time_ms": 0.0, "attempts": 1, "enforcement": {"tier": "trusted", "backend": "asyncio"},
        }  # fmt: skip
        self._emit("tool_completed", data, tool_call_id=tool_call_id, end=self._ends_with_tool)

    def message_created(self, message_id: str, role: str, content: str) -> None:
        """A message was added to the thread."""
        self._emit("message_created", {"message_id": message_id, "role": role, "content": content})

    def completed(self, result: results.Result, execution_time_ms: float, usage: Mapping[str, object]) -> None:
        """The run has a result."""
        data = {"status": "completed", **result.told(), "execution_time_ms": execution_time_ms, "usage": usage}
        self._emit("agent_completed", data, end=True)

    def failed(self, error: errors.NetraError) -> None:
        """The run could not finish."""
        self._emit("agent_failed", {"error": error_data(error), "message": error.message}, end=True)

    def timed_out(self, error: errors.NetraError) -> None:
        """The deadline passed."""
        self._emit("agent_timed_out", {"error": error_data(error), "message": error.message}, end=True)

    def cancelled(self, by: str, stopped: Sequence[Mapping[str, object]], after_ms: float) -> None:
        """The run was cancelled, and what it ran is gone."""
        self._emit("agent_cancelled", {"by": by, "tools_stopped": list(stopped), "after_ms": after_ms}, end=True)

    async def barrier(self) -> None:
        """Returns when everything told so far is in the record. Raises `Fenced` when another owns the run."""
        await self._record.barrier()

    async def room(self) -> None:
        """Returns when not too much waits to be recorded: an agent must not run away from its record."""
        await self._record.room()

    def mend(self) -> None:
        """Forget what the record refused, and what came after it; go on with the seq that was refused."""
        self._record.mend()

    def _emit(
        self, kind: str, data: Mapping[str, object], *, tool_call_id: str = "", step: tuple[str, object] | None = None, end: bool = False
    ) -> None:
        body = orjson.dumps({**self._agent, **data})
        event = events_pb2.NewEvent(event_id=ids.EventId.new(), type=kind, data=body, tool_call_id=tool_call_id)
        kept = None if step is None else events_pb2.Step(key=step[0], result=orjson.dumps(step[1]))
        self._record.add(_Entry(event, kept, end))


class _Record:
    """The record of one run. Appends are pipelined, one in flight at a time."""

    def __init__(self, to: appender.Appender, run_id: ids.RunId, epoch: int, next_seq: int) -> None:
        self._appender = to
        self._run_id, self._epoch, self._next_seq = run_id, epoch, next_seq
        self._entries: deque[_Entry] = deque()
        self._in_flight: asyncio.Future[None] | None = None
        self._idle, self._room = asyncio.Event(), asyncio.Event()
        self._idle.set()
        self._room.set()
        self._broken: BaseException | None = None

    async def barrier(self) -> None:
        await self._idle.wait()
        if self._broken is not None:
            raise self._broken

    async def room(self) -> None:
        await self._room.wait()

    def mend(self) -> None:
        self._entries.clear()
        self._broken = None

    def add(self, entry: _Entry) -> None:
        self._entries.append(entry)
        if len(self._entries) >= _MAX_WAITING:
            self._room.clear()
        self._send()

    def _send(self) -> None:
        if self._in_flight is not None or self._broken is not None:
            return
        if not self._entries:
            self._idle.set()
            return
        self._idle.clear()
        request = self._next_append()
        self._in_flight = self._appender.append(request)
        self._in_flight.add_done_callback(lambda done: self._committed(done, len(request.events)))

    def _next_append(self) -> events_pb2.AppendRequest:
        request = events_pb2.AppendRequest(run_id=self._run_id, epoch=self._epoch, first_seq=self._next_seq)
        size = 0
        for _ in range(_MAX_ENTRIES):
            if not self._entries or (size and size + self._entries[0].size > _MAX_BYTES):
                break
            entry = self._entries.popleft()
            size += entry.size
            # an event and the step it belongs to are recorded together or not at all
            request.events.extend([entry.event] if entry.event is not None else [])
            request.steps.extend([entry.step] if entry.step is not None else [])
            request.end = entry.end
        if len(self._entries) < _MAX_WAITING:
            self._room.set()
        return request

    def _committed(self, done: asyncio.Future[None], count: int) -> None:
        self._in_flight = None
        self._broken = asyncio.CancelledError() if done.cancelled() else done.exception()
        if self._broken is not None:
            self._idle.set()
            self._room.set()
        else:
            self._next_seq += count
            self._send()


def error_data(error: errors.NetraError) -> dict[str, Any]:
    """The error as events carry it."""
    data: dict[str, Any] = {"code": error.code, "message": error.message, "details": dict(error.details)}
    if "support_code" in error.details:
        data["support_code"] = error.details["support_code"]
    return data
