"""What one follower has of a thread, and what is to be sent next; pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from netra import errors
from services.events import log

# runs that one look finds at most
HEADS = 200
# a wide round looks at what was made so long before the newest, too
_WIDE_MS = 60 * 60 * 1000


@dataclass(frozen=True, slots=True)
class Head:
    """How far the record of a run is."""

    run_id: str
    user_id: str
    retention: str
    opened_at: datetime
    last_at: datetime
    last: int
    ended: bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """The events of a run after a seq; of its owner's record, what is before `oldest` is not shown any more."""

    head: Head
    after: int
    oldest: int


@dataclass(frozen=True, slots=True)
class Read:
    """What was found of what was wanted of a run, as far as there was room for it."""

    wanted: Wanted
    events: Sequence[log.Recorded]


@dataclass(frozen=True, slots=True)
class Round:
    """One look for what moved, in pages: at these runs, those that go on, and those with ids after `since`."""

    run_ids: Sequence[str]
    since: str
    after: str = ""


class Sent:
    """What one follower has of a thread, and what is to be sent next.

    Nothing here goes by the time at which an event was recorded: that is before its commit, by how much nobody knows, and clocks step.
    """

    def __init__(self, after_run_id: str, positions: Mapping[str, int]) -> None:
        self._after = self._newest = after_run_id
        self._runs = dict(positions)
        self._going_on: set[str] = set()
        # runs that are looked for first, once; then those after `after_run_id`; then in rounds those that move
        self.named: Sequence[str] | None = list(positions)
        self.scanned_to = after_run_id
        self._scanned = False
        self.round: Round | None = None
        self.due: list[Wanted] = []

    @property
    def settled(self) -> bool:
        """Whether the last look found all there was."""
        return self._scanned and self.round is None

    def begin(self, heard: set[str], *, wide: bool) -> None:
        """Begin a round."""
        self.round = Round(sorted(self._going_on | heard), _earlier(self._newest) if wide else self._newest)

    def behind(self, heads: Sequence[Head]) -> list[tuple[Head, int]]:
        """Runs with more than was sent. Raises `FailedPrecondition` for one with less."""
        found = []
        for head in heads:
            if head.run_id not in self._runs and head.run_id <= self._after:
                continue
            if (after := self._runs.get(head.run_id, 0)) > head.last:
                message = f"The record of run {head.run_id} ends with {head.last}; nothing can be after {after}."
                raise errors.FailedPrecondition(message, run_id=head.run_id, last_seq=head.last)
            if after < head.last:
                found.append((head, after))
            if after < head.last or not head.ended:
                self._going_on.add(head.run_id)
            else:
                self._going_on.discard(head.run_id)
        return found

    def looked(self, heads: Sequence[Head], due: list[Wanted]) -> None:
        """Note what a look has found; what is recorded while it looks is found by a later one."""
        self.due, last = due, heads[-1].run_id if heads else ""
        self._newest = max(self._newest, last)
        if self.named is not None:
            self.named = None
        elif self.round is not None:
            self.round = replace(self.round, after=last) if len(heads) == HEADS else None
        else:
            self.scanned_to = last or self.scanned_to
            self._scanned = len(heads) < HEADS

    def take(self, read: Sequence[Read]) -> dict[str, int]:
        """Note what is sent now; the runs of which something before it is gone, with the last seq that is."""
        truncated: dict[str, int] = {}
        left = []
        for one in read:
            head = one.wanted.head
            first, through = (one.events[0].seq, one.events[-1].seq) if one.events else (head.last + 1, head.last)
            if first > one.wanted.after + 1:
                truncated[head.run_id] = first - 1
            self._runs[head.run_id] = through
            if through < head.last:
                left.append(replace(one.wanted, after=through))
            elif head.ended:
                self._going_on.discard(head.run_id)
        self.due = left + self.due[len(read) :]
        return truncated


def joined(rounds: Sequence[Round]) -> Round:
    """What finds at least what each of these rounds, which are at the same page, looks for."""
    runs = {run_id for one in rounds for run_id in one.run_ids}
    return Round(sorted(runs), min(one.since for one in rounds), rounds[0].after)


def _earlier(run_id: str) -> str:
    """An id like one that was made `_WIDE_MS` before (UUIDv7: the time in milliseconds comes first)."""
    made = max(int(run_id.replace("-", "")[:12] or "0", 16) - _WIDE_MS, 0)
    return f"{made >> 16:08x}-{made & 0xFFFF:04x}-0000-0000-000000000000"
