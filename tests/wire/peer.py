"""A client of bytes: it says what it is told to, right or wrong, and tells what came back."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import secrets
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

TEXT, BINARY, CLOSE, PING, PONG, CONTINUATION = 0x1, 0x2, 0x8, 0x9, 0xA, 0x0
_MAGIC = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_END = "the-end"
_PATIENCE_S = 20.0


def frame(payload: bytes = b"", opcode: int = TEXT, *, fin: bool = True, rsv: int = 0, masked: bool = True, length: bytes = b"") -> bytes:
    """A frame of a client; `length` replaces the bytes of its length, without the bit for the mask."""
    first = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
    said = bytearray(length or _length(len(payload)))
    if not masked:
        return first + bytes(said) + payload
    said[0] |= 0x80
    mask = secrets.token_bytes(4)
    return first + bytes(said) + mask + bytes(byte ^ mask[place % 4] for place, byte in enumerate(payload))


def _length(size: int) -> bytes:
    if size < 126:
        return bytes([size])
    return b"\x7e" + struct.pack("!H", size) if size < 65536 else b"\x7f" + struct.pack("!Q", size)


def close(code: int, reason: bytes = b"") -> bytes:
    """A close frame."""
    return frame(struct.pack("!H", code) + reason, CLOSE)


def ask(frame_id: str = "a", **more: object) -> bytes:
    """A message that is answered by one with the same id."""
    return json.dumps({"type": "PING", "id": frame_id, **more}).encode()


def request(port: int, token: str, **changes: str | None) -> bytes:
    """A handshake; a change replaces a header, None leaves it out."""
    headers: dict[str, str | None] = {
        "Host": f"127.0.0.1:{port}",
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
        "Sec-WebSocket-Protocol": f"netra.v1, bearer.{token}",
    }
    line = changes.pop("line", None) or "GET /ws HTTP/1.1"
    headers.update({name.replace("_", "-"): value for name, value in changes.items()})
    return "\r\n".join([line, *(f"{name}: {value}" for name, value in headers.items() if value is not None), "", ""]).encode()


@dataclass(slots=True)
class Peer:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    seen: list[str] = field(default_factory=list)

    async def shake(self, sent: bytes) -> dict[str, str]:
        """Send a handshake; the answer's headers, and its status as `status`."""
        self.writer.write(sent)
        async with asyncio.timeout(_PATIENCE_S):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        return {
            "status": head[0].split()[1],
            **{line.partition(": ")[0].lower(): line.partition(": ")[2] for line in head[1:] if line},
        }

    async def say(self, *parts: bytes) -> None:
        """Send bytes, each part in a segment of its own; what cannot be sent any more is dropped."""
        with contextlib.suppress(ConnectionError):
            for part in parts:
                self.writer.write(part)
                await self.writer.drain()

    async def outcome(self, *, ends: bool) -> list[str]:
        """What came back: all of it when the connection has to end, else what came before the answer to a last question."""
        if not ends:
            await self.say(frame(ask(_END)))
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            async with asyncio.timeout(_PATIENCE_S):
                while not self.seen or self.seen[-1] != "end":
                    self._note(*await self._frame())
        return [told for told in self.seen if told != "end"] + ([] if "end" in self.seen or self._closed() else ["gone"])

    def _closed(self) -> bool:
        return bool(self.seen) and self.seen[-1].startswith("close")

    async def _frame(self) -> tuple[int, bytes]:
        first, second = await self.reader.readexactly(2)
        size = second & 0x7F
        if size > 125:
            size = int.from_bytes(await self.reader.readexactly(2 if size == 126 else 8), "big")
        if second & 0x80 or first & 0x70 or not first & 0x80:
            self.seen.append("a frame no server may send")
        return first & 0x0F, await self.reader.readexactly(size)

    def _note(self, opcode: int, payload: bytes) -> None:
        if opcode == CLOSE:
            self.seen.append(f"close {int.from_bytes(payload[:2], 'big')}" if payload else "close")
        elif opcode == PONG:
            self.seen.append(f"pong {shown(payload)}")
        elif opcode == TEXT:
            self._noted(json.loads(payload))
        elif opcode != PING:
            self.seen.append(f"opcode {opcode}")

    def _noted(self, said: dict[str, object]) -> None:
        if said.get("id") == _END:
            self.seen.append("end")
        elif said["type"] == "error":
            self.seen.append(f"error {said['code']}")
        elif said["type"] == "pong":
            self.seen.append(f"answer {said['id']}")


def shown(payload: bytes) -> str:
    """A payload, or its digest when it is long."""
    return hashlib.sha256(payload).hexdigest()[:8] if len(payload) > 16 else payload.decode("latin-1")


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Peer]:
    """A connection without a handshake."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()


@contextlib.asynccontextmanager
async def opened(port: int, token: str) -> AsyncIterator[Peer]:
    """A socket after its handshake."""
    async with connected(port) as peer:
        answer = await peer.shake(request(port, token))
        assert answer["status"] == "101", answer
        yield peer


def accepts(key: str) -> str:
    """What a server answers to a key."""
    return base64.b64encode(hashlib.sha1(key.encode() + _MAGIC, usedforsecurity=False).digest()).decode()
