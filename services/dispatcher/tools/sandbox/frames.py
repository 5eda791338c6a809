"""What goes between the dispatcher and a worker process: frames of a length, a kind and JSON; pure."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_HEAD = struct.Struct("<Ic")
HEAD_BYTES = _HEAD.size
# the largest value, and what comes around it
MAX_BYTES = 64 * 1024 * 1024
_MAX_FRAME = MAX_BYTES + 4096
_CHUNK_BYTES = 64 * 1024
# from the dispatcher: how to be, what to call; from the worker: ready, a result, what went wrong
SETUP, CALL, READY, RESULT, PROBLEM = b"s", b"c", b"r", b"v", b"!"
# after an answer that is one of these the worker is not to be used any more
LAST = {RESULT: b"V", PROBLEM: b"?"}
_FIRST = {last: kind for kind, last in LAST.items()}


class Broken(Exception):
    """These are no frames."""


def frame(kind: bytes, text: bytes = b"") -> bytes:
    """One frame."""
    return _HEAD.pack(len(text), kind) + text


def head(text: bytes | bytearray) -> tuple[int, bytes]:
    """Length and kind. Raises `Broken` for more than anybody sends."""
    size, kind = _HEAD.unpack(text)
    if size > _MAX_FRAME:
        raise Broken(f"a frame of {size} bytes")
    return size, kind


def ends(kind: bytes) -> tuple[bytes, bool]:
    """The kind of a frame, and whether it is a worker's last."""
    return _FIRST.get(kind, kind), kind in _FIRST


class Incoming:
    """Frames out of bytes as they come: what is large is written where it stays, a chunk at a time, and never copied."""

    def __init__(self) -> None:
        self._chunk = memoryview(bytearray(_CHUNK_BYTES))
        self._bytes = bytearray()
        self._kind, self._large, self._have = b"", bytearray(), 0

    def space(self) -> memoryview:
        """Where the next bytes are to be written."""
        if self._large:
            return memoryview(self._large)[self._have : self._have + _CHUNK_BYTES]
        return self._chunk

    def filled(self, size: int) -> Iterator[tuple[bytes, bytearray]]:
        """Kind and text of the frames that are whole, now that so many bytes were written. Raises `Broken`."""
        if self._large:
            yield from self._more(size)
            return
        self._bytes += self._chunk[:size]
        while len(self._bytes) >= HEAD_BYTES:
            length, kind = head(self._bytes[:HEAD_BYTES])
            end = HEAD_BYTES + length
            if length > _CHUNK_BYTES:
                self._begin(kind, length)
                return
            if len(self._bytes) < end:
                return
            text = self._bytes[HEAD_BYTES:end]
            del self._bytes[:end]
            yield kind, text

    def _begin(self, kind: bytes, length: int) -> None:
        begun = self._bytes[HEAD_BYTES:]
        self._kind, self._large, self._have = kind, bytearray(length), len(begun)
        self._large[: self._have] = begun
        self._bytes.clear()

    def _more(self, size: int) -> Iterator[tuple[bytes, bytearray]]:
        self._have += size
        if self._have == len(self._large):
            whole, self._large = self._large, bytearray()
            yield self._kind, whole
