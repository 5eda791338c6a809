"""A TCP proxy that can cut, stall and delay what goes through it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

_PART = 64 * 1024


class Proxy:
    """Forwards connections from `port` to the port `to` of this machine."""

    def __init__(self) -> None:
        self.port = self.to = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._delay_s = 0.0

    async def serve(self, connected: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        """One connection, until either end is done with it."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.to)
        except OSError:
            back.transport.abort()
            return
        pair = {back, writer}
        self._open |= pair
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._forward(connected, writer))
                group.create_task(self._forward(reader, back))
        finally:
            self._open -= pair
            for one in pair:
                one.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while part := await reader.read(_PART):
                if self._delay_s:
                    await asyncio.sleep(self._delay_s)
                await self._flows.wait()
                writer.write(part)
                await writer.drain()
        writer.transport.abort()

    def cut(self) -> None:
        """End every connection now; new ones are taken."""
        for one in tuple(self._open):
            one.transport.abort()

    @contextlib.asynccontextmanager
    async def stalled(self) -> AsyncIterator[None]:
        """Nothing goes through for the time of the block, and nobody is told."""
        self._flows.clear()
        try:
            yield
        finally:
            self._flows.set()

    @contextlib.asynccontextmanager
    async def delayed(self, seconds: float) -> AsyncIterator[None]:
        """Every part takes so much longer for the time of the block."""
        self._delay_s = seconds
        try:
            yield
        finally:
            self._delay_s = 0.0


@contextlib.asynccontextmanager
async def listening() -> AsyncIterator[Proxy]:
    """A proxy for the time of the block; where it leads is said later."""
    proxy = Proxy()
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut()
