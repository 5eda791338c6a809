"""Tells all replicas over Valkey what was committed; it may fail, for the record has everything."""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from chassis import log as log_
from chassis import telemetry
from netra import errors
from netra.events.v1 import events_pb2
from services.events import log

_log = log_.get(__name__)
_PARTITIONS = 16
PARTITIONS = tuple(f"live:{number}" for number in range(_PARTITIONS))
# a bigger frame is read from the record: Valkey's memory is bounded by entries, so entries are bounded too
_MAX_INLINE = 16 * 1024
_PER_ENTRY, _ENTRY_BYTES = 32, 64 * 1024
# whoever has not read an entry by then is fed from the record; what was erased does not stay either
_KEPT_S, _TRIM_S = 60, 10.0
_MAX_PENDING_BYTES = 16 * 1024 * 1024
# while so much waits, what is not recorded is dropped: nobody sees it in time
_BUSY_BYTES = 1024 * 1024
_AT_ONCE = 512
_dropped = telemetry.meter.create_counter("netra.events.announcements_dropped", description="Events not announced over Valkey.")
_missed = telemetry.meter.create_counter("netra.events.transients_dropped", description="Transient events not shown, by reason.")
Told = log.Recorded | log.Transient


class Streams(Protocol):
    """Where announcements go."""

    async def append(self, entries: Sequence[tuple[str, Mapping[bytes | str, bytes | str | int]]], *, keep: int) -> None:
        """Raises `Unavailable`."""
        ...

    async def trim(self, streams: Sequence[str], *, older_than_s: int) -> None:
        """Raises `Unavailable`."""
        ...


def partition(user_id: str) -> str:
    """The stream that carries the user's events."""
    return PARTITIONS[zlib.crc32(user_id.encode("ascii")) % _PARTITIONS]


def missed(reason: str, number: int = 1) -> None:
    """Count transients that are not shown: `fenced`, `large`, `late`, `waiting` for too long, Valkey `away`, or a reader `busy`."""
    if number:
        _missed.add(number, {"reason": reason})


def encoded(events: Sequence[log.Recorded], transients: Sequence[log.Transient] = ()) -> dict[bytes | str, bytes | str | int]:
    """Events of one partition as the fields of one entry: a command costs many times what an event does."""
    batch = events_pb2.SubscribeResponse(transients=[transient.message() for transient in transients])
    for event in events:
        # made in its place: what is made beside it is copied
        batch.events.add(
            cursor=event.cursor, seq=event.seq, user_id=event.user_id, run_id=event.run_id, thread_id=event.thread_id, type=event.kind,
            frame=event.frame if _inline(event) else b"",
        )  # fmt: skip
    return {"events": batch.SerializeToString(), "ends": bytes(event.ends for event in events)}


def _inline(told: Told) -> int:
    """The bytes of its frame that go over Valkey."""
    return len(told.frame) if len(told.frame) <= _MAX_INLINE or isinstance(told, log.Transient) else 0


def decoded(fields: Mapping[bytes, bytes]) -> tuple[list[log.Recorded], list[log.Transient]]:
    """Events of an entry, in order per user, and what comes after them; the frame of one that must be read from the record is empty."""
    batch = events_pb2.SubscribeResponse.FromString(fields[b"events"])
    events = [
        log.Recorded(event.user_id, event.cursor, event.run_id, event.seq, event.thread_id, event.type, event.frame, bool(ends))
        for event, ends in zip(batch.events, fields[b"ends"], strict=True)
    ]
    transients = [
        log.Transient(one.user_id, one.after_cursor, one.run_id, one.after_seq, one.thread_id, one.type, one.frame)
        for one in batch.transients
    ]
    return events, transients


def entries(told: Iterable[Told]) -> list[tuple[str, dict[bytes | str, bytes | str | int]]]:
    """What is told as entries of the partitions, in order per user."""
    grouped: dict[str, list[Told]] = {}
    for one in told:
        grouped.setdefault(partition(one.user_id), []).append(one)
    return [(stream, encoded(part.events, part.transients)) for stream, group in grouped.items() for part in _parts(group)]


@dataclass(slots=True)
class _Part:
    """What becomes one entry. Its transients come after its events: an event of a user does not follow a transient of theirs."""

    events: list[log.Recorded] = field(default_factory=list)
    transients: list[log.Transient] = field(default_factory=list)
    size: int = 0

    def takes(self, told: Told) -> bool:
        """Whether it has room, and the order stays."""
        number = len(self.events) + len(self.transients)
        if number and (number == _PER_ENTRY or self.size + _inline(told) > _ENTRY_BYTES):
            return False
        if not self.transients or isinstance(told, log.Transient):
            return True
        return all(told.user_id != before.user_id for before in self.transients)

    def add(self, told: Told) -> None:
        self.size += _inline(told)
        if isinstance(told, log.Transient):
            self.transients.append(told)
        else:
            self.events.append(told)


def _parts(group: Sequence[Told]) -> Iterator[_Part]:
    part = _Part()
    for told in group:
        if not part.takes(told):
            yield part
            part = _Part()
        part.add(told)
    yield part


class Announcer:
    """Sends what was committed to the partition streams, in order, behind the acknowledgements."""

    def __init__(self, streams: Streams, keep: int) -> None:
        self._streams = streams
        self._keep = keep
        self._pending: deque[Told] = deque()
        self._bytes = 0
        self._wake = asyncio.Event()

    def announce(self, events: Sequence[log.Recorded]) -> None:
        """Queue events; what does not fit is dropped, and found in the record by whoever misses it."""
        for event in events:
            self._pending.append(event)
            self._bytes += len(event.frame)
        while self._bytes > _MAX_PENDING_BYTES:
            self._bytes -= len(self._pending.popleft().frame)
            _dropped.add(1)
        self._wake.set()

    def show(self, transient: log.Transient) -> None:
        """Queue what is not recorded, behind the events before it; dropped while much is queued."""
        if self._bytes > _BUSY_BYTES:
            missed("busy")
            return
        self._pending.append(transient)
        self._bytes += len(transient.frame)
        self._wake.set()

    async def run(self) -> None:
        """Send what is queued, for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._pending:
                await self._send([self._pending.popleft() for _ in range(min(_AT_ONCE, len(self._pending)))])

    async def trim(self) -> None:
        """Drop what is older than a minute from the streams, for ever."""
        while True:
            try:
                await self._streams.trim(PARTITIONS, older_than_s=_KEPT_S)
            except errors.Unavailable:
                _log.info("Valkey is not reachable; its streams are trimmed later")
            await asyncio.sleep(_TRIM_S)

    async def _send(self, told: Sequence[Told]) -> None:
        self._bytes -= sum(len(one.frame) for one in told)
        try:
            await self._streams.append(entries(told), keep=self._keep)
        except errors.Unavailable:
            events = sum(isinstance(one, log.Recorded) for one in told)
            missed("away", len(told) - events)
            if events:
                _dropped.add(events)
                _log.warning("Valkey is not reachable; live readers fall back to the record", events=events)
