"""A conversation: its owner, its messages, its order."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from chassis.postgres import Conflict
from netra import errors, ids
from netra.context import UserExecutionContext
from services.context import changes, drafts, pages

# which threads are meant, and what the tokens of their pages begin with
OWN, SHARED, DELETED = "own", "shared", "deleted"
_PAGES = {OWN: "t", SHARED: "s", DELETED: "d"}
_LAST_POSITION = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Thread:
    """A conversation, and what the user who asks for it may do with it: `own`, `write` or `read`."""

    thread_id: ids.ThreadId
    created_at: datetime
    updated_at: datetime
    messages: int
    owner_id: ids.UserId
    access: str
    deleted_at: datetime | None


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of a thread. `user_id` is its author; when they had it erased its place is left, with no content."""

    message_id: ids.MessageId
    thread_id: ids.ThreadId
    position: int
    role: str
    content: str
    run_id: ids.RunId
    created_at: datetime
    user_id: ids.UserId


@dataclass(frozen=True, slots=True)
class Last:
    """A message with which a context was closed, and when that was."""

    message_id: ids.MessageId
    closed_at: datetime


@dataclass(frozen=True, slots=True)
class Reader:
    """Who reads: a user by themselves, or a run of theirs through its execution context, for as long as that is open."""

    user_id: ids.UserId
    context_id: ids.ContextId | None = None


class Kept(Protocol):
    """Where threads and messages are kept. For who may not know of a thread there is none."""

    async def append(self, frame: UserExecutionContext, draft: drafts.Draft) -> Message:
        """The user's message under this request id: the one there is, or this one, now the last of the context's thread.

        Raises `FailedPrecondition` when the context is closed and there is none, `NotFound`, `PermissionDenied`, and `Conflict` when the
        request id is taken at the same moment.
        """
        ...

    async def close(self, frame: UserExecutionContext, draft: drafts.Draft, actor: str) -> Last:
        """Close the context, its message the last of its thread; the one there is under the request id, when that is the same.

        Raises `AlreadyExists` when it is another one, `FailedPrecondition` when the context is closed without it, and as `append`.
        """
        ...

    async def hide(self, frame: UserExecutionContext) -> int:
        """Hide the messages of the context's run, those to come as well; how many are hidden by it.

        Raises `FailedPrecondition` when the context is closed, but for one that was closed with a message.
        """
        ...

    async def messages(self, reader: Reader, thread_id: ids.ThreadId, after: int, limit: int) -> tuple[Thread, list[Message]]:
        """A thread, and its messages behind a position, oldest first, without hidden ones; fewer than `limit` when they are long.

        Raises `NotFound`, and `FailedPrecondition` when the context is closed.
        """
        ...

    async def threads(self, user_id: ids.UserId, selection: str, before: ids.ThreadId | None, limit: int) -> list[Thread]:
        """The user's threads, those granted to them or those they deleted, made before another one, newest first."""
        ...

    async def thread(self, user_id: ids.UserId, thread_id: ids.ThreadId) -> Thread | None:
        """A thread that is there for the user; one they deleted, too."""
        ...

    async def delete(self, change: changes.Change) -> Thread:
        """Hide a thread, once. Raises `NotFound`, `PermissionDenied`."""
        ...

    async def restore(self, change: changes.Change, keep: timedelta) -> Thread:
        """Show a thread again that was deleted no longer ago than that. Raises `NotFound`, `PermissionDenied`."""
        ...


class Threads:
    """The threads of all users; each method works for one. Deleted ones can be restored for as long as `keep`."""

    def __init__(self, kept: Kept, keep: timedelta) -> None:
        self._kept, self._keep = kept, keep

    async def append(self, frame: UserExecutionContext, draft: drafts.Draft) -> Message:
        """The message at the end of the context's thread; the same request id adds it once, and finds it also when the context is closed.

        Raises `NotFound`, `PermissionDenied`, `FailedPrecondition`, and `AlreadyExists` when the request id was used for another message.
        """
        try:
            message = await self._kept.append(frame, draft)
        except Conflict:
            # used for another thread at the same moment
            raise errors.AlreadyExists(field="request_id") from None
        if (message.thread_id, message.role, message.content) != (frame.thread_id, draft.role, draft.content):
            raise errors.AlreadyExists(field="request_id")
        return message

    async def close(self, frame: UserExecutionContext, draft: drafts.Draft, actor: str) -> Last:
        """Close the context after this message at the end of its thread; the same again finds the same.

        Raises as `append`; nothing is closed then.
        """
        try:
            return await self._kept.close(frame, draft, actor)
        except Conflict:
            raise errors.AlreadyExists(field="request_id") from None

    async def hide(self, frame: UserExecutionContext) -> int:
        """Hide all messages of the context's run from everybody who reads the thread. How many were not hidden before.

        Raises `FailedPrecondition` when the context is closed, but for one that was closed with a message.
        """
        return await self._kept.hide(frame)

    async def messages(self, reader: Reader, thread_id: ids.ThreadId, page_size: int, page_token: str) -> tuple[list[Message], str]:
        """One page, oldest first, and the token of the next. Raises `NotFound`, `InvalidPayload`, `FailedPrecondition`."""
        after, limit = _position(pages.unpacked(page_token, "m")), pages.limit(page_size)
        thread, page = await self._kept.messages(reader, thread_id, after, limit)
        more = bool(page) and page[-1].position < thread.messages
        return page, pages.packed("m", str(page[-1].position)) if more else ""

    async def threads(self, user_id: ids.UserId, selection: str, page_size: int, page_token: str) -> tuple[list[Thread], str]:
        """One page, newest first, and the token of the next. Raises `InvalidPayload`."""
        kind = _PAGES[selection]
        before, limit = _thread_id(pages.unpacked(page_token, kind)), pages.limit(page_size)
        found = await self._kept.threads(user_id, selection, before, limit + 1)
        page = found[:limit]
        return page, pages.packed(kind, page[-1].thread_id) if len(found) > limit else ""

    async def get(self, user_id: ids.UserId, thread_id: ids.ThreadId) -> Thread:
        """A thread of the user, or one granted to them. Raises `NotFound`, also for one they deleted."""
        found = await self._kept.thread(user_id, thread_id)
        if found is None or found.deleted_at is not None:
            raise changes.no_thread()
        return found

    async def delete(self, change: changes.Change) -> tuple[Thread, datetime | None]:
        """The thread, now hidden from everybody, and when it will be erased; None when it was restored since.

        Raises `NotFound`, `PermissionDenied`, `AlreadyExists`.
        """
        thread = await self._kept.delete(change)
        return thread, None if thread.deleted_at is None else thread.deleted_at + self._keep

    async def restore(self, change: changes.Change) -> Thread:
        """The thread, shown again. Raises `NotFound`, `PermissionDenied`, `AlreadyExists`."""
        return await self._kept.restore(change, self._keep)


def _position(place: str) -> int:
    if not place:
        return 0
    if not place.isdecimal() or len(place) > 19 or int(place) > _LAST_POSITION:
        raise pages.unknown()
    return int(place)


def _thread_id(place: str) -> ids.ThreadId | None:
    try:
        return ids.ThreadId(place) if place else None
    except errors.InvalidPayload:
        raise pages.unknown() from None
