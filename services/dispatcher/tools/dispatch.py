"""UnifiedToolDispatcher: one call, from a name and arguments to a reported outcome."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
import traceback
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from chassis import lifecycle, log, telemetry
from netra import errors, ids
from netra.context import UserExecutionContext
from netra.tool import ToolSpec
from services.dispatcher.tools import permits, registry, results, workspace
from services.dispatcher.tools.sandbox import trusted

_log = log.get(__name__)
MAX_ARGUMENT_BYTES = 256 * 1024
_STATUS = {"DEADLINE_EXCEEDED": "timeout", "PERMISSION_DENIED": "denied", "CANCELLED": "cancelled"}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of one tool."""

    tool_call_id: ids.ToolCallId
    tool: str
    version: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a call: `status` is success, error, timeout, denied, cancelled or unknown."""

    call: Call
    status: str
    result: results.Result | None
    error: errors.NetraError | None
    execution_time_ms: float

    def unwrap(self) -> Any:
        """The result. Raises the error when there is none."""
        if self.error is not None:
            raise self.error
        return self.result.value if self.result is not None else None


@dataclass(frozen=True, slots=True)
class Stopped:
    """A call that was running when its run was cancelled."""

    tool_call_id: ids.ToolCallId
    stopped_at: float
    confirmed: bool


class Reporter(Protocol):
    """Where calls are told of."""

    def tool_executing(self, call: Call) -> None:
        """A call begins."""

    def tool_completed(self, outcome: Outcome, enforcement: Mapping[str, object], step_key: str) -> None:
        """A call is over; its result is kept under the step's key."""

    async def barrier(self) -> None:
        """Returns when everything told so far is in the record."""


@dataclass(frozen=True, slots=True)
class _Told:
    """Whom a call is told to, as which step, and since when it runs."""

    reporter: Reporter
    spec: ToolSpec | None
    step_key: str
    began: float


class UnifiedToolDispatcher:
    """The calls of one execution context; nothing in it outlives the context. Made by `for_context` only."""

    def __init__(
        self, context: UserExecutionContext, tools: registry.ToolRegistry, mine: permits.Permits, reporter: Reporter,
        files: workspace.Workspace,
    ) -> None:  # fmt: skip
        self._context = context
        self._tools = tools
        self._permits = mine
        self._reporter = reporter
        self._workspace = files
        self._tasks = lifecycle.Tasks(on_failure=_logged)
        self._open = True
        self.calls = 0
        self.last: Outcome | None = None
        self.stopped: list[Stopped] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def for_context(
        cls, context: UserExecutionContext, tools: registry.ToolRegistry, mine: permits.Permits, reporter: Reporter,
        files: workspace.Workspace,
    ) -> AsyncIterator[UnifiedToolDispatcher]:  # fmt: skip
        """A dispatcher for the time of the block; calls after it are refused, and the files of the run are gone."""
        dispatcher = cls(context, tools, mine, reporter, files)
        try:
            yield dispatcher
        finally:
            dispatcher._open = False
            await files.remove()

    def check(self, name: str, arguments: Mapping[str, Any]) -> registry.Registered:
        """The tool, if it exists, may be called and takes these arguments. Raises what stands against it."""
        tool = self._tools.get(name)
        self._permits.require(tool.spec)
        if len(_json(arguments, "arguments")) > MAX_ARGUMENT_BYTES:
            raise errors.TooLarge(f"arguments must be at most {MAX_ARGUMENT_BYTES} bytes", field="arguments")
        tool.check_arguments(dict(arguments))
        return tool

    async def execute(self, name: str, arguments: Mapping[str, Any], *, step_key: str = "", reporter: Reporter | None = None) -> Outcome:
        """Call a tool. Always reports a pair of `tool_executing` and `tool_completed`; only a cancellation is raised."""
        if not self._open:
            raise errors.FailedPrecondition("The execution context is closed; no tool can be called in it.")
        self.calls += 1
        tool, refusal = self._checked(name, arguments)
        call = Call(ids.ToolCallId.new(), name, tool.spec.version if tool else "", arguments if _recordable(arguments) else {})
        told = _Told(reporter or self._reporter, tool.spec if tool else None, step_key, time.perf_counter())
        told.reporter.tool_executing(call)
        result = None
        try:
            result = await self._run(tool, call, told.reporter) if tool else None
        except asyncio.CancelledError as stopped:
            self._stopped(call, told, confirmed=not isinstance(stopped, trusted.StillRunning))
            raise
        except Exception as error:
            refusal = _shown(name, error)
        return self._report(call, told, result, refusal)

    def _checked(self, name: str, arguments: Mapping[str, Any]) -> tuple[registry.Registered | None, errors.NetraError | None]:
        try:
            return self.check(name, arguments), None
        except errors.NetraError as error:
            self._permits.note(f"tool {name}", error)
            return None, error

    async def _run(self, tool: registry.Registered, call: Call, reporter: Reporter) -> results.Result:
        spec = tool.spec
        # before all that may take long: who calls too often must not even wait
        await self._permits.count()
        if spec.side_effects:
            await _barrier(reporter, spec)
        with telemetry.span(f"tool {call.tool}") as span:
            span.set_attribute("netra.tool_call_id", call.tool_call_id)
            async with self._workspace.slots if spec.backend == "process" else contextlib.nullcontext():
                # after all that may take long: what was allowed when it began may not be any more
                await self._permits.awaited(spec)
                result = await trusted.run(spec, self._arguments(spec, call), spec.timeout_s, self._tasks)
            tool.check_result(result)
            keep = functools.partial(self._workspace.keep, f"{call.tool_call_id}:result")
            return await results.recorded(result, call.tool, f"{call.tool}.json", keep, errors.ToolFailed)

    def _arguments(self, spec: ToolSpec, call: Call) -> Mapping[str, Any]:
        if not spec.context_parameter:
            return call.arguments
        given = workspace.CallContext(self._context, call.tool_call_id, self._workspace)
        return {**call.arguments, spec.context_parameter: given}

    def _stopped(self, call: Call, told: _Told, *, confirmed: bool) -> None:
        self.stopped.append(Stopped(call.tool_call_id, time.monotonic(), confirmed))
        message = f"{call.tool} was stopped." if confirmed else f"{call.tool} was told to stop; whether it did is not known."
        self._report(call, told, None, errors.Cancelled(message))

    def _report(self, call: Call, told: _Told, result: results.Result | None, error: errors.NetraError | None) -> Outcome:
        status = "success" if error is None else _STATUS.get(error.code, "error")
        outcome = Outcome(call, status, result, error, round((time.perf_counter() - told.began) * 1000, 3))
        self.last = outcome
        told.reporter.tool_completed(outcome, trusted.enforcement(told.spec), told.step_key)
        return outcome


async def _barrier(reporter: Reporter, spec: ToolSpec) -> None:
    """No effect before everything is in the record. Raises `DeadlineExceeded` when that takes longer than the tool may."""
    try:
        async with asyncio.timeout(spec.timeout_s):
            await reporter.barrier()
    except TimeoutError:
        raise errors.DeadlineExceeded(f"{spec.name} was not called: the record could not be written within {spec.timeout_s:g} s.") from None


def _recordable(arguments: Mapping[str, Any]) -> bool:
    try:
        return len(_json(arguments, "arguments")) <= MAX_ARGUMENT_BYTES
    except errors.ToolFailed:
        return False


def _json(value: object, what: str) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError as error:
        raise errors.ToolFailed(f"{what} cannot be written as JSON: {error}") from None


def _shown(name: str, error: Exception) -> errors.NetraError:
    if isinstance(error, errors.NetraError):
        return error
    # where, not what: its words may quote an argument, and so a secret
    _log.warning("a tool failed", tool=name, error=type(error).__name__, where=traceback.format_tb(error.__traceback__))
    return errors.ToolFailed(f"{name} failed with {type(error).__name__}.", tool=name)


def _logged(error: BaseException) -> None:
    _log.error("a tool's task failed", exc_info=error)
