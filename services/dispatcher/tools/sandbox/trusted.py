"""The tier `trusted`: the operator's own coroutines, each in a task that can be stopped; what is heavy is done in `process`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from chassis import lifecycle
from netra import errors
from netra.tool import ToolSpec

# a coroutine that has not ended this long after its cancellation is reported as unconfirmed
_GRACE_S = 2.0


class StillRunning(asyncio.CancelledError):
    """The call was cancelled; whether the tool stopped is not known."""


def enforcement(spec: ToolSpec | None) -> dict[str, object]:
    """How the calls of a tool are contained; None is a tool that there is not."""
    return {"tier": "trusted", "backend": spec.backend if spec is not None else "asyncio"}


async def run(spec: ToolSpec, arguments: Mapping[str, Any], timeout_s: float, tasks: lifecycle.Tasks) -> object:
    """The tool's result.

    Raises what the tool raises, `DeadlineExceeded` after `timeout_s`, `StillRunning` when a cancel did not stop it.
    """
    task = tasks.spawn(_call(spec, arguments), name=f"tool {spec.name}")
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        if not task.done():
            after = "" if await _stopped(task) else " It was told to stop; whether it did is not known."
            raise errors.DeadlineExceeded(f"{spec.name} did not finish within {timeout_s:g} s.{after}")
        result, error = task.result()
        if error is not None:
            raise error
        return result
    except asyncio.CancelledError:
        if await _stopped(task):
            raise
        raise StillRunning from None


async def _call(spec: ToolSpec, arguments: Mapping[str, Any]) -> tuple[object, Exception | None]:
    # an error of the tool is its answer, not a failure of the task's owner
    try:
        return await spec.function(**arguments), None
    except asyncio.CancelledError:
        if lifecycle.told_to_stop():
            raise
        return None, errors.ToolFailed(f"{spec.name} cancelled itself.")
    except Exception as error:
        return None, error


async def _stopped(task: asyncio.Task[Any]) -> bool:
    task.cancel()
    await asyncio.wait({task}, timeout=_GRACE_S)
    return task.done()
