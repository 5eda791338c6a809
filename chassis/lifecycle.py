"""Start, serve, drain, exit: signals, the owner of background tasks, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import signal
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any

import pydantic
import uvloop

from chassis import log, telemetry
from chassis import settings as settings_
from netra import deadline

_log = log.get(__name__)
EX_SOFTWARE, EX_CONFIG = 70, 78
# how many more objects than before there are when the youngest are searched for circles, and how many such searches are one of the older
_CIRCLES = (50_000, 20, 20)


class Tasks:
    """Owns background tasks. One that fails calls `on_failure` (by default: ends the process); `close` cancels all and waits."""

    def __init__(self, on_failure: Callable[[BaseException], None] | None = None) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._on_failure = on_failure or _stop_process

    def spawn(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        """Run `work` in the background: it is not bound to the deadline of the call it comes from, which may end before it."""
        context = contextvars.copy_context()
        context.run(deadline.bind, None)
        task = asyncio.get_running_loop().create_task(work, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._on_failure(error)

    def __len__(self) -> int:
        return len(self._tasks)

    async def close(self) -> None:
        """Cancel what still runs and wait for it."""
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)


def told_to_stop() -> bool:
    """Whether the cancellation at hand was asked for; code can also raise `CancelledError` out of its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _stop_process(error: BaseException) -> None:
    _log.error("a background task failed", exc_info=error)
    # whoever supervises the process starts it again, clean
    signal.raise_signal(signal.SIGTERM)


async def _until_signal(name: str, service: Callable[[], AbstractAsyncContextManager[object]]) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        if await _entered(stack, service(), stop):
            _unsearched()
            _log.info("started", process=name)
            await stop.wait()
        _log.info("stopping", process=name)


def _unsearched() -> None:
    """Spare calls the search for garbage: what is here stays, and of what a call leaves hardly anything is a circle."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_CIRCLES)


async def _entered(stack: contextlib.AsyncExitStack, service: AbstractAsyncContextManager[object], stop: asyncio.Event) -> bool:
    """Whether the service came up before a signal did: one that still waits for its database ends on a signal too."""
    tasks = Tasks(on_failure=lambda _error: None)
    entering = tasks.spawn(stack.enter_async_context(service), name="start")
    await asyncio.wait({entering, tasks.spawn(stop.wait(), name="signal")}, return_when=asyncio.FIRST_COMPLETED)
    await tasks.close()
    return not entering.cancelled() and entering.result() is not None


def run(name: str, load: Callable[[], Any], build: Callable[[Any], AbstractAsyncContextManager[object]]) -> None:
    """Run one process until SIGINT or SIGTERM. Settings that are wrong end it with 78 and a sentence for each."""
    try:
        settings = load()
    except pydantic.ValidationError as error:
        for problem in error.errors():
            print(f"netra {name}: setting {'.'.join(map(str, problem['loc']))}: {problem['msg']}", file=sys.stderr)  # noqa: T201
        sys.exit(EX_CONFIG)
    log.set_up(name, settings)
    provider = telemetry.set_up(name, settings)
    try:
        uvloop.run(_until_signal(name, lambda: build(settings)))
    except (settings_.MissingSecret, OSError, ValueError) as error:
        _log.error("cannot start", reason=str(error))
        sys.exit(EX_CONFIG)
    finally:
        provider.shutdown()
