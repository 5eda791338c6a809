"""What was withdrawn, as a replayable stream."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

from google.protobuf.timestamp_pb2 import Timestamp

from netra.auth.v1 import auth_pb2

# longer than any token lives, and than any process goes without hearing from us
KEPT = timedelta(hours=2)
# transactions commit in another order than they began, so each read looks back a little
_OVERLAP = timedelta(seconds=60)


@dataclass(frozen=True, slots=True)
class Revocation:
    """A session that was ended."""

    session_id: str
    revoked_at: datetime


class Kept(Protocol):
    """Where the ended sessions of all users are kept."""

    async def revocations(self, since: datetime | None, kept: timedelta) -> tuple[list[Revocation], datetime]:
        """Sessions ended after `since` (or within `kept`), and the time at which this was true."""
        ...


class Revocations:
    """The recently ended sessions, each told once."""

    def __init__(self, rows: Kept) -> None:
        self._rows = rows
        self._recent: dict[str, datetime] = {}
        self._read_at: datetime | None = None

    async def poll(self) -> list[auth_pb2.Revocation]:
        """What other replicas withdrew since the last call."""
        since = self._read_at - _OVERLAP if self._read_at is not None else None
        found, self._read_at = await self._rows.revocations(since, KEPT)
        self._forget()
        return self.add(found)

    def add(self, found: Iterable[Revocation]) -> list[auth_pb2.Revocation]:
        """Take note; returns those that are new here."""
        new = [each for each in found if each.session_id not in self._recent]
        self._recent |= {each.session_id: each.revoked_at for each in new}
        return [_message(each.session_id, each.revoked_at) for each in new]

    def recent(self) -> list[auth_pb2.Revocation]:
        """Everything still of interest, in order."""
        return [_message(session_id, at) for session_id, at in sorted(self._recent.items(), key=lambda item: item[1])]

    def _forget(self) -> None:
        horizon = datetime.now(UTC) - KEPT
        for session_id in [session_id for session_id, at in self._recent.items() if at < horizon]:
            del self._recent[session_id]


def _message(session_id: str, at: datetime) -> auth_pb2.Revocation:
    revoked_at = Timestamp()
    revoked_at.FromDatetime(at)
    return auth_pb2.Revocation(session_id=session_id, revoked_at=revoked_at)
