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
from services.context.artifacts import CHUNK, Actor, Artifact, Draft, Kept, Limits

_log = log.get(__name__)
# what one upload holds in memory before it is written: one transaction for two chunks
_BATCH = 2 * CHUNK
# Without a size told, room is counted in steps: small ones, as what is counted and never comes keeps others of the user out.
_STEP = 8 * CHUNK


class Uploads:
    """The uploads of all users. `left_over` is told when there is something to remove."""

    def __init__(self, kept: Kept, limits: Limits, moving: slots.Slots, left_over: Callable[[], None], tasks: lifecycle.Tasks) -> None:
        self._kept, self._moving, self._left_over, self._tasks = kept, moving, left_over, tasks
        self.limits = limits

    @contextlib.asynccontextmanager
    async def open(self, actor: Actor, draft: Draft) -> AsyncIterator[Upload]:
        """An upload whose header is good; what is not `complete` at the end leaves nothing.

        Raises `TooLarge`, `RateLimited`, `QuotaExceeded`; `NotFound` or `PermissionDenied` for the thread; `FailedPrecondition`.
        """
        if draft.size > self.limits.file:
            raise _too_large(self.limits.file)
        async with self._moving.one(actor.user_id):
            known = await self._kept.by_request(actor, draft.request_id)
            upload = Upload(self._kept, self.limits, actor, draft, known)
            try:
                await upload.begin()
                yield upload
            finally:
                if not upload.shown and known is None:
                    # the cancellation of a call may come only now, and must not stop it
                    await asyncio.shield(self._tasks.spawn(self._give_up(actor.user_id, upload.artifact_id), "give-up"))

    async def _give_up(self, user_id: ids.UserId, artifact_id: ids.ArtifactId) -> None:
        try:
            # what was refused at once left nothing
            if await self._kept.discard(user_id, artifact_id, "uploading"):
                self._left_over()
        except errors.NetraError as error:
            # nobody sees it, and it is removed when it was not touched for an hour
            _log.info("an upload that ended early is still there", code=error.code)


class Upload:
    """The bytes of one file. Under a request id that was used before they are only compared."""

    def __init__(self, kept: Kept, limits: Limits, actor: Actor, draft: Draft, known: Artifact | None) -> None:
        self._kept, self._limits, self._actor, self._draft, self._known = kept, limits, actor, draft, known
        self._room = limits.room(actor.tier)
        self.artifact_id = ids.ArtifactId.new()
        self.shown = False
        self._digest = hashlib.sha256()
        self._size = self._reserved = self._position = 0
        self._waiting = bytearray()

    async def begin(self) -> None:
        """Make room. Raises `QuotaExceeded`, and what is wrong with the thread or the context."""
        if self._known is None:
            wanted = min(self._draft.size or _STEP, self._limits.file)
            self._reserved = await self._kept.begin(self._actor, self.artifact_id, self._draft, wanted, self._room)
            self._require(self._draft.size)

    async def take(self, data: bytes) -> None:
        """The next bytes. Raises `InvalidPayload`, `TooLarge`, `QuotaExceeded`."""
        self._size += len(data)
        if self._draft.size and self._size > self._draft.size:
            raise _wrong_size(self._draft.size)
        if self._size > self._limits.file:
            raise _too_large(self._limits.file)
        self._digest.update(data)
        if self._known is not None:
            return
        if self._size > self._reserved:
            wanted = min(self._reserved + _STEP, self._limits.file)
            self._reserved = await self._kept.reserve(self._actor.user_id, self.artifact_id, wanted, self._room.bytes)
            self._require(self._size)
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
            found = await self._kept.complete(self._actor, self.artifact_id, self._size, sha256)
        except Conflict:
            # the same request came in twice at once, and the other one was first
            first = await self._kept.by_request(self._actor, self._draft.request_id)
            return self._same(first, sha256)
        self.shown = True
        return found

    def _same(self, known: Artifact | None, sha256: str) -> Artifact:
        if known is None or not self._draft.same(known, self._size, sha256):
            raise errors.AlreadyExists(field="request_id")
        return known

    def _require(self, needed: int) -> None:
        if self._reserved < needed:
            raise self._room.refused("artifact_bytes")

    async def _write(self, size: int) -> None:
        chunks = [bytes(self._waiting[at : min(at + CHUNK, size)]) for at in range(0, size, CHUNK)]
        if chunks:
            del self._waiting[:size]
            await self._kept.append(self._actor, self.artifact_id, self._position, chunks)
            self._position += len(chunks)


def _too_large(limit: int) -> errors.TooLarge:
    return errors.TooLarge(f"An artifact has at most {limit} bytes.", limit=limit)


def _wrong_size(size: int) -> errors.InvalidPayload:
    return errors.InvalidPayload(f"size says {size} bytes, and another number of bytes came", field="size")
