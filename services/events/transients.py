"""What is shown to those who watch and recorded nowhere: after what it follows and before what follows it, or not at all."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol, TypeVar

from netra import errors
from netra.events.v1 import events_pb2
from services.events import announce, frames, ledger, log

_T = TypeVar("_T")
_KNOWN = 20_000
# what is shown before the event it follows is committed waits this long for it, and this much of it
_PATIENCE_S = 5.0
_HELD_OF_RUN = 64
_HELD_BYTES = 4 * 1024 * 1024


class Announcer(Protocol):
    """Tells those who watch."""

    def show(self, transient: log.Transient) -> None:
        """Must neither wait nor fail."""
        ...


@dataclass(slots=True)
class _Held:
    """What one run shows too early, with the epoch of who does."""

    since: float
    waiting: list[tuple[int, events_pb2.Transient]] = field(default_factory=list)
    size: int = 0


class Transients:
    """What is shown of the runs that are committed here. It knows of them what the commits said, and asks nobody."""

    def __init__(self, announcer: Announcer) -> None:
        self._announcer = announcer
        # of runs that have not ended, as their last commits here left them
        self._heads: dict[str, ledger.Head] = {}
        self._cursors: dict[str, int] = {}
        self._held: dict[str, _Held] = {}
        self._held_bytes = 0

    def show(self, request: events_pb2.AppendRequest) -> log.Outcome:
        """Show what an append has for those who watch: now, or when what it follows is committed. Refused when another owns the run."""
        head = self._heads.get(request.run_id)
        if head is not None and request.epoch < head.epoch:
            announce.missed("fenced", len(request.transients))
            message = f"The run is owned under epoch {head.epoch}; this append comes from epoch {request.epoch}."
            return log.Outcome(request.append_id, refused=errors.Fenced(message))
        for transient in request.transients:
            if len(transient.data) > log.MAX_TRANSIENT_BYTES:
                announce.missed("large")
            else:
                self._place(request.run_id, request.epoch, transient)
        return log.Outcome(request.append_id, self._cursors.get(head.user_id, 0) if head is not None else 0)

    def opened(self, run_id: str, epoch: int) -> None:
        """A run has a new owner: nothing of the earlier one is shown from now on."""
        if (head := self._heads.get(run_id)) is not None:
            head.epoch = epoch

    def committed(self, book: ledger.Ledger) -> None:
        """Learn from a transaction that was committed, and announced; show what waited for it."""
        for user_id, cursor in book.cursors.items():
            _remember(self._cursors, user_id, cursor.last)
        for run_id, head in book.heads.items():
            if head.ended:
                self._heads.pop(run_id, None)
                announce.missed("late", len(self._taken(run_id)))
                continue
            if (known := self._heads.get(run_id)) is not None:
                # it may have been opened again since this transaction
                head.epoch = max(head.epoch, known.epoch)
            _remember(self._heads, run_id, head)
            for epoch, transient in self._taken(run_id):
                self._place(run_id, epoch, transient)

    def _place(self, run_id: str, epoch: int, transient: events_pb2.Transient) -> None:
        head = self._heads.get(run_id)
        if head is None or epoch > head.epoch or (epoch == head.epoch and transient.after_seq >= head.next_seq):
            self._hold(run_id, epoch, transient)
        elif epoch < head.epoch:
            announce.missed("fenced")
        elif transient.after_seq < head.next_seq - 1 or head.user_id not in self._cursors:
            # what was committed meanwhile contains its sum
            announce.missed("late")
        else:
            self._announcer.show(_shown(head, self._cursors[head.user_id], transient))

    def _hold(self, run_id: str, epoch: int, transient: events_pb2.Transient) -> None:
        self._forget()
        size = len(transient.data)
        held = self._held.get(run_id)
        if self._held_bytes + size > _HELD_BYTES or (held is not None and len(held.waiting) >= _HELD_OF_RUN):
            announce.missed("waiting")
            return
        if held is None:
            held = self._held[run_id] = _Held(time.monotonic())
        held.waiting.append((epoch, transient))
        held.size += size
        self._held_bytes += size

    def _forget(self) -> None:
        """Drop what has waited for too long; who began to wait first comes first."""
        too_old = time.monotonic() - _PATIENCE_S
        while self._held and (first := next(iter(self._held))) and self._held[first].since < too_old:
            announce.missed("waiting", len(self._taken(first)))

    def _taken(self, run_id: str) -> Sequence[tuple[int, events_pb2.Transient]]:
        held = self._held.pop(run_id, None)
        if held is None:
            return ()
        self._held_bytes -= held.size
        return held.waiting


def _shown(head: ledger.Head, cursor: int, transient: events_pb2.Transient) -> log.Transient:
    at, after_seq = frames.timestamp(datetime.now(UTC)), transient.after_seq
    frame = frames.passing(head.shared, kind=transient.type, after_seq=after_seq, at=at, data=transient.data)
    return log.Transient(head.user_id, cursor, head.run_id, after_seq, head.thread_id, transient.type, frame)


def _remember(known: dict[str, _T], key: str, value: _T) -> None:
    known.pop(key, None)
    known[key] = value
    if len(known) > _KNOWN:
        del known[next(iter(known))]
