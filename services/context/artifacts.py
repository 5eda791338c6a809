"""Files of users: what one may be called and be, who may have how much, and how one is read."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from netra import errors, ids
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
class Artifact:
    """A file that is complete; it never changes."""

    artifact_id: ids.ArtifactId
    name: str
    media_type: str
    size: int
    sha256: str
    run_id: ids.RunId | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Draft:
    """A file that is about to come; 0 and empty mean not told. Raises `InvalidPayload` naming the field that is wrong."""

    request_id: ids.RequestId
    name: str
    media_type: str
    size: int
    sha256: str
    run_id: ids.RunId | None

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
        return (self.name, self.media_type, size, sha256) == (other.name, other.media_type, other.size, other.sha256)


def media_type(text: str) -> str:
    """A media type without its parameters; `application/octet-stream` for none."""
    return text.partition(";")[0].strip().lower() or "application/octet-stream"


@dataclass(frozen=True, slots=True)
class Limits:
    """How large one file, and all files of one user, may be, in bytes; how long nothing may come, in seconds."""

    file: int
    user: int
    stall_s: float


class Kept(Protocol):
    """Where files are kept."""

    async def by_request(self, user_id: ids.UserId, request_id: ids.RequestId) -> Artifact | None:
        """The user's file that was made under this request id."""
        ...

    async def begin(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, draft: Draft) -> None:
        """Make room for a file that is about to come."""
        ...

    async def reserve(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, wanted: int, limit: int) -> int:
        """Count up to `wanted` bytes for the file, as far as the user's limit goes; returns how many are counted now."""
        ...

    async def append(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, position: int, chunks: Sequence[bytes]) -> None:
        """Keep the next chunks. Raises `FailedPrecondition` when the upload was given up meanwhile."""
        ...

    async def complete(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, size: int, sha256: str) -> Artifact:
        """Show the file. Raises `Conflict` when the request id is taken, `FailedPrecondition` when the upload was given up."""
        ...

    async def discard(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, state: str) -> bool:
        """Give up a file that is in this state; whether there was one."""
        ...

    async def by_id(self, user_id: ids.UserId, artifact_id: ids.ArtifactId) -> Artifact | None:
        """The user's file with this id."""
        ...

    async def chunk(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, position: int) -> bytes | None:
        """One chunk of a complete file."""
        ...

    async def before(self, user_id: ids.UserId, artifact_id: ids.ArtifactId | None, limit: int) -> list[Artifact]:
        """The user's files made before another one, newest first."""
        ...


class Artifacts:
    """The files of all users; each method works for one. `left_over` is told when there is something to remove."""

    def __init__(self, kept: Kept, moving: slots.Slots, left_over: Callable[[], None]) -> None:
        self._kept, self._moving, self._left_over = kept, moving, left_over

    async def get(self, user_id: ids.UserId, artifact_id: ids.ArtifactId) -> Artifact:
        """A file of the user. Raises `NotFound`."""
        found = await self._kept.by_id(user_id, artifact_id)
        if found is None:
            raise errors.NotFound("There is no such artifact.")
        return found

    async def read(self, user_id: ids.UserId, artifact: Artifact, offset: int) -> AsyncGenerator[bytes]:
        """The bytes of a file from an offset on, in pieces of at most 64 KiB. Raises `InvalidPayload`, `NotFound`."""
        if not 0 <= offset <= artifact.size:
            raise errors.InvalidPayload(f"offset must be 0 to {artifact.size}, the size of the artifact", field="offset")
        async with self._moving.one(user_id):
            for position in range(offset // CHUNK, -(-artifact.size // CHUNK)):
                data = await self._kept.chunk(user_id, artifact.artifact_id, position)
                if data is None:
                    raise errors.NotFound("The artifact was deleted meanwhile.")
                for at in range(max(offset - position * CHUNK, 0), len(data), PIECE):
                    yield data[at : at + PIECE]

    async def artifacts(self, user_id: ids.UserId, page_size: int, page_token: str) -> tuple[list[Artifact], str]:
        """One page, newest first, and the token of the next. Raises `InvalidPayload`."""
        before, limit = _artifact_id(pages.unpacked(page_token, "a")), pages.limit(page_size)
        found = await self._kept.before(user_id, before, limit + 1)
        page = found[:limit]
        return page, pages.packed("a", page[-1].artifact_id) if len(found) > limit else ""

    async def delete(self, user_id: ids.UserId, artifact_id: ids.ArtifactId) -> None:
        """Remove a file for good. Raises `NotFound`."""
        if not await self._kept.discard(user_id, artifact_id, "complete"):
            raise errors.NotFound("There is no such artifact.")
        self._left_over()


def _artifact_id(place: str) -> ids.ArtifactId | None:
    try:
        return ids.ArtifactId(place) if place else None
    except errors.InvalidPayload:
        raise pages.unknown() from None
