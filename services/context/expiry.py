"""Contexts that end by themselves: their session or user was withdrawn, their token was not renewed; and those that ended long ago."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Protocol

import stamina

from chassis import log, telemetry
from netra import errors
from netra.auth.v1 import auth_pb2

_log = log.get(__name__)
_ended = telemetry.meter.create_counter("netra.contexts.ended", description="Contexts that ended by themselves, by reason.")
_SWEEP_S = 60.0
# the clocks of those who sign, of those who verify, and of the database differ
_GRACE = timedelta(seconds=60)
_AT_ONCE = 500
_AWAY = (errors.Unavailable, errors.DeadlineExceeded)


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """A user who was withdrawn at a time; sessions that were made before then have lower ids than this."""

    user_id: str
    at: datetime
    before_session: str

    @classmethod
    def of(cls, user_id: str, at: datetime) -> Withdrawal:
        """That of a user at a time."""
        # ids of sessions are UUIDv7: they begin with the milliseconds at which they were made
        return cls(user_id, at, str(uuid.UUID(int=int(at.timestamp() * 1000) << 80)))


class Kept(Protocol):
    """Where the contexts of all users are kept."""

    async def withdraw(self, sessions: Sequence[str], users: Sequence[Withdrawal]) -> int:
        """Close what is open of these sessions and users, with a line each in the audit trail; returns how many there were."""
        ...

    async def expire(self, grace: timedelta, most: int) -> int:
        """Close open contexts whose last token ended that long ago, with a line each in the audit trail; returns how many."""
        ...

    async def remove_old(self, keep: timedelta, most: int) -> int:
        """Remove contexts that were closed that long ago; returns how many. Their audit trail stays."""
        ...

    async def remove_trail(self, keep: timedelta, most: int) -> int:
        """Remove the oldest lines of the audit trail that are as old as that; returns how many."""
        ...


class Expiry:
    """Ends what is to end, of all users. Replicas do it side by side: what one has closed another finds closed."""

    def __init__(self, kept: Kept, keep: timedelta, keep_trail: timedelta) -> None:
        self._kept, self._keep, self._keep_trail = kept, keep, keep_trail
        self._sessions: set[str] = set()
        self._users: dict[str, Withdrawal] = {}
        self._heard = asyncio.Event()

    def revoked(self, revocation: auth_pb2.Revocation) -> None:
        """Take note of what was withdrawn; its contexts are closed soon, when that was for reasons of security."""
        if not revocation.security:
            return
        if revocation.session_id:
            self._sessions.add(revocation.session_id)
        if revocation.user_id:
            at, known = revocation.revoked_at.ToDatetime(UTC), self._users.get(revocation.user_id)
            # they come in any order
            if known is None or known.at < at:
                self._users[revocation.user_id] = Withdrawal.of(revocation.user_id, at)
        self._heard.set()

    async def run(self) -> None:
        """Close and remove, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._withdraw_always())
            group.create_task(self._sweep_always())

    async def _withdraw_always(self) -> None:
        while True:
            await self._heard.wait()
            self._heard.clear()
            # all that was heard of at once, after a restart those of hours
            sessions, users = list(self._sessions), list(self._users.values())
            self._sessions, self._users = set(), {}
            async for attempt in stamina.retry_context(on=_AWAY, attempts=None, timeout=None, wait_initial=0.1, wait_max=1.0):
                with attempt:
                    closed = await self._kept.withdraw(sessions, users)
            if closed:
                _ended.add(closed, {"reason": "revoke"})
                _log.info("contexts were closed: their session or user was withdrawn", contexts=closed)

    async def _sweep_always(self) -> None:
        while True:
            try:
                await self.sweep()
            except _AWAY as error:
                _log.warning("contexts could not be swept yet", code=error.code)
            await asyncio.sleep(_SWEEP_S)

    async def sweep(self) -> None:
        """Close what nobody renews any more, and remove what was closed or told long ago."""
        await self._all("expire", lambda: self._kept.expire(_GRACE, _AT_ONCE))
        await self._all("remove", lambda: self._kept.remove_old(self._keep, _AT_ONCE))
        while await self._kept.remove_trail(self._keep_trail, _AT_ONCE) == _AT_ONCE:
            pass

    async def _all(self, reason: str, step: Callable[[], Awaitable[int]]) -> None:
        done = _AT_ONCE
        while done == _AT_ONCE:
            done = await step()
            _ended.add(done, {"reason": reason})
