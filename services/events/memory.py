"""What this replica saw last of the heads and cursors it writes: worth no more than a guess, until it is held against the locked rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, TypeVar

from chassis import postgres
from services.events import clock, frames, ledger, log
from services.events import heads as heads_

# of each kind: some tens of megabytes at the very most
_MOST_KNOWN = 50_000
# so many batches at most are looked up before the next one is guessed, after guesses that were wrong
_MOST_LOOKS = 15
_T = TypeVar("_T", dict[Any, Any], set[Any])


@dataclass(frozen=True, slots=True)
class Run:
    """What never changes of the head of a run."""

    run_id: str
    user_id: str
    thread_id: str
    shared: bytes
    retention: str
    opened_at: datetime

    @classmethod
    def of(cls, row: postgres.Row | Mapping[str, Any]) -> Run:
        """From the row of a head."""
        shared = frames.envelope(
            user_id=row["user_id"], thread_id=row["thread_id"], run_id=row["run_id"], request_id=row["request_id"],
            correlation_id=row["correlation_id"], trace_id=row["trace_id"],
        )  # fmt: skip
        return cls(row["run_id"], row["user_id"], row["thread_id"], shared, row["retention"], row["created_at"])

    def head(self, row: postgres.Row | Mapping[str, Any]) -> ledger.Head:
        """Where its record stands, as the row says."""
        return ledger.Head(
            self.run_id, self.user_id, self.thread_id, self.shared, self.retention, self.opened_at, row["epoch"], row["next_seq"],
            row["last_digest"] or b"", row["last_first_seq"], row["last_cursor"], row["last_at"], row["ended"], row["terminal_type"],
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Seen:
    """The rows as they were seen last, each kind in the order in which it is locked. Nothing may be written that rests on other rows."""

    generation: object
    # user, last, last_at
    cursors: Sequence[tuple[str, int, datetime]]
    # run, epoch, next_seq, last_cursor, last_at, last_digest; of none of them the run had ended
    heads: Sequence[tuple[str, int, int, int, datetime, bytes]]


class Memory:
    """Of one process: who opens a run tells it, and who writes."""

    def __init__(self) -> None:
        self._generation: object = None
        self._runs: dict[str, Run] = {}
        self._heads: dict[str, ledger.Head] = {}
        self._cursors: dict[str, ledger.Cursor] = {}
        # users who have a cursor
        self._users: set[str] = set()
        self._marks: set[ledger.Mark] = set()
        self._clock = clock.DatabaseClock()
        self._wrong = self._looks = 0

    def of(self, generation: object, now: datetime, asked: float) -> None:
        """The record is of this generation, and it was so late in the database after it was `asked` (time.monotonic).

        In another generation nothing need be of what was seen before.
        """
        self._clock.told(now, asked)
        if generation != self._generation:
            self._generation = generation
            for known in (self._runs, self._heads, self._cursors, self._users, self._marks):
                known.clear()

    def opened(self, head: ledger.Head, cursor: ledger.Cursor) -> None:
        """A run has a new owner."""
        _bounded(self._heads)[head.run_id] = head
        # it was read without a lock: what was written here since is newer
        _bounded(self._cursors).setdefault(head.user_id, cursor)

    def looked_up(self, runs: Mapping[str, Run]) -> None:
        """These runs have a head."""
        _bounded(self._runs).update(runs)

    def known(self, runs: Iterable[str]) -> dict[str, Run]:
        """Those of the runs whose head was seen."""
        return {run_id: run for run_id in runs if (run := self._runs.get(run_id)) is not None}

    def have_cursor(self, users: Iterable[str]) -> None:
        """These users have a cursor."""
        _bounded(self._users).update(users)

    def has_cursor(self, user_id: str) -> bool:
        """Whether that is known of a user."""
        return user_id in self._users

    def unmarked(self, book: ledger.Ledger) -> dict[ledger.Mark, int]:
        """What is to be marked yet of what a book marks."""
        return {mark: cursor for mark, cursor in book.marks.items() if mark not in self._marks}

    def written(self, book: ledger.Ledger) -> None:
        """It was committed: so the rows are now, unless others write them as well."""
        heads, cursors = _bounded(self._heads), _bounded(self._cursors)
        for run_id, head in book.heads.items():
            if head.ended:
                heads.pop(run_id, None)
            else:
                # others keep the book
                heads[run_id] = replace(head)
        cursors |= {user_id: replace(cursor) for user_id, cursor in book.cursors.items()}
        _bounded(self._marks).update(book.marks)

    def cold(self, appends: Iterable[log.Append]) -> list[log.Append]:
        """Those that open a run of a user of whom nothing is known here."""
        return [append for append in appends if append.opens is not None and append.opens.user_id not in self._cursors]

    def guess(self, appends: Sequence[log.Append]) -> tuple[ledger.Ledger, Seen] | None:
        """The appends as they are judged if no row has changed since it was seen; None unless each simply goes on where its run stands,
        or opens it. Of a run that is opened and was not seen here there is no row yet.

        What was seen of these rows is forgotten; `written` brings it back.
        """
        if self._looks:
            self._looks -= 1
            return None
        if (now := self._clock.now()) is None:
            return None
        new = {
            append.request.run_id: (append.opens, append.request.epoch)
            for append in appends
            if append.opens is not None and append.request.run_id not in self._heads
        }
        if (
            rows := self._taken({append.request.run_id for append in appends} - new.keys(), {head.user_id for head, _ in new.values()})
        ) is None:
            return None
        heads, cursors = rows
        seen = Seen(
            self._generation, [(user_id, cursor.last, cursor.last_at) for user_id, cursor in cursors.items()],
            [(run_id, h.epoch, h.next_seq, h.last_cursor, h.last_at, h.last_digest) for run_id, h in heads.items()],
        )  # fmt: skip
        made = {run_id: _made(head, epoch, now) for run_id, (head, epoch) in new.items()}
        book = ledger.Ledger(heads | made, cursors, now, new={run_id: head for run_id, (head, _) in new.items()})
        return (book, seen) if all(book.goes_on(append) for append in appends) else None

    def _taken(self, runs: set[str], more: set[str]) -> tuple[dict[str, ledger.Head], dict[str, ledger.Cursor]] | None:
        """The heads of these runs and the cursors of their users, and of `more` users; None when one of them was not seen."""
        heads = {run_id: head for run_id in sorted(runs) if (head := self._heads.pop(run_id, None)) is not None}
        users = sorted({head.user_id for head in heads.values()} | more)
        cursors = {user_id: cursor for user_id in users if (cursor := self._cursors.pop(user_id, None)) is not None}
        return (heads, cursors) if len(heads) == len(runs) and len(cursors) == len(users) else None

    def right(self, now: datetime, asked: float) -> None:
        """A guess was right, and it was so late in the database after it was `asked` (time.monotonic)."""
        self._clock.told(now, asked)
        self._wrong = 0

    def wrong(self) -> None:
        """A guess was wrong: others write the same rows. The more often, the longer everything is looked up before the next one."""
        self._looks, self._wrong = min(2**self._wrong - 1, _MOST_LOOKS), self._wrong + 1


def _made(head: heads_.NewHead, epoch: int, now: datetime) -> ledger.Head:
    """The head of a run of which there is nothing yet: nothing of it is recorded before it was made."""
    row = {
        "run_id": head.run_id, "user_id": head.user_id, "thread_id": head.thread_id, "request_id": head.request_id,
        "correlation_id": head.correlation_id, "trace_id": head.trace_id, "retention": head.retention, "created_at": now, "epoch": epoch,
        "next_seq": 1, "last_digest": b"", "last_first_seq": 0, "last_cursor": 0, "last_at": now, "ended": False, "terminal_type": "",
    }  # fmt: skip
    return Run.of(row).head(row)


def _bounded(known: _T) -> _T:
    """With room for more."""
    if len(known) > _MOST_KNOWN:
        known.clear()
    return known
