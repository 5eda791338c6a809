"""Finds out which tool holds up the event loop: a coroutine that computes or sleeps instead of awaiting cannot be stopped."""

from __future__ import annotations

import time
from collections.abc import Coroutine, Generator
from typing import Any, Generic, TypeVar

from chassis import log, telemetry

_log = log.get(__name__)
_T = TypeVar("_T")
# what one hung tool may delay others by
_TOO_LONG_S = 0.05
_blocked = telemetry.meter.create_counter(
    "netra.tools.loop_blocked", description="Times that a tool's coroutine held up the event loop for more than 50 ms, by tool."
)


class Noticed(Generic[_T]):
    """An awaitable that does what the coroutine of a tool does, and tells of each of its steps that took too long.

    A step is what it does between two of its awaits, while nothing else runs in this process. Steps of tasks that it makes are not seen.
    """

    __slots__ = ("_name", "_work")

    def __init__(self, name: str, work: Coroutine[Any, Any, _T]) -> None:
        self._name, self._work = name, work

    def __await__(self) -> Generator[Any, Any, _T]:
        work, now = self._work, time.perf_counter
        given: Any = None
        thrown: BaseException | None = None
        while True:
            began = now()
            try:
                awaited = work.send(given) if thrown is None else work.throw(thrown)
            except StopIteration as end:
                result: _T = end.value
                return result
            finally:
                if (took_s := now() - began) > _TOO_LONG_S:
                    self._tell(took_s)
            given = thrown = None
            try:
                given = yield awaited
            except BaseException as error:
                # a cancel, most of all: it is for the tool
                thrown = error

    def _tell(self, took_s: float) -> None:
        _blocked.add(1, {"tool": self._name})
        _log.warning(
            "a tool held up everything else; what computes or waits without `await` belongs into a plain function (`def`)",
            tool=self._name, seconds=round(took_s, 3),
        )  # fmt: skip
