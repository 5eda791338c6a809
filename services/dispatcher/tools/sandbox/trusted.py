"""The tier `trusted`: the operator's own coroutines, each in a task that can be stopped; what is heavy is done in `process`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from chassis import lifecycle
from netra import errors
from netra.tool import ToolSpec
from services.dispatcher.tools.sandbox import blocking

# a coroutine that has not ended this long after its cancellation is reported as unconfirmed
_GRACE_S = 2.0


class StillRunning(asyncio.CancelledError):
    """The call was cancelled; whether the tool stopped is not known."""


def enforcement(spec: ToolSpec | None) -> dict[str, object]:
    """How the calls of a tool are contained; None is a tool that there is not."""
    return {"tier": "trusted", "backend": spec.backend if spec is not None else "asyncio"}


async def bounded(name: str, function: Callable[[], Any], timeout_s: float, tasks: lifecycle.Tasks) -> object:
    """What a coroutine function of a tool returns.

    Raises what it raises, `DeadlineExceeded` after `timeout_s`, `StillRunning` when a cancel did not stop it.
    """
    task = tasks.spawn(_call(name, function), name=f"tool {name}")
    try:
        if not await _done(task, timeout_s):
            after = "" if await _stopped(task) else " It was told to stop; whether it did is not known."
            raise errors.DeadlineExceeded(f"{name} did not finish within {timeout_s:g} s.{after}")
        result, error = task.result()
        if error is not None:
            raise error
        return result
    except asyncio.CancelledError:
        if await _stopped(task):
            raise
        raise StillRunning from None


async def _call(name: str, function: Callable[[], Any]) -> tuple[object, Exception | None]:
    # an error of the tool is its answer, not a failure of the task's owner
    try:
        return await blocking.Noticed(name, function()), None
    except asyncio.CancelledError:
        if lifecycle.told_to_stop():
            raise
        return None, errors.ToolFailed(f"{name} cancelled itself.")
    except Exception as error:
        return None, error


async def _stopped(task: asyncio.Task[Any]) -> bool:
    task.cancel()
    return await _done(task, _GRACE_S)


async def _done(task: asyncio.Task[Any], timeout_s: float) -> bool:
    """Whether the task ends in that time; it goes on if not. `asyncio.wait`, but for one, and in half of its time."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[None] = loop.create_future()

    def end(_task: object = None) -> None:
        if not over.done():
            over.set_result(None)

    timer = loop.call_later(timeout_s, end)
    task.add_done_callback(end)
    try:
        await over
    finally:
        timer.cancel()
        task.remove_done_callback(end)
    return task.done()
