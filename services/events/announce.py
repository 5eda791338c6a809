"""Tells all replicas over Valkey what was committed; it may fail, for the record has everything."""

from __future__ import annotations

import asyncio
import zlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
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
_AT_ONCE = 512
_dropped = telemetry.meter.create_counter("netra.events.announcements_dropped", description="Events not announced over Valkey.")


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


def encoded(events: Sequence[log.Recorded]) -> dict[bytes | str, bytes | str | int]:
    """Events of one partition as the fields of one entry: a command costs many times what an event does."""
    batch = events_pb2.SubscribeResponse(events=[_message(event) for event in events])
    return {"events": batch.SerializeToString(), "ends": bytes(event.ends for event in events)}


def _message(event: log.Recorded) -> events_pb2.Event:
    return events_pb2.Event(
        cursor=event.cursor, seq=event.seq, user_id=event.user_id, run_id=event.run_id, thread_id=event.thread_id, type=event.kind,
        frame=event.frame if _inline(event) else b"",
    )  # fmt: skip


def _inline(event: log.Recorded) -> int:
    """The bytes of its frame that go over Valkey."""
    return len(event.frame) if len(event.frame) <= _MAX_INLINE else 0


def decoded(fields: Mapping[bytes, bytes]) -> list[log.Recorded]:
    """The events of an entry; a frame is empty when it must be read from the record."""
    batch = events_pb2.SubscribeResponse.FromString(fields[b"events"])
    return [
        log.Recorded(event.user_id, event.cursor, event.run_id, event.seq, event.thread_id, event.type, event.frame, bool(ends))
        for event, ends in zip(batch.events, fields[b"ends"], strict=True)
    ]


def entries(events: Sequence[log.Recorded]) -> list[tuple[str, dict[bytes | str, bytes | str | int]]]:
    """Events as entries of their partitions, in order within each."""
    grouped: dict[str, list[log.Recorded]] = {}
    for event in events:
        grouped.setdefault(partition(event.user_id), []).append(event)
    return [(stream, encoded(part)) for stream, group in grouped.items() for part in _parts(group)]


def _parts(group: Sequence[log.Recorded]) -> Iterator[list[log.Recorded]]:
    part: list[log.Recorded] = []
    size = 0
    for event in group:
        if part and (len(part) == _PER_ENTRY or size + _inline(event) > _ENTRY_BYTES):
            yield part
            part, size = [], 0
        part.append(event)
        size += _inline(event)
    yield part


class Announcer:
    """Sends what was committed to the partition streams, in order, behind the acknowledgements."""

    def __init__(self, streams: Streams, keep: int) -> None:
        self._streams = streams
        self._keep = keep
        self._pending: deque[log.Recorded] = deque()
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

    async def _send(self, events: Sequence[log.Recorded]) -> None:
        self._bytes -= sum(len(event.frame) for event in events)
        try:
            await self._streams.append(entries(events), keep=self._keep)
        except errors.Unavailable:
            _dropped.add(len(events))
            _log.warning("Valkey is not reachable; live readers fall back to the record", events=len(events))
