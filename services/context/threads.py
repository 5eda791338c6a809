"""A conversation: its owner, its messages, its order."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from chassis.postgres import Conflict
from netra import errors, ids
from netra.context import UserExecutionContext
from services.context import pages

MAX_CONTENT = 256 * 1024
ROLES = ("user", "assistant")
_LAST_POSITION = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Thread:
    """A conversation."""

    thread_id: ids.ThreadId
    created_at: datetime
    updated_at: datetime
    messages: int


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of a thread."""

    message_id: ids.MessageId
    thread_id: ids.ThreadId
    position: int
    role: str
    content: str
    run_id: ids.RunId
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Draft:
    """A message that was not added yet. Raises `InvalidPayload` or `TooLarge` naming the field that is wrong."""

    request_id: ids.RequestId
    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise errors.InvalidPayload(f"role must be one of {', '.join(ROLES)}", field="role")
        if not self.content.strip():
            raise errors.InvalidPayload("content is required and must not be empty", field="content")
        if "\0" in self.content:
            raise errors.InvalidPayload("content must not have a NUL character", field="content")
        size = len(self.content.encode())
        if size > MAX_CONTENT:
            raise errors.TooLarge(f"content has {size} bytes; at most {MAX_CONTENT} are allowed", field="content")


class Kept(Protocol):
    """Where threads and messages are kept."""

    async def append(self, frame: UserExecutionContext, draft: Draft) -> Message:
        """The user's message under this request id: the one there is, or this one, now the last of the context's thread.

        Raises `NotFound`, and `Conflict` when the request id is taken at the same moment.
        """
        ...

    async def messages(self, user_id: ids.UserId, thread_id: ids.ThreadId, after: int, limit: int) -> tuple[Thread, list[Message]]:
        """A thread, and its messages behind a position, oldest first; fewer than `limit` when they are long. Raises `NotFound`."""
        ...

    async def threads(self, user_id: ids.UserId, before: ids.ThreadId | None, limit: int) -> list[Thread]:
        """The user's threads made before another one, newest first."""
        ...


class Threads:
    """The threads of all users; each method works for one."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    async def append(self, frame: UserExecutionContext, draft: Draft) -> Message:
        """The message at the end of the context's thread; the same request id adds it once.

        Raises `NotFound`, and `AlreadyExists` when the request id was used for another message.
        """
        try:
            message = await self._kept.append(frame, draft)
        except Conflict:
            # used for another thread at the same moment
            raise errors.AlreadyExists(field="request_id") from None
        if (message.thread_id, message.role, message.content) != (frame.thread_id, draft.role, draft.content):
            raise errors.AlreadyExists(field="request_id")
        return message

    async def messages(self, user_id: ids.UserId, thread_id: ids.ThreadId, page_size: int, page_token: str) -> tuple[list[Message], str]:
        """One page, oldest first, and the token of the next. Raises `NotFound`, `InvalidPayload`."""
        after, limit = _position(pages.unpacked(page_token, "m")), pages.limit(page_size)
        thread, page = await self._kept.messages(user_id, thread_id, after, limit)
        more = bool(page) and page[-1].position < thread.messages
        return page, pages.packed("m", str(page[-1].position)) if more else ""

    async def threads(self, user_id: ids.UserId, page_size: int, page_token: str) -> tuple[list[Thread], str]:
        """One page, newest first, and the token of the next. Raises `InvalidPayload`."""
        before, limit = _thread_id(pages.unpacked(page_token, "t")), pages.limit(page_size)
        found = await self._kept.threads(user_id, before, limit + 1)
        page = found[:limit]
        return page, pages.packed("t", page[-1].thread_id) if len(found) > limit else ""


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
