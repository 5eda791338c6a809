"""How many sockets each user has over all gateways, and which of them a newer one of the same client replaces."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import Protocol

from chassis import limits, log
from netra import errors, ids

_log = log.get(__name__)
_CHANNEL = "replaced"
# a lease lasts 8 s: one that was not renewed is soon tried again
_RENEW_S, _RETRY_S = 2.5, 0.5
# so long a socket that is just being closed somewhere may still be counted
_SECOND_LOOK_S = 0.25


class Leases(Protocol):
    """Who counts for all gateways."""

    async def take(self, key: str, holder: str, most: int, group: str = "") -> list[str] | None: ...

    async def renew(self, held: limits.Held) -> None: ...

    async def release(self, held: limits.Held) -> None: ...


class Channel(Protocol):
    """What is said to all gateways."""

    async def publish(self, channel: str, message: str) -> None: ...

    def listen(self, channel: str) -> AsyncIterator[str]: ...


class Presence:
    """The sockets of this process among all. While Valkey is away nobody counts for all: each gateway goes on by its own count."""

    def __init__(self, leases: Leases, channel: Channel) -> None:
        self._leases, self._channel = leases, channel
        self._mine: dict[str, tuple[str, str]] = {}
        self._gone: list[tuple[str, str]] = []
        self._alone = False
        self._moved = asyncio.Event()

    async def enter(self, user_id: ids.UserId, connection_id: str, client_id: str, most: int) -> bool:
        """Count a socket; false when the user has `most` elsewhere. An earlier one of the same client is sent away, wherever it is.

        Raises `Unavailable` when a later one of the same client came meanwhile.
        """
        group = f"{client_id} " if client_id else ""
        held = (f"sockets:{user_id}", f"{client_id} {connection_id}")
        self._mine[connection_id] = held
        try:
            await self._release()
            replaced = await self._take(connection_id, held, most, group)
            if replaced is None:
                await asyncio.sleep(_SECOND_LOOK_S)
                replaced = await self._take(connection_id, held, most, group)
            for one in replaced or ():
                await self._channel.publish(_CHANNEL, one.rpartition(" ")[2])
        except limits.Superseded:
            # clocks of gateways differ a little: who is not gone comes again, and is later then
            raise errors.Unavailable("A newer socket of the same client is open.", retry_after_ms=1000) from None
        except errors.Unavailable:
            self._counts(alone=True)
            return True
        self._counts(alone=False)
        return replaced is not None

    async def _take(self, connection_id: str, held: tuple[str, str], most: int, group: str) -> list[str] | None:
        """Takes a place, unless the socket is gone already, or gives it back when it is gone by then. Raises `limits.Superseded`."""
        replaced = await self._leases.take(*held, most, group) if connection_id in self._mine else None
        if connection_id not in self._mine:
            self._gone.append(held)
            self._moved.set()
            raise limits.Superseded
        return replaced

    def leave(self, connection_id: str) -> None:
        """Count it no more; once is enough."""
        held = self._mine.pop(connection_id, None)
        if held is not None:
            self._gone.append(held)
            self._moved.set()

    async def run(self, replace: Callable[[str], None]) -> None:
        """Keep the leases, and hear of sockets here that were replaced elsewhere, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen(replace))
            group.create_task(self._keep())

    async def close(self) -> None:
        """Give back what is held."""
        self._gone += self._mine.values()
        self._mine.clear()
        with contextlib.suppress(errors.Unavailable):
            await self._release()

    def _counts(self, *, alone: bool) -> None:
        if alone != self._alone:
            self._alone = alone
            _log.warning("sockets are counted by this gateway alone" if alone else "sockets are counted for all gateways again")

    async def _listen(self, replace: Callable[[str], None]) -> None:
        async for connection_id in self._channel.listen(_CHANNEL):
            replace(connection_id)

    async def _keep(self) -> None:
        renew_at = time.monotonic() + _RENEW_S
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(renew_at - time.monotonic(), 0)):
                    await self._moved.wait()
            self._moved.clear()
            due = time.monotonic() >= renew_at
            try:
                await self._release()
                if due:
                    renew_at = time.monotonic() + _RENEW_S
                    await self._renew()
            except errors.Unavailable:
                renew_at = min(renew_at, time.monotonic() + _RETRY_S)

    async def _renew(self) -> None:
        held = dict(self._mine)
        try:
            await self._leases.renew(list(held.values()))
        finally:
            # what was given back meanwhile may have been renewed after that
            self._gone += [one for connection_id, one in held.items() if connection_id not in self._mine]
        await self._release()

    async def _release(self) -> None:
        """Gives back what is no longer held; what cannot be given back now ends by itself."""
        gone, self._gone = self._gone, []
        if gone:
            await self._leases.release(gone)
