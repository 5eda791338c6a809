"""What ends contexts from outside: heard of once, stored however long the database is away, all of a burst at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from google.protobuf.timestamp_pb2 import Timestamp

from chassis.lifecycle import Tasks
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from services.context.expiry import Expiry, Withdrawal


class _Rows:
    """Remembers what it is told; is away the first times."""

    def __init__(self, away: int) -> None:
        self.away, self.told = away, list[tuple[set[str], set[str]]]()
        self.withdrawn = list[Withdrawal]()
        self.changed = asyncio.Event()

    async def withdraw(self, sessions: Sequence[str], users: Sequence[Withdrawal]) -> int:
        self.changed.set()
        if self.away:
            self.away -= 1
            raise errors.Unavailable
        self.withdrawn += users
        self.told.append((set(sessions), {user.user_id for user in users}))
        return len(sessions)

    async def expire(self, grace: timedelta, most: int) -> int:
        return 0

    async def remove_old(self, keep: timedelta, most: int) -> int:
        return 0

    async def remove_trail(self, keep: timedelta, most: int) -> int:
        return 0

    async def until(self, many: int) -> None:
        """Returns when so much was told."""
        async with asyncio.timeout(20):
            while len(self.told) < many:
                self.changed.clear()
                await self.changed.wait()


def _revocation(session_id: str = "", user_id: str = "", *, security: bool = True) -> auth_pb2.Revocation:
    at = Timestamp()
    at.FromDatetime(datetime.now(UTC))
    return auth_pb2.Revocation(session_id=session_id, user_id=user_id, revoked_at=at, security=security)


async def test_all_of_a_burst_is_stored_at_once_and_only_what_is_for_reasons_of_security() -> None:
    rows, tasks = _Rows(away=0), Tasks()
    expiry = Expiry(rows, timedelta(days=30), timedelta(days=365))
    sessions, users = {ids.uuid7() for _ in range(1000)}, {ids.uuid7() for _ in range(3)}
    for session_id in sessions:
        expiry.revoked(_revocation(session_id))
        expiry.revoked(_revocation(ids.uuid7(), security=False))
    for user_id in users:
        expiry.revoked(_revocation(user_id=user_id))
    tasks.spawn(expiry.run(), "expiry")
    await rows.until(1)
    await tasks.close()
    assert rows.told == [(sessions, users)]


async def test_what_was_heard_of_while_the_database_is_away_is_stored_when_it_is_back() -> None:
    rows, tasks = _Rows(away=2), Tasks()
    expiry = Expiry(rows, timedelta(days=30), timedelta(days=365))
    tasks.spawn(expiry.run(), "expiry")
    first, second = ids.uuid7(), ids.uuid7()
    expiry.revoked(_revocation(first))
    await rows.changed.wait()
    expiry.revoked(_revocation(second))
    await rows.until(2)
    await tasks.close()
    assert rows.told == [({first}, set()), ({second}, set())]


async def test_of_a_user_who_was_withdrawn_twice_the_later_time_counts_in_whatever_order_it_is_heard() -> None:
    rows, tasks, user_id = _Rows(away=0), Tasks(), ids.uuid7()
    expiry = Expiry(rows, timedelta(days=30), timedelta(days=365))
    later, earlier = _revocation(user_id=user_id), _revocation(user_id=user_id)
    earlier.revoked_at.seconds -= 60
    for revocation in (later, earlier):
        expiry.revoked(revocation)
    tasks.spawn(expiry.run(), "expiry")
    await rows.until(1)
    await tasks.close()
    assert [user.at for user in rows.withdrawn] == [later.revoked_at.ToDatetime(UTC)]


def test_sessions_made_before_a_withdrawal_have_lower_ids_and_those_made_later_have_not() -> None:
    before = ids.SessionId.new()
    withdrawn = Withdrawal.of(ids.uuid7(), datetime.now(UTC) + timedelta(milliseconds=2))
    later = Withdrawal.of(ids.uuid7(), datetime.now(UTC) - timedelta(days=1))
    assert before < withdrawn.before_session
    assert not before < later.before_session
