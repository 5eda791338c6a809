"""What is kept of a user, in their own hands: all of it told, or removed for good."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from chassis import log
from netra import errors, ids
from services.context import changes

_log = log.get(__name__)
# how often some rows are removed before an erasure is answered: most users have less than that
_IN_CALL = 32
# lines are sent together until they have so many bytes
_TOGETHER = 64 * 1024
# what is told after the threads and the messages in them, in this order
KINDS = ("message", "artifact", "grant_given", "grant_received", "context", "audit")


@dataclass(frozen=True, slots=True)
class Removed:
    """How much was removed."""

    threads: int = 0
    messages: int = 0
    artifacts: int = 0
    contexts: int = 0


@dataclass(frozen=True, slots=True)
class Line:
    """A line of an export, without its end, and its place among those of its kind."""

    place: tuple[object, ...]
    text: str


class Kept(Protocol):
    """Where everything is kept."""

    async def erase_thread(self, change: changes.Change) -> Removed:
        """Take a thread of the user away, for good. Raises `NotFound`, `PermissionDenied`, `FailedPrecondition` while a run goes on."""
        ...

    async def erase_everything(self, change: changes.Change) -> Removed:
        """Take everything of the user away, for good. Raises `FailedPrecondition` while a run goes on."""
        ...

    async def note(self, change: changes.Change) -> None:
        """Add a line to the audit trail of the user."""
        ...

    async def threads(self, user_id: ids.UserId, after: tuple[object, ...]) -> list[Line]:
        """The next threads of the user, in the order of their ids."""
        ...

    async def messages(self, user_id: ids.UserId, thread_id: ids.ThreadId, after: int) -> list[Line]:
        """The next messages of a thread of the user."""
        ...

    async def lines(self, user_id: ids.UserId, kind: str, after: tuple[object, ...]) -> list[Line]:
        """The next lines of one of `KINDS`; of messages those in threads of others."""
        ...


class LeftOver(Protocol):
    """Who removes what nobody has any more, a little at a time."""

    async def give_up_abandoned(self) -> None:
        """Give up the uploads that nothing came for: their process died."""
        ...

    async def remove_some(self) -> bool:
        """Remove some of a file that was given up; whether there was one."""
        ...

    async def erase_deleted(self, keep: timedelta) -> int:
        """Erase some threads that were deleted that long ago and that no run goes on with; returns how many."""
        ...

    async def erased_threads(self, after: ids.ThreadId | None, user_id: ids.UserId | None = None) -> list[ids.ThreadId]:
        """Some threads that were erased, of all users or of one, in the order of their ids."""
        ...

    async def thread(self, thread_id: ids.ThreadId) -> bool:
        """Remove some of what is left of a thread that was erased; whether there may be more. It stays until its files are gone."""
        ...

    async def erased_users(self) -> list[tuple[ids.UserId, ids.RequestId]]:
        """Who had everything erased that is not removed yet, and under which request."""
        ...

    async def of_user(self, user_id: ids.UserId, request_id: ids.RequestId) -> bool:
        """Blank some messages and give up some files, and remove some contexts and lines of the audit trail, of a user who had everything
        erased; whether there may be more.
        """
        ...

    async def done(self, user_id: ids.UserId, request_id: ids.RequestId) -> None:
        """Take note that nothing is left, unless something is."""
        ...

    async def forget_changes(self) -> None:
        """Forget what was asked so long ago that nobody asks for it again."""
        ...


class Removal:
    """Removes for good what was erased or given up, and what was deleted as long ago as `keep`.

    `most` is how many times it may remove some; with None it goes on to the end.
    """

    def __init__(self, left_over: LeftOver, keep: timedelta) -> None:
        self._left_over, self._keep = left_over, keep

    async def of_thread(self, thread_id: ids.ThreadId, most: int | None = None) -> None:
        """What is left of a thread that was erased, but for the bytes of its files."""
        await self._of_thread(thread_id, _times(most))

    async def of_user(self, user_id: ids.UserId, request_id: ids.RequestId, most: int | None = None) -> None:
        """What is left of a user who had everything erased, but for the bytes of their files."""
        times = _times(most)
        for _ in times:
            if not await self._left_over.of_user(user_id, request_id):
                await self._of_threads(user_id, times)
                await self._left_over.done(user_id, request_id)
                break

    async def sweep(self) -> None:
        """Everything there is to remove now."""
        await self._left_over.give_up_abandoned()
        while await self._left_over.erase_deleted(self._keep):
            pass
        # a thread stays until its files are gone: it goes the second time
        for _ in range(2):
            for user_id, request_id in await self._left_over.erased_users():
                await self.of_user(user_id, request_id)
            await self._of_threads(None, _times(None))
            while await self._left_over.remove_some():
                pass
        await self._left_over.forget_changes()

    async def _of_thread(self, thread_id: ids.ThreadId, times: Iterator[int]) -> bool:
        """Whether it was done before the times were over."""
        for _ in times:
            if not await self._left_over.thread(thread_id):
                return True
        return False

    async def _of_threads(self, user_id: ids.UserId | None, times: Iterator[int]) -> None:
        after: ids.ThreadId | None = None
        while page := await self._left_over.erased_threads(after, user_id):
            for thread_id in page:
                if not await self._of_thread(thread_id, times):
                    return
            after = page[-1]


def _times(most: int | None) -> Iterator[int]:
    return itertools.count() if most is None else iter(range(most))


class Privacy:
    """The data of all users; each method works for one. `left_over` is told when there is something to remove."""

    def __init__(self, kept: Kept, removal: Removal, left_over: Callable[[], None]) -> None:
        self._kept, self._removal, self._left_over = kept, removal, left_over

    async def erase_thread(self, change: changes.Change) -> Removed:
        """Remove a thread for good, and tell what was.

        Raises `NotFound`, `PermissionDenied`, `AlreadyExists`, and `FailedPrecondition` while a run goes on with it.
        """
        removed = await self._kept.erase_thread(change)
        if change.thread_id is not None:
            await self._some(self._removal.of_thread(change.thread_id, _IN_CALL))
        return removed

    async def erase_everything(self, change: changes.Change) -> Removed:
        """Remove everything for good, and tell what was. Raises `AlreadyExists`, and `FailedPrecondition` while a run goes on."""
        removed = await self._kept.erase_everything(change)
        await self._some(self._removal.of_user(change.user_id, change.request_id, _IN_CALL))
        return removed

    async def _some(self, removing: Awaitable[None]) -> None:
        """Remove what can be at once. It is hidden now, and goes whatever happens to this call: who sweeps goes on with it."""
        try:
            await removing
        except errors.NetraError as error:
            _log.info("what was erased is removed later", code=error.code)
        finally:
            self._left_over()

    async def export(self, change: changes.Change) -> AsyncIterator[bytes]:
        """Everything that is kept of the user, as whole lines of JSON; the last one says so."""
        await self._kept.note(change)
        waiting, size = bytearray(), 0
        async for text in self._lines(change.user_id):
            waiting += text.encode() + b"\n"
            size += 1
            if len(waiting) >= _TOGETHER:
                yield bytes(waiting)
                waiting.clear()
        yield bytes(waiting) + b'{"kind":"end","lines":%d}\n' % size

    async def _lines(self, user_id: ids.UserId) -> AsyncIterator[str]:
        after: tuple[object, ...] = ()
        while page := await self._kept.threads(user_id, after):
            for line in page:
                yield line.text
                async for text in self._messages(user_id, ids.ThreadId(str(line.place[0]))):
                    yield text
            after = page[-1].place
        for kind in KINDS:
            after = ()
            while page := await self._kept.lines(user_id, kind, after):
                for line in page:
                    yield line.text
                after = page[-1].place

    async def _messages(self, user_id: ids.UserId, thread_id: ids.ThreadId) -> AsyncIterator[str]:
        after = 0
        while page := await self._kept.messages(user_id, thread_id, after):
            for line in page:
                yield line.text
            after = int(str(page[-1].place[0]))
