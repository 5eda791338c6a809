"""A conversation: its owner, its messages, its order."""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from datetime import UTC, datetime

from chassis.postgres import Conflict, Transaction
from netra import errors, ids
from netra.context import UserExecutionContext
from services.context import store

MAX_CONTENT = 256 * 1024
ROLES = ("user", "assistant")
_PAGE, _LARGEST_PAGE = 50, 200
_LAST_POSITION = 2**63 - 1


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


class Threads:
    """The threads of all users; each method works for one."""

    def __init__(self, threads: store.Store) -> None:
        self._store = threads

    async def append(self, frame: UserExecutionContext, draft: Draft) -> store.Message:
        """The message at the end of the context's thread; the same request id adds it once.

        Raises `NotFound`, and `AlreadyExists` when the request id was used for another message.
        """
        try:
            async with self._store.transaction(frame.user_id) as transaction:
                return await _append(transaction, frame, draft)
        except Conflict:
            # used for another thread at the same moment
            raise errors.AlreadyExists(field="request_id") from None

    async def messages(
        self, user_id: ids.UserId, thread_id: ids.ThreadId, page_size: int, page_token: str
    ) -> tuple[list[store.Message], str]:
        """One page, oldest first, and the token of the next. Raises `NotFound`, `InvalidPayload`."""
        after, limit = _position(_unpacked(page_token, "m")), _limit(page_size)
        async with self._store.transaction(user_id) as transaction:
            thread = await store.thread(transaction, user_id, thread_id)
            if thread is None:
                raise errors.NotFound("There is no such thread.")
            page = await store.messages(transaction, user_id, thread_id, after, limit)
        more = bool(page) and page[-1].position < thread.messages
        return page, _packed("m", str(page[-1].position)) if more else ""

    async def threads(self, user_id: ids.UserId, page_size: int, page_token: str) -> tuple[list[store.Thread], str]:
        """One page, newest first, and the token of the next. Raises `InvalidPayload`."""
        before, limit = _thread_id(_unpacked(page_token, "t")), _limit(page_size)
        async with self._store.transaction(user_id) as transaction:
            found = await store.threads(transaction, user_id, before, limit + 1)
        page = found[:limit]
        return page, _packed("t", page[-1].thread_id) if len(found) > limit else ""


async def _append(transaction: Transaction, frame: UserExecutionContext, draft: Draft) -> store.Message:
    # the lock gives concurrent messages one order without gaps
    thread = await store.thread(transaction, frame.user_id, frame.thread_id, lock=True)
    if thread is None:
        raise errors.NotFound("There is no such thread.")
    known = await store.message_by_request(transaction, frame.user_id, draft.request_id)
    if known is not None:
        if (known.thread_id, known.role, known.content) != (frame.thread_id, draft.role, draft.content):
            raise errors.AlreadyExists(field="request_id")
        return known
    message = store.Message(
        ids.MessageId.new(), frame.thread_id, thread.messages + 1, draft.role, draft.content, frame.run_id, datetime.now(UTC)
    )
    await store.insert_message(transaction, frame.user_id, draft.request_id, message)
    return message


def _limit(page_size: int) -> int:
    if not 0 <= page_size <= _LARGEST_PAGE:
        raise errors.InvalidPayload(f"page_size must be 1 to {_LARGEST_PAGE}, or 0 for {_PAGE}", field="page_size")
    return page_size or _PAGE


def _packed(kind: str, place: str) -> str:
    return base64.urlsafe_b64encode(f"{kind}:{place}".encode()).decode().rstrip("=")


def _unpacked(token: str, kind: str) -> str:
    if not token:
        return ""
    try:
        padded = (token + "=" * (-len(token) % 4)).encode("ascii")
        found, _, place = base64.b64decode(padded, altchars=b"-_", validate=True).decode("ascii").partition(":")
    except (binascii.Error, ValueError):
        raise _unknown_page() from None
    # what we gave out and nothing else: no second spelling of the same page
    if found != kind or not place or _packed(kind, place) != token:
        raise _unknown_page()
    return place


def _position(place: str) -> int:
    if not place:
        return 0
    if not place.isdecimal() or len(place) > 19 or int(place) > _LAST_POSITION:
        raise _unknown_page()
    return int(place)


def _thread_id(place: str) -> ids.ThreadId | None:
    try:
        return ids.ThreadId(place) if place else None
    except errors.InvalidPayload:
        raise _unknown_page() from None


def _unknown_page() -> errors.InvalidPayload:
    return errors.InvalidPayload("page_token must be the next_page_token of the page before", field="page_token")
