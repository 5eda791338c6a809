"""What comes of a streaming RPC over the socket of a client and waits to be read: bounded, and nothing else waits for it."""

from __future__ import annotations

import asyncio
from typing import Any

from netra import errors

_FRAMES = 1_000
_BYTES = 16 * 1024 * 1024


class Stream:
    """A streaming RPC: what came and was not taken yet."""

    __slots__ = ("_bytes", "_came", "overrun", "stream_id")

    def __init__(self) -> None:
        self.stream_id = ""
        # more came than there is room for: nothing is taken any more, and it ends after what waits
        self.overrun = False
        self._came: asyncio.Queue[tuple[dict[str, Any] | errors.NetraError, int]] = asyncio.Queue()
        self._bytes = 0

    def put(self, frame: dict[str, Any], size: int) -> None:
        """Keep a frame of so many bytes, as far as there is room: for one there is always, and for the end."""
        waiting = self._came.qsize()
        full = waiting >= _FRAMES or self._bytes + size > _BYTES
        if waiting and full and frame["type"] == "stream_data":
            self.overrun = True
            self.end(errors.Unavailable("The stream was not read as fast as it came, and was ended. Open it again from where it was."))
        else:
            self._bytes += size
            self._came.put_nowait((frame, size))

    def end(self, error: errors.NetraError) -> None:
        """Let it end with an error, after what waits."""
        self._came.put_nowait((error, 0))

    async def take(self) -> dict[str, Any]:
        """The next frame. Raises what it ends with."""
        told, size = await self._came.get()
        if isinstance(told, errors.NetraError):
            raise told
        self._bytes -= size
        return told
