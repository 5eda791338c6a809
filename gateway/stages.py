"""Tells the dispatcher when the ends of runs were sent to their users: in batches, and never in the way of sending."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from chassis import log, telemetry
from netra import errors
from netra.dispatcher.v1 import dispatcher_pb2

_log = log.get(__name__)
_dropped = telemetry.meter.create_counter("netra.gateway.stages.dropped", description="Ends of runs whose sending was not noted.")
_EVERY_S = 1.0
_AT_ONCE = 1000
_MOST = 10_000

Record: TypeAlias = Callable[[dispatcher_pb2.RecordStagesRequest], Awaitable[None]]


class Stages:
    """What is to be told. What cannot be told at once is dropped: it is a note for people who look for a delay, no promise."""

    def __init__(self, every_s: float = _EVERY_S) -> None:
        self._every_s = every_s
        self._waiting: dict[str, float] = {}
        self._some = asyncio.Event()

    def note(self, run_id: str) -> None:
        """The last event of a run was written to a socket just now; the first time counts."""
        if not run_id:
            return
        if len(self._waiting) >= _MOST:
            _dropped.add(1)
            return
        self._waiting.setdefault(run_id, time.time())
        self._some.set()

    async def run(self, record: Record) -> None:
        """Tell what there is, once in a while, for ever."""
        while True:
            await self._some.wait()
            await asyncio.sleep(self._every_s)
            await self.flush(record)

    async def flush(self, record: Record) -> None:
        """Tell what there is."""
        self._some.clear()
        waiting, self._waiting = [_notified(*one) for one in self._waiting.items()], {}
        for begin in range(0, len(waiting), _AT_ONCE):
            part = waiting[begin : begin + _AT_ONCE]
            try:
                await record(dispatcher_pb2.RecordStagesRequest(notified=part))
            except errors.NetraError as error:
                _dropped.add(len(part))
                _log.info("stages were not noted", code=error.code, runs=len(part))


def _notified(run_id: str, at: float) -> dispatcher_pb2.Notified:
    told = dispatcher_pb2.Notified(run_id=run_id)
    told.at.FromNanoseconds(int(at * 1e9))
    return told
