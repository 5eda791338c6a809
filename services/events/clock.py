"""The database's time as it is known here between its answers."""

from __future__ import annotations

import time
from datetime import UTC, datetime


class DatabaseClock:
    """The database's time, told from ours.

    An answer that says how late it was in the database was made between its question and its coming: by so much the difference of the two
    clocks is known (F. Cristian, Probabilistic clock synchronization, 1989). What is known stays until an answer shows that it cannot be,
    so answers that were long under way, as those of a busy moment are, move nothing.
    """

    def __init__(self) -> None:
        # seconds since the epoch there, less those of the monotonic clock here
        self._ahead: float | None = None

    def told(self, now: datetime, asked: float) -> None:
        """An answer came just now: it was `now` in the database, some time after the question was `asked` (time.monotonic)."""
        there = now.timestamp()
        least, most = there - time.monotonic(), there - asked
        self._ahead = (least + most) / 2 if self._ahead is None else max(least, min(self._ahead, most))

    def now(self) -> datetime | None:
        """How late it is in the database; None when it never told."""
        return None if self._ahead is None else datetime.fromtimestamp(time.monotonic() + self._ahead, UTC)
