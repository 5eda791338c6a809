"""UnifiedToolDispatcher: one call, from a name and arguments to a reported outcome; and the factory that makes dispatchers."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncIterator, Container, Mapping
from typing import Any, Literal, Self, get_args

from chassis import lifecycle, log
from netra import deadline, errors, ids
from netra.context import UserExecutionContext
from netra.tool import Settled, ToolSpec
from services.dispatcher import ledger
from services.dispatcher.tools import arguments as given
from services.dispatcher.tools import attempts, calls, means, metrics, permits, provided, registry, results, workspace
from services.dispatcher.tools.calls import Call, Outcome, Reporter, Stopped
from services.dispatcher.tools.sandbox import sandboxes, trusted

__all__ = ["MAX_ARGUMENT_BYTES", "Call", "Dispatchers", "Outcome", "Reporter", "Stopped", "Strategy", "UnifiedToolDispatcher"]
_log = log.get(__name__)
MAX_ARGUMENT_BYTES = given.MAX_BYTES
Strategy = Literal["default", "admin", "isolated"]
_ADMIN = "admin"
# a coroutine that does not heed its cancellation for so long is left to itself when its dispatcher closes
_GRACE_S = 3.0
_KEY = object()
_REMEDY = "A UnifiedToolDispatcher is made by its factory: `async with Dispatchers(...).for_context(context, permits, ...) as tools`."


class Dispatchers:
    """Makes the dispatchers of a process, each for one execution context, and knows those that are open."""

    def __init__(
        self, tools: registry.ToolRegistry, contained: sandboxes.Sandboxes | None = None, rules: means.Rules = means.Rules(),  # noqa: B008
        secrets: means.Secrets | None = None,
    ) -> None:  # fmt: skip
        self.tools = tools
        self._means = means.Means(tools, contained or sandboxes.Sandboxes(), rules, secrets)

    @contextlib.asynccontextmanager
    async def for_context(
        self, context: UserExecutionContext, mine: permits.Permits, reporter: calls.Reporter, files: workspace.Workspace,
        *, strategy: Strategy = "default", deadline_s: float | None = None, held: bool = False, most: int = 0,
    ) -> AsyncIterator[UnifiedToolDispatcher]:  # fmt: skip
        """A dispatcher for the time of the block. After it nothing of it is left, and the files of the run are gone.

        `deadline_s` is how long the run has from now. `held`: it belongs to a run that was accepted, so that it is not counted against
        what the user may have open, nor closed in favour of another; `most` is what this user may have open, when that is more than the
        rules say. Raises `PermissionDenied` for the strategy `admin` without the role, `QuotaExceeded`, `ValueError`.
        """
        if strategy not in get_args(Strategy):
            raise ValueError(f"there are the strategies {', '.join(get_args(Strategy))}, and not {strategy!r}")
        if strategy == "admin" and _ADMIN not in context.roles:
            refused = errors.PermissionDenied("A dispatcher of the strategy admin is for the role admin alone.", roles=_ADMIN)
            mine.note("tools of admins", refused)
            raise refused
        frame = provided.Frame(context, files, self._means, apart=strategy == "isolated")
        made = UnifiedToolDispatcher(self._means, frame, mine, reporter, strategy, deadline_s, key=_KEY)
        try:
            await self._means.book.enter(context.user_id, made, held=held, most=most)
            yield made
        finally:
            await made.close()

    def require_room(self, user_id: str, most: int = 0) -> None:
        """Raises `ResourceExhausted` when there are too many calls just now, `QuotaExceeded` when the user can open no dispatcher."""
        self._means.require_room(user_id)
        self._means.book.require_room(user_id, most)

    @property
    def live(self) -> int:
        """How many dispatchers are open."""
        return self._means.book.live()

    def live_of(self, user_id: str) -> int:
        """How many dispatchers a user has open."""
        return self._means.book.live(user_id)

    @property
    def running(self) -> int:
        """How many calls were let in and have not ended."""
        return self._means.running

    async def close(self) -> None:
        """Close all that are open."""
        await self._means.book.close()


class UnifiedToolDispatcher:
    """The calls of one execution context; nothing in it outlives the context, or is any other user's. Made by `Dispatchers` only."""

    def __init__(
        self, shared: means.Means, frame: provided.Frame, mine: permits.Permits, reporter: calls.Reporter, strategy: Strategy,
        deadline_s: float | None, *, key: object = None,
    ) -> None:  # fmt: skip
        self._means, self._context, self._permits, self._reporter, self._frame = shared, frame.context, mine, reporter, frame
        self.strategy = strategy
        self._ends_at = math.inf if deadline_s is None else time.monotonic() + deadline_s
        self._tasks = lifecycle.Tasks(on_failure=_logged)
        self._attempts = attempts.Attempts(frame, mine, self._tasks, self._allow)
        self._metrics = metrics.Metrics(frame.context.user_id)
        self._active, self._idle = 0, asyncio.Event()
        self._idle.set()
        self._open = True
        self.calls = 0
        self.last: calls.Outcome | None = None
        self.stopped: list[calls.Stopped] = []

    @classmethod
    def for_context(
        cls, context: UserExecutionContext, tools: registry.ToolRegistry, mine: permits.Permits, reporter: Reporter,
        files: workspace.Workspace, *, strategy: Strategy = "default", deadline_s: float | None = None,
    ) -> contextlib.AbstractAsyncContextManager[UnifiedToolDispatcher]:  # fmt: skip
        """One that shares nothing but tools with others, and has no sandboxes; see `Dispatchers.for_context`."""
        return Dispatchers(tools).for_context(context, mine, reporter, files, strategy=strategy, deadline_s=deadline_s)

    def __new__(cls, *_made: object, **_more: object) -> Self:
        """Raises `RuntimeError` but for the factory."""
        if _more.get("key") is not _KEY:
            raise RuntimeError(_REMEDY)
        return super().__new__(cls)

    @property
    def dispatcher_id(self) -> str:
        """Its name in its metrics."""
        return self._metrics.dispatcher_id

    @property
    def busy(self) -> bool:
        """Whether it has a call that has not ended."""
        return self._active > 0

    def metrics(self) -> metrics.Snapshot:
        """What it has done so far."""
        return self._metrics.snapshot()

    def discover(
        self, wanted: registry.Wanted = registry.Wanted(), *, after: str = "", most: int = 0  # noqa: B008 - frozen
    ) -> registry.Page:  # fmt: skip
        """The tools that may be called in this context and that are looked for, by name; see `ToolRegistry.discover`."""
        page = self._means.tools.discover(self._permits, wanted, after=after, most=most)
        if self.strategy == "admin":
            return page
        return registry.Page([tool for tool in page.tools if tool.spec.min_role != _ADMIN], page.more)

    async def execute(
        self, name: str, arguments: Mapping[str, Any], *, step_key: str = "", reporter: calls.Reporter | None = None,
        timeout_s: float | None = None, tool_call_id: ids.ToolCallId | None = None, only: Container[str] | None = None,
    ) -> calls.Outcome:  # fmt: skip
        """Call a tool; it has until the least of its own deadline, `timeout_s`, the caller's and that of the run.

        `tool_call_id` is that of a call that an earlier owner of the run began; with `only`, tools of other names are refused. Always
        reports a pair of `tool_executing` and `tool_completed`; only a cancellation is raised, `FailedPrecondition` when the dispatcher is
        closed, and `Fenced` when the run may be another's in a moment.
        """
        if not self._open:
            raise errors.FailedPrecondition("The execution context is closed; no tool can be called in it.")
        self.calls += 1
        self._active += 1
        self._idle.clear()
        self._means.book.used(self._context.user_id, self)
        left_s = deadline.timeout(timeout_s)
        until = self._ends_at if left_s is None else min(self._ends_at, time.monotonic() + left_s)
        try:
            told = _Told(self, tool_call_id or ids.ToolCallId.new(), name, arguments, reporter or self._reporter, step_key)
            return await self._executed(told, until, again=tool_call_id is not None, only=only)
        finally:
            self._active -= 1
            if not self._active:
                self._idle.set()

    async def reconcile(self, tool: registry.Registered, left: ledger.Call) -> tuple[Settled | None, results.Result | None]:
        """Ask a tool what became of a call that an earlier owner left: what it says, with the result when the call was made.

        None when it cannot tell. Raises what is wrong with the result of a call that was made.
        """
        told = _Told(self, ids.ToolCallId(left.tool_call_id), left.tool, left.arguments or {}, self._reporter, left.key)
        return await self._attempts.reconciled(tool, attempts.Asked(told.call, self._reporter, told, left.key, self._ends_at))

    async def _executed(self, told: _Told, until: float, *, again: bool, only: Container[str] | None) -> calls.Outcome:
        refused: errors.NetraError | None = None
        entered = False
        try:
            try:
                tool = await self._admitted(told, until, only)
                self._means.enter(self._context.user_id)
                entered = True
            except errors.NetraError as error:
                refused = error
            told.begins()
            if refused is not None:
                return told.ends(attempts.Answer(self._attempts.enforcement(told.spec), error=refused))
            asked = attempts.Asked(told.call, told.reporter, told, told.step_key, until, again, only)
            return told.ends(await self._attempts.answer(tool, asked))
        except asyncio.CancelledError as stopped:
            told.stops(confirmed=not isinstance(stopped, trusted.StillRunning))
            raise
        finally:
            if entered:
                self._means.leave(self._context.user_id)

    async def _admitted(self, told: _Told, until: float, only: Container[str] | None) -> registry.Registered:
        """The tool, when it may be called now: permission, what the tier is entitled to, the arguments. Raises what stands against it."""
        tool = self._means.tools.get(told.call.tool)
        self._allow(tool, only)
        if self._context.is_expired or until <= time.monotonic():
            raise errors.DeadlineExceeded(f"{tool.spec.name} was not called: the time of the run is over.", tool=tool.spec.name)
        # who calls too often is told so before anything takes long
        await self._permits.count()
        if told.unrecordable is not None:
            raise told.unrecordable
        tool.check_arguments(dict(told.call.arguments))
        return tool

    def _allow(self, tool: registry.Registered, only: Container[str] | None) -> None:
        """Raises `PermissionDenied`; it is on record then."""
        spec = tool.spec
        self._metrics.checked()
        try:
            self._permits.require(spec)
            if only is not None and spec.name not in only:
                raise errors.PermissionDenied(f"The tool {spec.name} is not one of those that this agent may call.", tool=spec.name)
            if spec.min_role == _ADMIN and self.strategy != "admin":
                message = f"The tool {spec.name} is for admins: it takes a dispatcher of the strategy admin."
                raise errors.PermissionDenied(message, roles=_ADMIN, tool=spec.name)
            self._means.quarantine.require(spec, self._context.user_id)
        except errors.PermissionDenied as refused:
            self._metrics.denied()
            self._permits.note(f"tool {spec.name}", refused)
            raise

    async def close(self) -> None:
        """End its calls, and all that is left of them. Calls after this are refused. Does nothing the second time."""
        if not self._open:
            return
        self._open = False
        self._means.book.leave(self._context.user_id, self)
        try:
            async with asyncio.timeout(_GRACE_S):
                await self._tasks.close()
                # those who wait for them tell what became of them
                await self._idle.wait()
        except TimeoutError:
            _log.error("a tool does not heed its cancellation; it is left to itself", tasks=len(self._tasks), calls=self._active)
        await self._attempts.close()
        await self._frame.files.remove()


class _Told:
    """Tells of one call, in a pair; and counts what is told."""

    __slots__ = ("_began", "_begun", "_dispatcher", "attempts", "call", "reporter", "spec", "step_key", "unrecordable")

    def __init__(
        self, dispatcher: UnifiedToolDispatcher, call_id: ids.ToolCallId, name: str, arguments: Mapping[str, Any],
        reporter: calls.Reporter, step_key: str,
    ) -> None:  # fmt: skip
        self._dispatcher, self.reporter, self.step_key = dispatcher, reporter, step_key
        self._began, self._begun, self.attempts = time.perf_counter(), False, 0
        self.unrecordable: errors.NetraError | None = None
        self.spec: ToolSpec | None = None
        with contextlib.suppress(errors.NotFound):
            self.spec = dispatcher._means.tools.get(name).spec
        try:
            given.written(arguments, "arguments")
        except errors.NetraError as error:
            self.unrecordable, arguments = error, {}
        self.call = calls.Call(call_id, name, self.spec.version if self.spec is not None else "", arguments)

    def begins(self) -> None:
        """The first of the pair, once."""
        if not self._begun:
            self._begun = True
            effects = self.spec is not None and self.spec.side_effects
            self.reporter.tool_executing(self.call, self.step_key, effects)
            self._dispatcher._metrics.told()

    def ends(self, answer: attempts.Answer, *, stopped: bool = False) -> calls.Outcome:
        """The second of the pair."""
        took_ms = round((time.perf_counter() - self._began) * 1000, 3)
        outcome = calls.Outcome(
            self.call, calls.status_of(answer.error), answer.result, answer.error, took_ms, answer.attempts, answer.degraded,
            answer.enforcement, stopped,
        )  # fmt: skip
        self._dispatcher.last = outcome
        self.reporter.tool_completed(outcome, answer.enforcement, self.step_key)
        self._dispatcher._metrics.told()
        self._dispatcher._metrics.ended(outcome, self.spec.name if self.spec is not None else "?")
        return outcome

    def stops(self, *, confirmed: bool) -> None:
        """It was cancelled."""
        call = self.call
        self._dispatcher.stopped.append(calls.Stopped(call.tool_call_id, time.monotonic(), confirmed))
        message = f"{call.tool} was stopped." if confirmed else f"{call.tool} was told to stop; whether it did is not known."
        self.begins()
        how = self._dispatcher._attempts.enforcement(self.spec)
        self.ends(attempts.Answer(how, error=errors.Cancelled(message), attempts=self.attempts), stopped=True)

    def attempted(self) -> None:
        """See `provided.Hears`."""
        self.attempts += 1

    def progress(self, percentage: float, message: str) -> None:
        """See `provided.Hears`."""
        self.reporter.tool_progress(self.call, percentage, message or None)
        self._dispatcher._metrics.told()

    def violated(self, spec: ToolSpec, error: errors.SecurityViolation) -> None:
        """See `provided.Hears`: it is counted, on record, shown to the user, and may take the tool from them."""
        mine = self._dispatcher
        mine._metrics.violated(spec.name)
        mine._permits.note(f"tool {spec.name}", error)
        user_id = mine._context.user_id
        _log.warning("what a tool ran tried what is forbidden", tool=spec.name, user_id=user_id, tool_call_id=self.call.tool_call_id)
        details: dict[str, Any] = {"tool_name": spec.name, "tool_call_id": self.call.tool_call_id, "tier": spec.enforcement}
        if mine._means.quarantine.violated(spec, user_id):
            _log.error("a tool is in quarantine", tool=spec.name, user_id=user_id)
            details["quarantined"] = True
        self.reporter.security_violation(error.code, error.message, details)
        mine._metrics.told()


def longest_s(tools: registry.ToolRegistry, name: str) -> float:
    """How long a call of a tool may take, with the one that may stand in for it. Raises `NotFound`."""
    spec = tools.get(name).spec
    with contextlib.suppress(errors.NotFound):
        return spec.timeout_s + (tools.get(spec.fallback).spec.timeout_s if spec.fallback else 0.0)
    return spec.timeout_s


def _logged(error: BaseException) -> None:
    _log.error("a tool's task failed", exc_info=error)
