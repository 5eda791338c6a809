"""UnifiedWebSocketManager: the sockets and streams of this process by user and session; limits; drain."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from chassis import identity, log, telemetry
from gateway import close_codes
from netra import errors, ids
from netra.auth.v1 import auth_pb2

_log = log.get(__name__)
_open = telemetry.meter.create_up_down_counter("netra.gateway.sockets", description="Open sockets and streams of events.")


class TooMany(Exception):
    """The user has as many sockets as they may have."""


class Socket(Protocol):
    """What is known here of one socket, or of one stream of events over HTTP."""

    principal: identity.Principal
    client_id: str
    connection_id: ids.ConnectionId

    def end(self, close: close_codes.Close) -> None:
        """Close it now."""

    def drain(self) -> None:
        """Send what is queued, say where to resume, close."""


class Presence(Protocol):
    """The sockets of all gateways."""

    async def enter(self, user_id: ids.UserId, connection_id: str, client_id: str, most: int) -> bool:
        """Count a socket; false when the user has `most` elsewhere."""
        ...

    def leave(self, connection_id: str) -> None:
        """Count it no more."""


class UnifiedWebSocketManager:
    """Every open socket of this process."""

    def __init__(self, allowed: Callable[[identity.Principal], int], presence: Presence | None = None) -> None:
        self._allowed, self._presence = allowed, presence
        self.draining = asyncio.Event()
        self._by_user: dict[ids.UserId, list[Socket]] = {}
        self._gone = asyncio.Event()

    def __len__(self) -> int:
        return sum(map(len, self._by_user.values()))

    def open_for(self, user_id: ids.UserId) -> int:
        """How many sockets the user has here."""
        return len(self._by_user.get(user_id, ()))

    async def admit(self, socket: Socket) -> None:
        """Take a socket in; an older one of the same client makes room, here or at another gateway.

        Raises `TooMany`, or `Unavailable` while draining.
        """
        if self.draining.is_set():
            raise errors.Unavailable("This gateway is stopping. Try again.", retry_after_ms=500)
        who, allowed = socket.principal, self._allowed(socket.principal)
        mine = self._by_user.get(who.user_id, [])
        older = next((one for one in mine if socket.client_id and one.client_id == socket.client_id), None)
        if older is not None:
            self._replace(older)
        elif len(mine) >= allowed:
            raise TooMany
        # in before it is counted elsewhere: others of the user may come meanwhile
        self._by_user.setdefault(who.user_id, []).append(socket)
        _open.add(1)
        try:
            fits = self._presence is None or await self._presence.enter(who.user_id, socket.connection_id, socket.client_id, allowed)
        except BaseException:
            self.remove(socket)
            raise
        if not fits:
            self.remove(socket)
            raise TooMany

    def replaced(self, connection_id: str) -> None:
        """A newer socket of the same client was opened at another gateway."""
        for socket in self._all():
            if socket.connection_id == connection_id:
                self._replace(socket)

    def _replace(self, older: Socket) -> None:
        self.remove(older)
        older.end(close_codes.REPLACED)

    def remove(self, socket: Socket) -> None:
        """Forget a socket; once is enough."""
        if self._presence is not None:
            self._presence.leave(socket.connection_id)
        mine = self._by_user.get(socket.principal.user_id, [])
        if socket in mine:
            mine.remove(socket)
            _open.add(-1)
        if not mine:
            self._by_user.pop(socket.principal.user_id, None)
        if not self._by_user:
            self._gone.set()

    def revoked(self, revocation: auth_pb2.Revocation) -> None:
        """Close the sockets of a session that was ended, or of a user whose tokens were withdrawn."""
        before = revocation.revoked_at.ToNanoseconds() / 1e9
        for socket in self._all() if revocation.session_id else tuple(self._by_user.get(ids.UserId(revocation.user_id), ())):
            who = socket.principal
            if who.session_id == revocation.session_id or (who.user_id == revocation.user_id and who.issued_at <= before):
                socket.end(close_codes.REVOKED)

    async def drain(self, patience_s: float) -> None:
        """Refuse new sockets, send the open ones away with the cursor to resume from, and wait until they are gone."""
        self.draining.set()
        for socket in self._all():
            socket.drain()
        try:
            async with asyncio.timeout(patience_s):
                while self._by_user:
                    self._gone.clear()
                    await self._gone.wait()
        except TimeoutError:
            _log.warning("sockets did not drain in time", open=len(self))
            for socket in self._all():
                socket.end(close_codes.DRAINING)

    def _all(self) -> list[Socket]:
        return [socket for mine in self._by_user.values() for socket in mine]
