"""Group commit: everything pending in one transaction, bad appends refused one by one."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from chassis import log as log_
from chassis import postgres, telemetry
from netra import errors
from services.events import ledger, log

_log = log_.get(__name__)
MAX_APPENDS = 512
MAX_BYTES = 4 * 1024 * 1024
MAX_PENDING_BYTES = 16 * 1024 * 1024
_seconds = telemetry.meter.create_histogram("netra.events.commit.duration", unit="s", description="Group commits.")
_appends = telemetry.meter.create_counter("netra.events.appends", description="Appends by outcome.")
_events = telemetry.meter.create_counter("netra.events.recorded", description="Events committed.")
Reply = Callable[[log.Outcome], None]
Told = Callable[[ledger.Ledger], None]


class Writer(Protocol):
    """Judges and writes appends in one transaction."""

    async def commit(self, appends: Sequence[log.Append], *, pass_over: bool = False) -> ledger.Ledger:
        """Raises what the database raises; then nothing was written, or nobody knows. When told to `pass_over`, it waits for no
        row that another transaction holds, and refuses whoever needs it."""
        ...


class Announcer(Protocol):
    """Told what was committed."""

    def announce(self, events: Sequence[log.Recorded]) -> None:
        """Must neither wait nor fail."""
        ...


def _nobody(_written: ledger.Ledger) -> None:
    """Nobody is told."""


@dataclass(frozen=True, slots=True)
class _Pending:
    append: log.Append
    reply: Reply


class Committer:
    """The one writer of this replica. `run` commits; what was submitted is answered, always.

    `told` learns of each transaction after its events were announced. Like the announcer, it neither waits nor fails.
    """

    def __init__(self, writer: Writer, announcer: Announcer, told: Told = _nobody) -> None:
        self._writer = writer
        self._announcer, self._told = announcer, told
        self._pending: deque[_Pending] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def submit(self, append: log.Append, reply: Reply) -> None:
        """Queue an append; waits while too much is pending. `reply` is called once, after its commit."""
        await self._room.wait()
        self._pending.append(_Pending(append, reply))
        self._bytes += append.size
        if self._bytes >= MAX_PENDING_BYTES:
            self._room.clear()
        self._wake.set()

    async def run(self) -> None:
        """Commit what is pending, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                began = time.perf_counter()
                await self._commit(self._batch())
                _seconds.record(time.perf_counter() - began)

    def _batch(self) -> list[_Pending]:
        batch: list[_Pending] = []
        size = 0
        while self._pending and len(batch) < MAX_APPENDS and (not batch or size + self._pending[0].append.size <= MAX_BYTES):
            batch.append(self._pending.popleft())
            size += batch[-1].append.size
        self._bytes -= size
        if self._bytes < MAX_PENDING_BYTES:
            self._room.set()
        return batch

    async def _commit(self, batch: list[_Pending]) -> None:
        try:
            written = await self._written([pending.append for pending in batch])
        except (errors.Unavailable, errors.DeadlineExceeded):
            # perhaps it was committed all the same: the writer sends it again and the digest tells
            _refuse(batch, errors.Unavailable("The record is not reachable just now. Send the append again."))
        except Exception as error:
            await self._bisect(batch, error)
        else:
            self._answer(batch, written)

    async def _written(self, appends: Sequence[log.Append]) -> ledger.Ledger:
        try:
            return await self._writer.commit(appends)
        except postgres.Locked:
            # by a transaction elsewhere that stands still, for as long as the database lets it: whoever needs it not goes on
            return await self._writer.commit(appends, pass_over=True)

    async def _bisect(self, batch: list[_Pending], error: Exception) -> None:
        if len(batch) == 1:
            _refuse(batch, _reason(error))
            return
        middle = len(batch) // 2
        await self._commit(batch[:middle])
        await self._commit(batch[middle:])

    def _answer(self, batch: list[_Pending], written: ledger.Ledger) -> None:
        for pending, outcome in zip(batch, written.outcomes, strict=True):
            pending.reply(outcome)
        for code, many in Counter(outcome.refused.code if outcome.refused else "OK" for outcome in written.outcomes).items():
            _appends.add(many, {"outcome": code})
        _events.add(len(written.events))
        self._announcer.announce([row.event for row in written.events])
        self._told(written)


def _refuse(batch: Sequence[_Pending], reason: errors.NetraError) -> None:
    for pending in batch:
        pending.reply(log.Outcome(pending.append.request.append_id, refused=reason))
    _appends.add(len(batch), {"outcome": reason.code})


def _reason(error: Exception) -> errors.NetraError:
    if isinstance(error, postgres.Conflict):
        return errors.AlreadyExists("A step of this append is in the record already, with another append.")
    if isinstance(error, postgres.Unfit):
        return errors.InvalidPayload("The database refuses a value of this append.", field="events")
    _log.error("an append could not be written", exc_info=error)
    return errors.Internal()
