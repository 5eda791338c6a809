"""What comes over the socket of a client and waits to be read: bounded, and nothing else waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
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


class Run:
    """The events of one run that came and were not taken yet; what there is no room for is left to the record."""

    __slots__ = ("_bytes", "_came", "_left", "_seq", "after", "request_id", "run_id")

    def __init__(self, request_id: str, after: int) -> None:
        self.request_id = request_id
        # empty until it is known
        self.run_id = ""
        # all of the run up to this cursor was taken
        self.after = after
        self._seq = 0
        # a number stands for what the record is to be asked for: everything from this cursor on
        self._came: asyncio.Queue[tuple[dict[str, Any] | errors.NetraError | int, int]] = asyncio.Queue()
        self._bytes = 0
        self._left = False

    def wants(self, event: Mapping[str, Any]) -> bool:
        """Whether the event is of the run; until its id is known, the request tells."""
        return bool(event["run_id"] == self.run_id if self.run_id else event["request_id"] == self.request_id)

    def put(self, event: dict[str, Any], size: int) -> None:
        """Keep an event of so many bytes; without room for it, nothing until all of it was asked of the record."""
        if self._left:
            return
        waiting = self._came.qsize()
        if waiting and (waiting >= _FRAMES or self._bytes + size > _BYTES):
            self._drop()
            self._left = True
            self._came.put_nowait((0, 0))
        else:
            self._bytes += size
            self._came.put_nowait((event, size))

    def cut(self, oldest: int) -> None:
        """What was to come before this cursor is gone: after what waits, the record tells what there still is."""
        if not self._left:
            self._came.put_nowait((oldest, 0))

    def end(self, error: errors.NetraError, *, recorded: bool = True) -> None:
        """Let it end with an error, after what waits; unless it is `recorded`, without what the record would be asked for."""
        if self._left and not recorded:
            self._drop()
        self._came.put_nowait((error, 0))

    async def take(self) -> dict[str, Any] | None:
        """The next event that came; None when the record is to be asked for those after `after`. Raises what it ends with."""
        told, size = await self._came.get()
        if isinstance(told, errors.NetraError):
            raise told
        if isinstance(told, int):
            # from here on what comes is kept again: nothing is between it and what the record is asked for after this
            self.after, self._left = max(self.after, told - 1), False
            return None
        self._bytes -= size
        return told

    def accept(self, event: Mapping[str, Any]) -> bool:
        """Whether it is the next one of the run. False for one that was taken before; raises `FailedPrecondition` when some are missing."""
        if event["run_id"] != self.run_id or event["cursor"] <= self.after:
            return False
        if event["seq"] != self._seq + 1:
            raise gone(self.run_id)
        self.after, self._seq = event["cursor"], event["seq"]
        return True

    def _drop(self) -> None:
        while not self._came.empty():
            self._came.get_nowait()
        self._bytes = 0


def gone(run_id: str) -> errors.FailedPrecondition:
    """What whoever follows a run is told when not all of it is kept any more."""
    return errors.FailedPrecondition(f"Events of run {run_id} are kept no longer. Ask for those that are left.", run_id=run_id)
