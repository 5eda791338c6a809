"""The heartbeat is about the peer, not about how fast its frames are taken here."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.server import ServerProtocol

from gateway import close_codes, envelope, wire

_PONG_S = 0.1


class _Transport:
    def __init__(self) -> None:
        self.aborted = False
        self.written: list[bytes] = []

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def pause_reading(self) -> None:
        """Nothing comes anyway."""

    def resume_reading(self) -> None:
        """Nothing comes anyway."""

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """The peer does not see it."""

    def abort(self) -> None:
        self.aborted = True


async def _app(scope: Any, receive: Any, send: Any) -> None:
    """Never called."""


def _protocol() -> wire.WireProtocol:
    config = uvicorn.Config(_app, log_config=None, ws_ping_interval=60.0, ws_ping_timeout=_PONG_S)
    protocol = wire.WireProtocol(config, ServerState(), {})
    protocol.transport = _Transport()  # type: ignore[assignment]
    protocol.conn.state = State.OPEN
    return protocol


def _message(protocol: wire.WireProtocol) -> None:
    protocol.curr_msg_data_type, protocol.frames = "text", [b"{}"]
    protocol.send_receive_event_to_app()


async def test_no_pong_closes() -> None:
    protocol = _protocol()
    protocol.send_keepalive_ping()
    async with asyncio.timeout(2):
        assert (await protocol.receive())["code"] == close_codes.NO_PONG.code


async def test_the_time_in_which_nothing_is_read_does_not_count() -> None:
    protocol = _protocol()
    protocol.send_keepalive_ping()
    _message(protocol)
    await asyncio.sleep(_PONG_S * 4)
    assert not protocol.close_sent
    # read again: now the pong is due
    assert (await protocol.receive())["type"] == "websocket.receive"
    assert not protocol.close_sent
    async with asyncio.timeout(2):
        assert (await protocol.receive())["code"] == close_codes.NO_PONG.code


async def test_frames_do_not_stand_for_a_pong() -> None:
    protocol = _protocol()
    protocol.send_keepalive_ping()
    async with asyncio.timeout(2):
        while not protocol.close_sent:
            _message(protocol)
            await protocol.receive()
            await asyncio.sleep(_PONG_S / 10)


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536, 300_000])
def test_a_frame_that_is_ready_is_what_the_library_makes(size: int) -> None:
    payload = b"x" * size
    theirs = ServerProtocol()
    theirs.state = State.OPEN
    theirs.send_text(payload)
    assert envelope.text(payload) == b"".join(theirs.data_to_send())


async def test_nothing_is_put_after_the_close() -> None:
    protocol = _protocol()
    frame = envelope.text(b"{}")
    assert protocol.put(frame)
    protocol.connections.add(protocol)
    protocol.end(close_codes.DRAINING)
    written = list(protocol.transport.written)  # type: ignore[attr-defined]
    assert written[0] == frame
    assert not protocol.put(frame)
    assert protocol.transport.written == written  # type: ignore[attr-defined]
    protocol.connection_lost(None)


async def test_nothing_is_put_behind_the_answer_to_a_close() -> None:
    protocol = _protocol()
    protocol.conn.send_close(1000)
    assert not protocol.put(envelope.text(b"{}"))


async def test_room_and_the_end_are_told() -> None:
    protocol = _protocol()
    protocol.connections.add(protocol)
    told: list[bool] = []
    protocol.moved(lambda: told.append(protocol.blocked))
    protocol.pause_writing()
    assert protocol.blocked
    protocol.resume_writing()
    assert told == [False]
    protocol.connection_lost(None)
    protocol.resume_writing()
    assert told == [False, False]


async def test_parts_that_come_before_the_handshake_is_answered_end_it() -> None:
    protocol = _protocol()
    protocol.conn.state = State.CONNECTING
    for _ in range(100):
        protocol.handle_cont(Frame(Opcode.CONT, b"", fin=False))
        if protocol.transport.aborted:  # type: ignore[attr-defined]
            break
    assert protocol.transport.aborted  # type: ignore[attr-defined]
    assert (await protocol.receive())["code"] == close_codes.TOO_MANY_PARTS.code


async def test_what_comes_after_the_end_is_neither_kept_nor_answered() -> None:
    protocol = _protocol()
    protocol.end(close_codes.ABUSE)
    transport: Any = protocol.transport
    written: list[bytes] = []
    transport.write = written.append
    for _ in range(100):
        protocol.handle_cont(Frame(Opcode.CONT, b"x", fin=False))
        protocol.conn.send_frame(Frame(Opcode.PONG, b"x"))
        protocol.handle_ping()
    assert (protocol.frames, written, protocol.conn.writes) == ([], [], [])
