"""A call that was let in, on its way to a result: as often as its tool allows, then by the tool that stands in for it."""

from __future__ import annotations

import asyncio
import copy
import functools
import random
import time
import traceback
from collections.abc import Callable, Container, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

import orjson
import stamina

from chassis import lifecycle, log, telemetry
from netra import errors
from netra.tool import Settled, ToolSpec
from services.dispatcher import ledger
from services.dispatcher.tools import calls, permits, provided, registry, results
from services.dispatcher.tools.sandbox import guardian, trusted, workers

_log = log.get(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_KILLED = "exit_code"
_GRACE_S = 5.0
# what another tool may be able to do: not a refusal, nor what the caller did wrong, nor for want of a wall
_STANDS_IN = frozenset(
    {"UNAVAILABLE", "DEADLINE_EXCEEDED", "TOOL_FAILED", "RESOURCE_EXHAUSTED", "INTERNAL", "OWNER_LOST", "RATE_LIMITED", "BUSY"}
)
# what says that a tool is not well; of one that runs what its caller sends, less does
_UNWELL = frozenset({"UNAVAILABLE", "DEADLINE_EXCEEDED", "TOOL_FAILED", "INTERNAL"})
_UNWELL_OF_FOREIGN = frozenset({"UNAVAILABLE", "INTERNAL"})


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be done: the call, as which step, told to whom, and until when at the latest, by the monotonic clock.

    `again` when an earlier owner of the run may have made it already; `only` are the names of the tools that may be called for it.
    """

    call: calls.Call
    reporter: calls.Reporter
    hears: provided.Hears
    step_key: str
    until: float
    again: bool = False
    only: Container[str] | None = None


@dataclass(slots=True)
class Answer:
    """What it came to."""

    enforcement: Mapping[str, object]
    result: results.Result | None = None
    error: errors.NetraError | None = None
    attempts: int = 0
    degraded: calls.Degraded | None = None
    # another may own the run in a moment: it was not made, and that is told nobody
    fenced: bool = False


class _Again(Exception):
    """An attempt that failed in a way that may pass. It says nothing, as what the tool said may be a secret."""

    def __init__(self, error: errors.NetraError, number: int, left_s: float) -> None:
        super().__init__()
        self.error, self.number, self.left_s = error, number, left_s


class Attempts:
    """The calls of one dispatcher, whose tasks are in `tasks`. `allow` raises what stands against a tool for this user by now."""

    def __init__(
        self, frame: provided.Frame, mine: permits.Permits, tasks: lifecycle.Tasks,
        allow: Callable[[registry.Registered, Container[str] | None], None],
    ) -> None:  # fmt: skip
        self._frame, self._permits, self._tasks, self._allow = frame, mine, tasks, allow
        self._user = frame.context.user_id
        self._apart: workers.Workers | None = None

    async def answer(self, tool: registry.Registered, asked: Asked) -> Answer:
        """What a call comes to. Raised is only a cancellation, when what it ran is gone (or `trusted.StillRunning`), and `Fenced`."""
        first = await self._through(tool, asked)
        if first.error is None or not _may_be_stood_in_for(tool.spec, first, asked) or time.monotonic() >= asked.until:
            return first
        other, name = None, tool.spec.fallback
        try:
            other = self._frame.means.tools.get(name)
            self._allow(other, asked.only)
            other.check_arguments(dict(asked.call.arguments))
            second = await self._through(other, asked)
        except errors.NetraError as error:
            second = Answer(first.enforcement, error=error)
        first.attempts += second.attempts
        if second.error is not None:
            first.error.details["fallback"] = f"{name}: {second.error.code}"
            return first
        _log.warning("another tool answered", tool=tool.spec.name, instead=name, reason=first.error.code)
        second.degraded = calls.Degraded(tool.spec.name, name, first.error.code)
        second.attempts = first.attempts
        return second

    async def reconciled(self, tool: registry.Registered, asked: Asked) -> tuple[Settled | None, results.Result | None]:
        """What a tool says of a call that may have been made, with the result; None when it cannot tell. Raises what is wrong with that."""
        spec, until = tool.spec, min(asked.until, time.monotonic() + tool.spec.timeout_s)
        if spec.reconcile is None:
            return None, None
        given = self._given(spec, asked, until)
        try:
            async with asyncio.timeout(until - time.monotonic()):
                await self._permits.awaited(spec)
            ask = functools.partial(spec.reconcile, given, asked.call.arguments)
            said = await trusted.bounded(f"reconcile of {spec.name}", ask, until - time.monotonic(), self._tasks)
            settled = said if isinstance(said, Settled) else None
        except Exception as error:
            _log.warning("a tool cannot tell what became of a call", tool=spec.name, code=_shown(spec.name, error).code)
            return None, None
        finally:
            await given.close()
        if settled is None or not settled.done:
            return settled, None
        tool.check_result(settled.result)
        return settled, await self._kept(spec, asked, settled.result)

    async def _kept(self, spec: ToolSpec, asked: Asked, value: object) -> results.Result:
        keep = functools.partial(self._frame.files.keep, f"{asked.call.tool_call_id}:result")
        return await results.recorded(value, spec.name, f"{spec.name}.json", keep, errors.ToolFailed)

    def enforcement(self, spec: ToolSpec | None) -> Mapping[str, object]:
        """How the calls of a tool are contained; None is a tool that there is not."""
        if spec is None or spec.enforcement == "trusted":
            return trusted.enforcement(spec)
        found = self._frame.means.sandboxes.availability(spec.enforcement)
        facts = dict(found.facts)
        quota = {"disk_quota": facts.pop("disk_quota")} if "disk_quota" in facts else {}
        return {"tier": found.tier, "backend": found.backend, **quota, **({"facts": facts} if facts else {})}

    async def close(self) -> None:
        """End what only these calls used."""
        if self._apart is not None:
            await self._apart.close()

    async def _through(self, tool: registry.Registered, asked: Asked) -> Answer:
        spec, breakers = tool.spec, self._frame.means.breakers
        answer = Answer(self.enforcement(spec))
        try:
            passed = breakers.enter(spec.name, self._user)
        except errors.Unavailable as refused:
            answer.error = refused
            return answer
        heard = False
        try:
            value = await self._placed(tool, asked, answer)
            breakers.succeeded(passed, spec.name, self._user)
            heard = True
            answer.result = await self._kept(spec, asked, value)
        except Exception as error:
            if answer.fenced:
                # whatever the tool made of it
                raise errors.Fenced from None
            answer.error = _shown(spec.name, error)
            if not heard and answer.attempts and _unwell(spec, answer.error):
                breakers.failed(passed, spec.name, self._user)
                heard = True
        finally:
            if not heard:
                breakers.left(passed)
        if spec.enforcement != "trusted":
            # it may have been probed since
            answer.enforcement = self.enforcement(spec)
        return answer

    async def _placed(self, tool: registry.Registered, asked: Asked, answer: Answer) -> object:
        """What the tool returns, once there is a place for it."""
        spec, until = tool.spec, min(asked.until, time.monotonic() + tool.spec.timeout_s)
        if not (spec.side_effects or spec.concurrency or spec.retries) and spec.enforcement == "trusted" and spec.backend == "asyncio":
            return await self._once(tool, asked, until, answer)
        within_s, why, places, slot = until - time.monotonic(), "the record could not be written", None, False
        try:
            try:
                async with asyncio.timeout(within_s):
                    if spec.side_effects:
                        await asked.reporter.barrier()
                    why = f"the tier {spec.enforcement} was still being probed"
                    if spec.enforcement != "trusted":
                        await self._frame.means.sandboxes.tier(spec.enforcement)
                    why = "other calls took all its places"
                    places = await self._frame.means.take(spec, self._user)
                    if spec.backend == "process":
                        await self._frame.files.slots.acquire()
                        slot = True
            except TimeoutError:
                raise _late(spec, within_s, why) from None
            return await (self._repeated if spec.retries else self._once)(tool, asked, until, answer)
        finally:
            if slot:
                self._frame.files.slots.release()
            if places is not None:
                places.give_back(self._user)

    async def _repeated(self, tool: registry.Registered, asked: Asked, until: float, answer: Answer) -> object:
        try:
            async for attempt in stamina.retry_context(on=_pause, attempts=tool.spec.retries + 1, timeout=None):
                with attempt:
                    try:
                        return await self._once(tool, asked, until, answer)
                    except Exception as error:
                        if not _may_pass(error):
                            raise
                        raise _Again(_shown(tool.spec.name, error), answer.attempts, until - time.monotonic()) from None
        except _Again as last:
            raise last.error from None
        raise errors.Internal

    async def _once(self, tool: registry.Registered, asked: Asked, until: float, answer: Answer) -> object:
        spec, within_s = tool.spec, until - time.monotonic()
        with telemetry.Step(f"tool {spec.name}", tool_call_id=asked.call.tool_call_id):
            # after all that may take long: what was allowed when it began may not be any more
            if not self._permits.ready(spec):
                try:
                    async with asyncio.timeout(within_s):
                        await self._permits.awaited(spec)
                except TimeoutError:
                    raise _late(spec, within_s, "whether you still may is not known while auth cannot be reached") from None
            tool.called()
            answer.attempts += 1
            asked.hears.attempted()
            value = await self._function(spec, asked, until, functools.partial(_begins, spec, asked, answer))
            tool.check_result(value)
            return value

    async def _function(self, spec: ToolSpec, asked: Asked, until: float, begins: Callable[[], None]) -> object:
        # what one attempt does to its arguments is nothing to the next
        may_follow = spec.retries or spec.fallback
        arguments = copy.deepcopy(dict(asked.call.arguments)) if may_follow else asked.call.arguments
        if spec.backend == "asyncio" and not spec.context_parameter:
            return await trusted.bounded(spec.name, functools.partial(_begun, begins, spec, arguments), _left(until), self._tasks)
        given = self._given(spec, asked, until, begins)
        try:
            if spec.backend == "worker":
                return await self._owned(self._warm(spec, arguments, given, begins), until)
            if spec.backend == "sandbox":
                return await self._owned(_program(spec, arguments, given), until)
            # for what the tool starts in a process of its own
            outer = guardian.current.set(self._frame.means.sandboxes.guard)
            try:
                mine = {spec.context_parameter: given} if spec.context_parameter else {}
                begun = functools.partial(_begun, begins, spec, {**arguments, **mine})
                return await trusted.bounded(spec.name, begun, _left(until), self._tasks)
            finally:
                guardian.current.reset(outer)
        finally:
            await given.close()

    def _given(self, spec: ToolSpec, asked: Asked, until: float, begins: Callable[[], None] = lambda: None) -> provided.Provided:
        step = asked.step_key or asked.call.tool_call_id
        # the tool that stands in for another does something else
        key = ledger.effect_key(self._frame.context.run_id, step if spec.name == asked.call.tool else f"{step}~{spec.name}")
        return provided.Provided(self._frame, asked.hears, asked.call, spec, until, key, begins)

    async def _warm(self, spec: ToolSpec, arguments: Mapping[str, Any], given: provided.Provided, begins: Callable[[], None]) -> object:
        if self._frame.apart and self._apart is None:
            self._apart = self._frame.means.sandboxes.apart()
        warm = self._apart or self._frame.means.sandboxes.warm
        async with given.folder() as folder:
            return await warm.run(
                spec.function.__module__, spec.function.__qualname__, arguments, user=self._user, timeout_s=given.left_s, folder=folder,
                begins=begins,
            )  # fmt: skip

    async def _owned(self, work: Coroutine[Any, Any, object], until: float) -> object:
        """Do it in a task of the dispatcher's, which ends it with itself. A cancel is raised when it is over."""
        task = self._tasks.spawn(_captured(work), name="contained call")
        stopped: asyncio.CancelledError | None = None
        patience_s = _left(until) + _GRACE_S
        while not task.done():
            try:
                # what contains it ends it at its time; should that hang, it is ended from here
                if not (await asyncio.wait({task}, timeout=patience_s))[0]:
                    break
            except asyncio.CancelledError as cancel:
                stopped, patience_s = cancel, _GRACE_S
                task.cancel()
        if not task.done():
            task.cancel()
            if stopped is not None:
                raise trusted.StillRunning
            raise errors.DeadlineExceeded("The call did not end in its time, and was given up.")
        if stopped is not None:
            raise stopped
        value, error = task.result()
        if error is not None:
            raise error
        return value


def _begins(spec: ToolSpec, asked: Asked, answer: Answer) -> None:
    """Asked in the very place where a function begins: whatever was waited for before, another may own the run by then."""
    if spec.side_effects:
        answer.fenced = True
        asked.reporter.require_lease()
        answer.fenced = False


def _begun(begins: Callable[[], None], spec: ToolSpec, arguments: Mapping[str, Any]) -> Any:
    begins()
    return spec.function(**arguments)


async def _captured(work: Coroutine[Any, Any, object]) -> tuple[object, Exception | None]:
    # an error of the tool is its answer, not a failure of the task's owner
    try:
        return await work, None
    except Exception as error:
        return None, error


async def _program(spec: ToolSpec, arguments: Mapping[str, Any], given: provided.Provided) -> object:
    """A plain function of the tier `python`: imported and called behind the walls, with its arguments by name."""
    name = spec.function.__name__
    code = f"from {spec.function.__module__} import {name} as _function\nresult = _function(**arguments)"
    ended = await given.ran(code=code, arguments=arguments, module=spec.function.__module__)
    return orjson.loads(ended.result)


def _pause(error: Exception) -> bool | float:
    """How long to wait until the next attempt; False when there is none."""
    if not isinstance(error, _Again):
        return False
    wait_s = min(_FIRST_PAUSE_S * 2 ** (error.number - 1), _LONGEST_PAUSE_S) * random.uniform(0.5, 1.5)  # noqa: S311 - no secret
    if error.error.retry_after_ms is not None:
        wait_s = max(wait_s, error.error.retry_after_ms / 1000)
    return wait_s if wait_s < error.left_s else False


def _may_pass(error: Exception) -> bool:
    if isinstance(error, errors.NetraError):
        # killed from outside, or for want of memory of the machine: not by what it was given
        killed = isinstance(error, errors.ToolFailed) and str(error.details.get(_KILLED, "")).startswith("-")
        return error.retryable or killed
    return isinstance(error, ConnectionError | TimeoutError)


def _may_be_stood_in_for(spec: ToolSpec, answer: Answer, asked: Asked) -> bool:
    # what may have changed something outside must not be done a second time in another way
    begun = spec.side_effects and (answer.attempts > 0 or asked.again)
    return bool(spec.fallback) and not begun and answer.error is not None and answer.error.code in _STANDS_IN


def _unwell(spec: ToolSpec, error: errors.NetraError) -> bool:
    foreign = spec.enforcement != "trusted" and spec.backend != "sandbox"
    return error.code in (_UNWELL_OF_FOREIGN if foreign else _UNWELL)


def _left(until: float) -> float:
    # to the millisecond: it stands in messages
    return round(max(until - time.monotonic(), 0.0), 3)


def _late(spec: ToolSpec, within_s: float, why: str) -> errors.DeadlineExceeded:
    return errors.DeadlineExceeded(f"{spec.name} was not called within {max(round(within_s, 3), 0):g} s: {why}.", tool=spec.name)


def _shown(name: str, error: Exception) -> errors.NetraError:
    if isinstance(error, errors.NetraError):
        return error
    # where, not what: its words may quote an argument, and so a secret
    _log.warning("a tool failed", tool=name, error=type(error).__name__, where=traceback.format_tb(error.__traceback__))
    return errors.ToolFailed(f"{name} failed with {type(error).__name__}.", tool=name)
