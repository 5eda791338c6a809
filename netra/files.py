"""Files between this machine and a gateway: read and written in pieces, checked by their SHA-256."""

from __future__ import annotations

import asyncio
import hashlib
import mimetypes
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, BinaryIO, Self
from urllib.parse import unquote

import httpx

from netra import errors

Progress = Callable[[int, int], None]
TIMEOUT = httpx.Timeout(70.0, connect=5.0)
_PIECE = 256 * 1024
# what the table of the system does not know, or calls otherwise
_MEDIA_TYPES = {
    ".csv": "text/csv", ".gz": "application/gzip", ".json": "application/json", ".jsonl": "application/x-ndjson",
    ".log": "text/plain", ".md": "text/markdown", ".ndjson": "application/x-ndjson", ".parquet": "application/vnd.apache.parquet",
    ".pdf": "application/pdf", ".png": "image/png", ".svg": "image/svg+xml", ".zst": "application/zstd",
}  # fmt: skip


def media_type(name: str) -> str:
    """What a file is, by its name."""
    known = _MEDIA_TYPES.get(Path(name).suffix.lower())
    guessed = mimetypes.guess_type(name)[0] or ""
    return known or (guessed if guessed.startswith("text/") else "application/octet-stream")


class Outgoing:
    """A file that is sent. Raises `InvalidPayload` naming it when it cannot be read."""

    def __init__(self, path: Path, progress: Progress | None) -> None:
        self._path, self._progress = path, progress
        self._digest = hashlib.sha256()
        try:
            self._file = path.open("rb")
        except OSError as error:
            raise _unusable(path, "read", error) from None
        self.size = os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    async def pieces(self) -> AsyncIterator[bytes]:
        """All bytes. Raises `InvalidPayload` when there are more or fewer than at first."""
        sent = 0
        while piece := await asyncio.to_thread(self._read):
            sent += len(piece)
            if sent > self.size:
                break
            yield piece
            if self._progress is not None:
                self._progress(sent, self.size)
        if sent != self.size:
            raise errors.InvalidPayload(f"{self._path} changed while it was sent. Send it again when it is at rest.", field="file")

    def _read(self) -> bytes:
        piece = self._file.read(_PIECE)
        self._digest.update(piece)
        return piece

    @property
    def sha256(self) -> str:
        """Of what was read so far."""
        return self._digest.hexdigest()


class Incoming:
    """A file that is received next to its place, and put there when it is whole. Raises `InvalidPayload` when it cannot be written."""

    def __init__(self, to: Path, progress: Progress | None) -> None:
        self._to, self._progress = to, progress
        self._digest = hashlib.sha256()
        self.size = 0
        try:
            descriptor, name = tempfile.mkstemp(prefix=f".{to.name[:100]}.", suffix=".part", dir=to.parent)
        except OSError as error:
            raise _unusable(to, "written", error) from None
        self._part = Path(name)
        self._file: BinaryIO = os.fdopen(descriptor, "wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._part.unlink(missing_ok=True)

    async def take(self, response: httpx.Response) -> None:
        """The bytes of a response, behind those that there are."""
        total = self.size + int(response.headers.get("content-length", 0))
        async for piece in response.aiter_raw():
            await asyncio.to_thread(self._write, piece)
            if self._progress is not None:
                self._progress(self.size, total)

    def _write(self, piece: bytes) -> None:
        try:
            self._file.write(piece)
        except OSError as error:
            raise _unusable(self._to, "written", error) from None
        self._digest.update(piece)
        self.size += len(piece)

    def finish(self, sha256: str) -> None:
        """Put the file in its place. Raises `Unavailable` when what came is not what was promised."""
        if self._digest.hexdigest() != sha256:
            raise errors.Unavailable("What arrived is not what was sent: its SHA-256 is another one. Try again.")
        try:
            self._file.close()
            self._part.replace(self._to)
        except OSError as error:
            raise _unusable(self._to, "written", error) from None


def described(artifact_id: str, headers: httpx.Headers, size: int) -> dict[str, Any]:
    """What the headers of a download say about it."""
    return {
        "artifact_id": artifact_id,
        "name": unquote(headers.get("content-disposition", "").partition("filename*=UTF-8''")[2]),
        "bytes": size,
        "sha256": headers.get("etag", "").strip('"'),
        "media_type": headers.get("content-type", ""),
    }


def _unusable(path: Path, verb: str, error: OSError) -> errors.InvalidPayload:
    return errors.InvalidPayload(f"{path} cannot be {verb}: {error.strerror}.", field="file")
