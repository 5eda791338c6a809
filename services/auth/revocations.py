"""What was withdrawn, as a replayable stream."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
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

    With `security` their accepted runs are to be cancelled as well. With `roles` and `tier` nothing is withdrawn: that is what the
    user has from then on, so that what they began before has no more.
    """

    session_id: str
    revoked_at: datetime
    user_id: str = ""
    security: bool = False
    roles: tuple[str, ...] = ()
    tier: str = ""

    @property
    def about(self) -> tuple[str, str, bool]:
        """What another one says anew."""
        return self.session_id, self.user_id, bool(self.tier)


@dataclass(frozen=True, slots=True)
class Found:
    """What was withdrawn, and the time at which this was all."""

    rows: Sequence[Revocation]
    read_at: datetime


class Kept(Protocol):
    """Where the revocations of all users are kept."""

    async def revocations(self, since: datetime | None, kept: timedelta) -> tuple[list[Revocation], datetime]:
        """What was withdrawn after `since` (or within `kept`), and the time at which this was true."""
        ...


class Revocations:
    """The recent revocations, each told once."""

    def __init__(self, rows: Kept) -> None:
        self._rows = rows
        # a session ends once; a user may be withdrawn again, and the last time counts; in the order in which they came
        self._recent: OrderedDict[tuple[str, str, bool], Revocation] = OrderedDict()
        self._read_at: datetime | None = None

    async def look(self) -> Found:
        """What other replicas withdrew since what was last taken over; to be taken over once it can be told."""
        since = self._read_at - _OVERLAP if self._read_at is not None else None
        return Found(*await self._rows.revocations(since, KEPT))

    def take(self, found: Found) -> list[auth_pb2.Revocation]:
        """Take over; returns those that are new here. Not one of them is returned again: who asks must tell them."""
        self._read_at = found.read_at
        horizon = datetime.now(UTC) - KEPT
        while self._recent and next(iter(self._recent.values())).revoked_at < horizon:
            self._recent.popitem(last=False)
        return self.add(each for each in found.rows if each.revoked_at >= horizon)

    def add(self, found: Iterable[Revocation]) -> list[auth_pb2.Revocation]:
        """Take note; returns those that are new here."""
        new = [each for each in found if self._is_new(each)]
        for each in new:
            self._recent[each.about] = each
            self._recent.move_to_end(each.about)
        return [_message(each) for each in new]

    def recent(self) -> list[auth_pb2.Revocation]:
        """Everything still of interest, in order."""
        return [_message(each) for each in sorted(self._recent.values(), key=lambda each: each.revoked_at)]

    def _is_new(self, found: Revocation) -> bool:
        known = self._recent.get(found.about)
        return known is None or (bool(found.user_id) and known.revoked_at < found.revoked_at) or found.security > known.security


def _message(each: Revocation) -> auth_pb2.Revocation:
    revoked_at = Timestamp()
    revoked_at.FromDatetime(each.revoked_at)
    rights = auth_pb2.Rights(roles=each.roles, tier=each.tier) if each.tier else None
    return auth_pb2.Revocation(
        session_id=each.session_id, revoked_at=revoked_at, user_id=each.user_id, security=each.security, rights=rights
    )  # fmt: skip
