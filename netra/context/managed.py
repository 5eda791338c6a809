"""What was opened for a context is closed with it: in reverse order, whether its work succeeded, failed or was cancelled."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable

from netra import deadline, errors
from netra.context.execution import UserExecutionContext

PATIENCE_S = 10.0
_log = logging.getLogger(__name__)
CleanUp = Callable[[], Awaitable[object] | object]


class Scope:
    """The life of one context. The context itself is frozen; what is to be cleaned up is kept here."""

    def __init__(self, context: UserExecutionContext, patience_s: float = PATIENCE_S) -> None:
        self.context = context
        self._patience_s = patience_s
        self._due: list[CleanUp] = []
        self._closing: asyncio.Task[list[Exception]] | None = None

    @property
    def closed(self) -> bool:
        """Whether all clean-up is done."""
        return self._closing is not None and self._closing.done()

    def on_close(self, callback: CleanUp) -> None:
        """Call this at the end, before what was given earlier. Raises `FailedPrecondition` when that has been."""
        if self.closed:
            raise errors.FailedPrecondition("The scope of the execution context is closed.")
        self._due.append(callback)

    async def close(self) -> None:
        """Run all callbacks, last given first, each once and for at most `patience_s`; a cancellation waits until they are done.

        One that fails keeps no other from running; the failures are logged and, in the end, raised as an `ExceptionGroup`.
        """
        first = self._closing is None
        if self._closing is None:
            # a task of its own, which this one waits for: cancelling the waiting one must not cut it short
            around = contextvars.copy_context()
            # `patience_s` is its time, not what the caller has left: of that there may be nothing
            around.run(deadline.bind, None)
            self._closing = asyncio.get_running_loop().create_task(self._clean_up(), context=around)
        cancelled: asyncio.CancelledError | None = None
        while not self._closing.done():
            try:
                await asyncio.wait([self._closing])
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        if first and (failures := self._closing.result()):
            raise ExceptionGroup("clean-up of an execution context failed", failures)

    async def _clean_up(self) -> list[Exception]:
        failures: list[Exception] = []
        while self._due:
            callback = self._due.pop()
            try:
                async with asyncio.timeout(self._patience_s):
                    done = callback()
                    if inspect.isawaitable(done):
                        await done
            except (Exception, asyncio.CancelledError) as error:
                # ids only: what a callback holds may be anything
                _log.exception("clean-up of execution context %s failed", self.context.context_id)
                failures.append(error if isinstance(error, Exception) else errors.Cancelled("A clean-up was cancelled from within."))
        return failures


@contextlib.asynccontextmanager
async def managed(context: UserExecutionContext, *, cleanup: bool = True, patience_s: float = PATIENCE_S) -> AsyncIterator[Scope]:
    """Around the work in a context. At the end its `Scope` is closed, unless `cleanup` is False: then whoever holds it closes it.

    The error or cancellation that ended the work goes on as it is; failures of the clean-up are raised only when the work succeeded,
    and are notes on its error otherwise.
    """
    scope = Scope(context, patience_s)
    try:
        yield scope
    except BaseException as error:
        if cleanup:
            try:
                await scope.close()
            except ExceptionGroup as failures:
                error.add_note(f"{failures.message}: {', '.join(type(each).__name__ for each in failures.exceptions)}")
        raise
    if cleanup:
        await scope.close()
