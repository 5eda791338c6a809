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
    """A session that was ended; or, with a user, all that was issued to them before. One of both is empty.

    With `security` their accepted runs are to be cancelled as well.
    """

    session_id: str
    revoked_at: datetime
    user_id: str = ""
    security: bool = False


class Kept(Protocol):
    """Where the revocations of all users are kept."""

    async def revocations(self, since: datetime | None, kept: timedelta) -> tuple[list[Revocation], datetime]:
        """What was withdrawn after `since` (or within `kept`), and the time at which this was true."""
        ...


class Revocations:
    """The recent revocations, each told once."""

    def __init__(self, rows: Kept) -> None:
        self._rows = rows
        # a session ends once; a user may be withdrawn again, and the last time counts
        self._recent: dict[tuple[str, str], Revocation] = {}
        self._read_at: datetime | None = None

    async def poll(self) -> list[auth_pb2.Revocation]:
        """What other replicas withdrew since the last call."""
        since = self._read_at - _OVERLAP if self._read_at is not None else None
        found, self._read_at = await self._rows.revocations(since, KEPT)
        self._forget()
        return self.add(found)

    def add(self, found: Iterable[Revocation]) -> list[auth_pb2.Revocation]:
        """Take note; returns those that are new here."""
        new = [each for each in found if self._is_new(each)]
        self._recent |= {(each.session_id, each.user_id): each for each in new}
        return [_message(each) for each in new]

    def recent(self) -> list[auth_pb2.Revocation]:
        """Everything still of interest, in order."""
        return [_message(each) for each in sorted(self._recent.values(), key=lambda each: each.revoked_at)]

    def _is_new(self, found: Revocation) -> bool:
        known = self._recent.get((found.session_id, found.user_id))
        return known is None or (bool(found.user_id) and known.revoked_at < found.revoked_at)

    def _forget(self) -> None:
        horizon = datetime.now(UTC) - KEPT
        self._recent = {key: each for key, each in self._recent.items() if each.revoked_at >= horizon}


def _message(each: Revocation) -> auth_pb2.Revocation:
    revoked_at = Timestamp()
    revoked_at.FromDatetime(each.revoked_at)
    return auth_pb2.Revocation(session_id=each.session_id, revoked_at=revoked_at, user_id=each.user_id, security=each.security)
