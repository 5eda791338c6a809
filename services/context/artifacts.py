"""Files of users: what one may be called and be, who may have how much, and how one is read."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from netra import errors, ids
from netra.auth.v1 import auth_pb2
from services.context import pages, slots

CHUNK = 1024 * 1024
PIECE = 64 * 1024
MAX_NAME = 255
# a slash makes a path of it; control characters and those that turn the direction of writing make it look like another one
_NOT_IN_NAMES = re.compile(r"[/\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_TEXT = re.compile(r"text/[a-z0-9][a-z0-9.+\-]{0,63}")
MEDIA_TYPES = frozenset(
    {
        "application/gzip", "application/json", "application/jsonl", "application/octet-stream", "application/pdf",
        "application/vnd.apache.parquet", "application/x-gzip", "application/x-ndjson", "application/zstd",
        "image/png", "image/svg+xml",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Actor:
    """Who reads or writes: a user by themselves, or a run of theirs through its execution context, for as long as that is open."""

    user_id: ids.UserId
    tier: str
    context_id: ids.ContextId | None = None


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file that is complete; it never changes. `user_id` made it."""

    artifact_id: ids.ArtifactId
    name: str
    media_type: str
    size: int
    sha256: str
    run_id: ids.RunId | None
    created_at: datetime
    thread_id: ids.ThreadId | None
    user_id: ids.UserId


@dataclass(frozen=True, slots=True)
class Draft:
    """A file that is about to come; 0 and empty mean not told. Raises `InvalidPayload` naming the field that is wrong."""

    request_id: ids.RequestId
    name: str
    media_type: str
    size: int
    sha256: str
    run_id: ids.RunId | None
    thread_id: ids.ThreadId | None = None

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= MAX_NAME or not self.name.strip() or self.name in (".", "..") or _NOT_IN_NAMES.search(self.name):
            message = f"name must have 1 to {MAX_NAME} characters, no slash and no control character, and not be . or .."
            raise errors.InvalidPayload(message, field="name")
        if self.media_type not in MEDIA_TYPES and not _TEXT.fullmatch(self.media_type):
            message = f"media_type must be text/* or one of {', '.join(sorted(MEDIA_TYPES))}"
            raise errors.InvalidPayload(message, field="media_type")
        if self.size < 0:
            raise errors.InvalidPayload("size must not be negative; 0 means not known", field="size")
        if self.sha256 and not _SHA256.fullmatch(self.sha256):
            raise errors.InvalidPayload("sha256 must be 64 hexadecimal digits in lower case", field="sha256")

    def same(self, other: Artifact, size: int, sha256: str) -> bool:
        """Whether that file is this one, now that its bytes are known."""
        mine = (self.name, self.media_type, size, sha256, self.thread_id)
        return mine == (other.name, other.media_type, other.size, other.sha256, other.thread_id)


def media_type(text: str) -> str:
    """A media type without its parameters; `application/octet-stream` for none."""
    return text.partition(";")[0].strip().lower() or "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Room:
    """How many files one user of a tier may keep, and how many bytes they may have together."""

    count: int
    bytes: int
    tier: str

    def refused(self, kind: str) -> errors.QuotaExceeded:
        """The error for a file too many (`artifacts`), or for bytes too many (`artifact_bytes`)."""
        limit = self.count if kind == "artifacts" else self.bytes
        most = f"{limit} artifacts" if kind == "artifacts" else f"{limit} bytes in all artifacts together"
        message = f"A user of the tier {self.tier} keeps at most {most}. Delete some that are no longer needed."
        return errors.QuotaExceeded(message, kind=kind, limit=limit, tier=self.tier)


@dataclass(frozen=True, slots=True)
class Limits:
    """How large one file may be, in bytes; how long nothing may come, in seconds; how much of all one user may keep, in any tier.

    What the policy says of the tier holds as well, where it says something.
    """

    file: int
    user: int
    count: int
    stall_s: float
    tiers: Callable[[str], auth_pb2.TierLimits]

    def room(self, tier: str) -> Room:
        """What a user of the tier may keep."""
        told = self.tiers(tier)
        count = min(told.artifacts, self.count) if told.HasField("artifacts") else self.count
        most = min(told.artifact_bytes, self.user) if told.HasField("artifact_bytes") else self.user
        return Room(count, most, tier)


@dataclass(frozen=True, slots=True)
class Usage:
    """What a user keeps, and may keep."""

    count: int
    bytes: int
    room: Room


class Kept(Protocol):
    """Where files are kept. What an actor does in a context raises `FailedPrecondition` once that is closed."""

    async def by_request(self, actor: Actor, request_id: ids.RequestId) -> Artifact | None:
        """The user's file that was made under this request id."""
        ...

    async def begin(self, actor: Actor, artifact_id: ids.ArtifactId, draft: Draft, wanted: int, room: Room) -> int:
        """Count a file that is about to come, and up to `wanted` bytes for it, as far as there is room; returns how many.

        Raises `QuotaExceeded` for a file too many, `NotFound` or `PermissionDenied` for a thread that the user may not write to.
        """
        ...

    async def reserve(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, wanted: int, limit: int) -> int:
        """Count up to `wanted` bytes for the file, as far as the user's limit goes; returns how many are counted now."""
        ...

    async def append(self, actor: Actor, artifact_id: ids.ArtifactId, position: int, chunks: Sequence[bytes]) -> None:
        """Keep the next chunks. Raises `FailedPrecondition` when the upload was given up meanwhile."""
        ...

    async def complete(self, actor: Actor, artifact_id: ids.ArtifactId, size: int, sha256: str) -> Artifact:
        """Show the file. Raises `Conflict` when the request id is taken, `FailedPrecondition` when the upload was given up.

        `NotFound` when its thread was erased meanwhile, or is not the user's to write to any more.
        """
        ...

    async def discard(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, state: str) -> bool:
        """Give up a file of the user's own that is in this state; whether there was one."""
        ...

    async def delete(self, user_id: ids.UserId, artifact_id: ids.ArtifactId) -> bool:
        """Give up a complete file that the user made, or that lies in a thread of theirs; False when they see no such file.

        Raises `PermissionDenied` for one that they only see.
        """
        ...

    async def by_id(self, actor: Actor, artifact_id: ids.ArtifactId) -> Artifact | None:
        """The file with this id, when the user may see it."""
        ...

    async def chunk(self, actor: Actor, artifact_id: ids.ArtifactId, position: int) -> bytes | None:
        """One chunk of a complete file that the user may see."""
        ...

    async def before(
        self, user_id: ids.UserId, thread_id: ids.ThreadId | None, artifact_id: ids.ArtifactId | None, limit: int
    ) -> list[Artifact]:
        """The user's files, or those of a thread, made before another one, newest first. Raises `NotFound` for the thread."""
        ...

    async def usage(self, user_id: ids.UserId) -> tuple[int, int]:
        """How many files the user keeps, and how many bytes these have."""
        ...


class Artifacts:
    """The files of all users; each method works for one. `left_over` is told when there is something to remove."""

    def __init__(self, kept: Kept, limits: Limits, moving: slots.Slots, left_over: Callable[[], None]) -> None:
        self._kept, self._limits, self._moving, self._left_over = kept, limits, moving, left_over

    async def get(self, actor: Actor, artifact_id: ids.ArtifactId) -> Artifact:
        """A file of the user, or of a thread of theirs or granted to them. Raises `NotFound`."""
        found = await self._kept.by_id(actor, artifact_id)
        if found is None:
            raise _missing()
        return found

    async def read(self, actor: Actor, artifact: Artifact, offset: int) -> AsyncGenerator[bytes]:
        """The bytes of a file from an offset on, in pieces of at most 64 KiB. Raises `InvalidPayload`, `NotFound`."""
        if not 0 <= offset <= artifact.size:
            raise errors.InvalidPayload(f"offset must be 0 to {artifact.size}, the size of the artifact", field="offset")
        async with self._moving.one(actor.user_id):
            for position in range(offset // CHUNK, -(-artifact.size // CHUNK)):
                data = await self._kept.chunk(actor, artifact.artifact_id, position)
                if data is None:
                    raise errors.NotFound("The artifact was deleted meanwhile.")
                for at in range(max(offset - position * CHUNK, 0), len(data), PIECE):
                    yield data[at : at + PIECE]

    async def artifacts(self, actor: Actor, thread_id: ids.ThreadId | None, page_size: int, page_token: str) -> tuple[list[Artifact], str]:
        """One page of the user's files, or of a thread's, newest first, and the token of the next. Raises `InvalidPayload`, `NotFound`."""
        before, limit = _artifact_id(pages.unpacked(page_token, "a")), pages.limit(page_size)
        found = await self._kept.before(actor.user_id, thread_id, before, limit + 1)
        page = found[:limit]
        return page, pages.packed("a", page[-1].artifact_id) if len(found) > limit else ""

    async def usage(self, actor: Actor) -> Usage:
        """What the user keeps, and may keep."""
        count, size = await self._kept.usage(actor.user_id)
        return Usage(count, size, self._limits.room(actor.tier))

    async def delete(self, user_id: ids.UserId, artifact_id: ids.ArtifactId) -> None:
        """Remove a file that the user made, or that lies in a thread of theirs, for good. Raises `NotFound`, `PermissionDenied`."""
        if not await self._kept.delete(user_id, artifact_id):
            raise _missing()
        self._left_over()


def _missing() -> errors.NotFound:
    return errors.NotFound("There is no such artifact.")


def _artifact_id(place: str) -> ids.ArtifactId | None:
    try:
        return ids.ArtifactId(place) if place else None
    except errors.InvalidPayload:
        raise pages.unknown() from None
