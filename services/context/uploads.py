"""One file on its way in: counted, hashed, kept in chunks, shown when it is whole."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable

from chassis import lifecycle, log
from chassis.postgres import Conflict
from netra import errors, ids
from services.context import slots
from services.context.artifacts import CHUNK, Artifact, Draft, Kept, Limits

_log = log.get(__name__)
# what one upload holds in memory before it is written: one transaction for two chunks
_BATCH = 2 * CHUNK
# without a size told, room is counted in steps
_STEP = 64 * CHUNK


class Uploads:
    """The uploads of all users. `left_over` is told when there is something to remove."""

    def __init__(self, kept: Kept, limits: Limits, moving: slots.Slots, left_over: Callable[[], None], tasks: lifecycle.Tasks) -> None:
        self._kept, self._moving, self._left_over, self._tasks = kept, moving, left_over, tasks
        self.limits = limits

    @contextlib.asynccontextmanager
    async def open(self, user_id: ids.UserId, draft: Draft) -> AsyncIterator[Upload]:
        """An upload whose header is good; what is not `complete` at the end leaves nothing. Raises `TooLarge`, `RateLimited`."""
        if draft.size > self.limits.file:
            raise _too_large(self.limits.file)
        async with self._moving.one(user_id):
            known = await self._kept.by_request(user_id, draft.request_id)
            upload = Upload(self._kept, self.limits, user_id, draft, known)
            try:
                await upload.begin()
                yield upload
            finally:
                if not upload.shown and known is None:
                    # the cancellation of a call may come only now, and must not stop it
                    await asyncio.shield(self._tasks.spawn(self._give_up(user_id, upload.artifact_id), "give-up"))

    async def _give_up(self, user_id: ids.UserId, artifact_id: ids.ArtifactId) -> None:
        try:
            await self._kept.discard(user_id, artifact_id, "uploading")
            self._left_over()
        except errors.NetraError as error:
            # nobody sees it, and it is removed when it was not touched for an hour
            _log.info("an upload that ended early is still there", code=error.code)


class Upload:
    """The bytes of one file. Under a request id that was used before they are only compared."""

    def __init__(self, kept: Kept, limits: Limits, user_id: ids.UserId, draft: Draft, known: Artifact | None) -> None:
        self._kept, self._limits, self._user_id, self._draft, self._known = kept, limits, user_id, draft, known
        self.artifact_id = ids.ArtifactId.new()
        self.shown = False
        self._digest = hashlib.sha256()
        self._size = self._reserved = self._position = 0
        self._waiting = bytearray()

    async def begin(self) -> None:
        """Make room. Raises `TooLarge`."""
        if self._known is None:
            await self._kept.begin(self._user_id, self.artifact_id, self._draft)
            await self._reserve(self._draft.size, self._draft.size or _STEP)

    async def take(self, data: bytes) -> None:
        """The next bytes. Raises `InvalidPayload`, `TooLarge`."""
        self._size += len(data)
        if self._draft.size and self._size > self._draft.size:
            raise _wrong_size(self._draft.size)
        if self._size > self._limits.file:
            raise _too_large(self._limits.file)
        self._digest.update(data)
        if self._known is not None:
            return
        if self._size > self._reserved:
            await self._reserve(self._size, self._reserved + _STEP)
        self._waiting += data
        if len(self._waiting) >= _BATCH:
            await self._write(len(self._waiting) // CHUNK * CHUNK)

    async def complete(self) -> Artifact:
        """The file, or the one there is under the same request id. Raises `InvalidPayload`, `AlreadyExists`."""
        sha256 = self._digest.hexdigest()
        if self._draft.size and self._size != self._draft.size:
            raise _wrong_size(self._draft.size)
        if self._draft.sha256 and sha256 != self._draft.sha256:
            raise errors.InvalidPayload(f"The bytes that came have the SHA-256 {sha256}, not the one that was told.", field="sha256")
        if self._known is not None:
            return self._same(self._known, sha256)
        await self._write(len(self._waiting))
        try:
            found = await self._kept.complete(self._user_id, self.artifact_id, self._size, sha256)
        except Conflict:
            # the same request came in twice at once, and the other one was first
            first = await self._kept.by_request(self._user_id, self._draft.request_id)
            return self._same(first, sha256)
        self.shown = True
        return found

    def _same(self, known: Artifact | None, sha256: str) -> Artifact:
        if known is None or not self._draft.same(known, self._size, sha256):
            raise errors.AlreadyExists(field="request_id")
        return known

    async def _reserve(self, needed: int, wanted: int) -> None:
        limit = self._limits.user
        self._reserved = await self._kept.reserve(self._user_id, self.artifact_id, min(wanted, self._limits.file), limit)
        if self._reserved < needed:
            message = f"All artifacts of one user have at most {limit} bytes together. Delete some that are no longer needed."
            raise errors.TooLarge(message, limit=limit)

    async def _write(self, size: int) -> None:
        chunks = [bytes(self._waiting[at : min(at + CHUNK, size)]) for at in range(0, size, CHUNK)]
        if chunks:
            del self._waiting[:size]
            await self._kept.append(self._user_id, self.artifact_id, self._position, chunks)
            self._position += len(chunks)


def _too_large(limit: int) -> errors.TooLarge:
    return errors.TooLarge(f"An artifact has at most {limit} bytes.", limit=limit)


def _wrong_size(size: int) -> errors.InvalidPayload:
    return errors.InvalidPayload(f"size says {size} bytes, and another number of bytes came", field="size")
