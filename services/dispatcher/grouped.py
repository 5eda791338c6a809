"""What is written at the same moment is written together."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from chassis import lifecycle
from netra import errors

_T = TypeVar("_T")
_AWAY = (errors.Unavailable, errors.DeadlineExceeded)
# what is not written by then is somebody else's
_FLUSH_S = 5.0


class Grouped(Generic[_T]):
    """One write at a time, of all that came while the one before was under way. Nothing is held back for more to come.

    `write` says of each whether it was done. What a group is refused for is asked of each alone; an outage is the answer of all.
    """

    def __init__(self, write: Callable[[Sequence[_T]], Awaitable[Sequence[bool]]], most: int) -> None:
        self._write, self._most = write, most
        self._waiting: list[tuple[_T, asyncio.Future[bool]]] = []
        self._writer: asyncio.Task[None] | None = None
        self._tasks = lifecycle.Tasks()
        # a group is nobody's: neither the deadline nor the name of who came first may stick to it
        self._nobodys = contextvars.copy_context()

    async def put(self, item: _T) -> bool:
        """Whether it was done, once that is known. It is written also when its caller is stopped meanwhile. Raises what `write` does."""
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if self._writer is None:
            self._writer = self._nobodys.run(self._tasks.spawn, self._write_all(), name="write together")
        return await answer

    async def close(self) -> None:
        """Write what waits, within five seconds."""
        if self._writer is not None:
            await asyncio.wait({self._writer}, timeout=_FLUSH_S)
        await self._tasks.close()

    async def _write_all(self) -> None:
        group: list[tuple[_T, asyncio.Future[bool]]] = []
        try:
            # those of the same turn of the loop come along
            await asyncio.sleep(0)
            while self._waiting:
                group, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
                await self._written(group)
        finally:
            self._writer = None
            for _, answer in (*group, *self._waiting):
                if not answer.done():
                    answer.set_exception(errors.Unavailable("It was not written: this process stops."))
            self._waiting.clear()

    async def _written(self, group: Sequence[tuple[_T, asyncio.Future[bool]]]) -> None:
        try:
            done = await self._write([item for item, _ in group])
        except Exception as error:
            if len(group) > 1 and not isinstance(error, _AWAY):
                for one in group:
                    await self._written([one])
                return
            for _, answer in group:
                if not answer.done():
                    answer.set_exception(error)
        else:
            for (_, answer), was_done in zip(group, done, strict=True):
                if not answer.done():
                    answer.set_result(was_done)
