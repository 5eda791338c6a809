"""A handshake with lines that cannot be read is answered and ended, never left open."""

from __future__ import annotations

from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from gateway import wire

_START = "GET /ws HTTP/1.1\r\nHost: netra\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
_KEY = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"


class _Transport:
    def __init__(self) -> None:
        self.written = b""
        self.closed = False
        self.protocol: Any = None

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str) -> Any:
        return None

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def pause_reading(self) -> None:
        """Nothing more comes."""

    def resume_reading(self) -> None:
        """Nothing more comes."""


async def _app(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("nobody is let in")


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (f"Authorization: Bearer {'x' * 9000}\r\n", 401),
        (f"Sec-WebSocket-Protocol: netra.v1, bearer.{'x' * 9000}\r\n", 401),
        (f"X-Long: {'x' * 9000}\r\n", 431),
        ("".join(f"X-{index}: 1\r\n" for index in range(200)), 431),
    ],
)
async def test_a_handshake_that_cannot_be_read_is_answered_and_ended(lines: str, status: int) -> None:
    assert _answer(f"{_START}{_KEY}{lines}\r\n").startswith(f"HTTP/1.1 {status} ".encode())


@pytest.mark.parametrize(
    ("start", "answer"),
    [
        (_START.replace(": 13", ": 12"), b"HTTP/1.1 426 "),
        (_START.replace("Sec-WebSocket-Version: 13\r\n", ""), b"HTTP/1.1 426 "),
        (_START + "Sec-WebSocket-Version: 13\r\n", b"HTTP/1.1 426 "),
        (_START.replace("HTTP/1.1", "HTTP/1.0"), b"HTTP/1.1 400 "),
        (_START.replace("/ws", "/ws/"), b"HTTP/1.1 404 "),
        (_START.replace("/ws", "/healthz?x=/ws"), b"HTTP/1.1 404 "),
        (_START.replace("/ws", "/%77s"), b"HTTP/1.1 404 "),
    ],
)
async def test_a_handshake_of_another_kind_is_told_what_is_spoken_here(start: str, answer: bytes) -> None:
    written = _answer(f"{start}{_KEY}\r\n")
    assert written.startswith(answer)
    assert (b"\r\nsec-websocket-version: 13\r\n" in written.lower()) == (b" 426 " in answer)


def _answer(handshake: str) -> bytes:
    """What is written before the connection is ended."""
    config = uvicorn.Config(_app, ws=wire.WireProtocol, log_config=None, lifespan="off")
    config.load()
    protocol = wire.HttpProtocol(config, ServerState(), {})
    transport = _Transport()
    protocol.connection_made(transport)  # type: ignore[arg-type]
    protocol.data_received(handshake.encode())
    assert transport.closed
    return transport.written
