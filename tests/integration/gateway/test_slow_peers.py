"""Peers that keep the gateway waiting, or send what is never answered: bounded memory, bounded time, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gateway import envelope, problems, wire, wiring
from tests.fixtures import web
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.gateway.conftest import until

_PING, _PONG, _CLOSE, _TEXT, _CONT, _FIN = 0x9, 0xA, 0x8, 0x1, 0x0, 0x80
# what a peer may have piled up: the mark of the transport, and the answers to what one read brought
_BOUND = 64 * 1024 + 256 * 1024 + 4096


class Peer:
    """A client that is in no hurry."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers of an answer."""
        async with asyncio.timeout(10):
            lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        return int(lines[0].split(" ")[1]), {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}

    async def answer(self) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an answer."""
        status, headers = await self.head()
        return status, json.loads(await self.reader.readexactly(int(headers["content-length"])))

    async def ended(self) -> bool:
        """Whether the server ended the connection."""
        async with asyncio.timeout(10):
            try:
                while await self.reader.read(65536):
                    pass
            except ConnectionError:
                pass
        return True

    def send(self, opcode: int, payload: bytes = b"", *, fin: bool = True, times: int = 1) -> None:
        """Send frames of the socket, masked with zeros."""
        length = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + len(payload).to_bytes(2, "big")
        self.writer.write((bytes([(_FIN if fin else 0) | opcode]) + length + bytes(4) + payload) * times)

    async def frame(self) -> tuple[int, bytes]:
        """The next frame of the socket."""
        async with asyncio.timeout(10):
            first, second = await self.reader.readexactly(2)
            size = second
            if second >= 126:
                size = int.from_bytes(await self.reader.readexactly(2 if second == 126 else 8), "big")
            return first & 0xF, await self.reader.readexactly(size)

    async def closed(self) -> int:
        """Why the server closed the socket."""
        while True:
            opcode, payload = await self.frame()
            if opcode == _CLOSE:
                return int.from_bytes(payload[:2], "big")


@contextlib.asynccontextmanager
async def connected(service: wiring.Service, *, room: int = 0) -> AsyncIterator[Peer]:
    """A connection; `room` is how many bytes the client takes before it is asked to."""
    plain = socket.socket()
    plain.setblocking(False)
    if room:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
    await asyncio.get_running_loop().sock_connect(plain, ("127.0.0.1", service.port))
    reader, writer = await asyncio.open_connection(sock=plain, limit=room or 65536)
    try:
        yield Peer(reader, writer)
    finally:
        writer.transport.abort()


async def greeted(peer: Peer, user: User) -> None:
    """Open the socket."""
    lines = ("GET /ws HTTP/1.1", "Host: netra", "Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    more = ("Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==", f"Authorization: Bearer {user.token}")
    peer.writer.write("\r\n".join((*lines, *more, "", "")).encode())
    assert (await peer.head())[0] == 101
    opcode, payload = await peer.frame()
    assert (opcode, json.loads(payload)["type"]) == (_TEXT, "connected")


def wires(service: wiring.Service) -> list[wire.WireProtocol]:
    """The server's ends of the open sockets."""
    return [one for one in service.server.server_state.connections if isinstance(one, wire.WireProtocol)]


@pytest.fixture
async def edge(services: Services) -> wiring.Service:
    """A gateway that can open sockets."""
    await services.auth()
    await services.events()
    return await services.gateway(heartbeat_s=600.0)


@pytest.fixture
async def alone(services: Services) -> wiring.Service:
    """A gateway that is asked nothing by anybody known."""
    return await services.gateway(anonymous_per_minute=10_000)


async def test_answers_to_pings_that_nobody_takes_do_not_pile_up(
    edge: wiring.Service, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    # who reads slowly may read to the end: what is asked here is how much waits for them
    monkeypatch.setattr(wire, "_LINGER_S", 60.0)
    user = await services.user()
    async with connected(edge, room=16 * 1024) as peer:
        await greeted(peer, user)
        (line,) = wires(edge)
        most = sent = 0
        while sent < 16 * 1024 * 1024 and not line.close_sent:
            peer.send(_PING, os.urandom(125), times=500)
            sent += 500 * 131
            with contextlib.suppress(ConnectionError):
                await peer.writer.drain()
            most = max(most, line.unwritten())
        assert most <= _BOUND
        assert await peer.closed() == 4002


async def test_a_ping_at_a_bad_moment_is_answered_when_there_is_room(edge: wiring.Service, services: Services) -> None:
    user = await services.user()
    async with connected(edge, room=16 * 1024) as peer:
        await greeted(peer, user)
        (line,) = wires(edge)
        # as events would: more than the peer takes
        while line.writable.is_set():
            line.put(envelope.text(b'"' + b"x" * 65_000 + b'"'))
        peer.send(_PING, b"mine")
        await until(lambda: line._pong)
        while (found := await peer.frame())[0] == _TEXT:
            pass
        assert found == (_PONG, b"mine")
        assert not line.close_sent


@pytest.mark.parametrize("last", [b"\x88\x82\0\0\0\0\x03\xe8", b"\x81\x01a"], ids=["close", "no mask"])
async def test_who_takes_nothing_and_ends_is_let_go(
    edge: wiring.Service, services: Services, monkeypatch: pytest.MonkeyPatch, last: bytes
) -> None:
    monkeypatch.setattr(wire, "_LINGER_S", 0.2)
    user = await services.user()
    async with connected(edge, room=16 * 1024) as peer:
        await greeted(peer, user)
        peer.writer.transport.pause_reading()  # type: ignore[attr-defined]
        (line,) = wires(edge)
        while line.writable.is_set():
            line.put(envelope.text(b'"' + b"x" * 65_000 + b'"'))
        peer.writer.write(last)
        await until(lambda: not wires(edge))


@pytest.mark.parametrize(("opcode", "payload"), [(_PING, b"x"), (_PONG, b"x")])
async def test_pings_count_as_frames(edge: wiring.Service, services: Services, opcode: int, payload: bytes) -> None:
    user = await services.user(tier="free")
    async with connected(edge) as peer:
        await greeted(peer, user)
        peer.send(opcode, payload, times=1000)
        assert await peer.closed() == 4530


async def test_a_message_has_a_few_parts_and_no_more(edge: wiring.Service, services: Services) -> None:
    user = await services.user()
    async with connected(edge) as peer:
        await greeted(peer, user)
        text = json.dumps({"type": "PING", "id": "p"}).encode().ljust(64)
        for at in range(64):
            peer.send(_CONT if at else _TEXT, text[at : at + 1], fin=at == 63)
        opcode, payload = await peer.frame()
        assert (opcode, json.loads(payload)["type"]) == (_TEXT, "pong")
        (line,) = wires(edge)
        peer.send(_TEXT, b" ", fin=False)
        peer.send(_CONT, fin=False, times=100_000)
        assert await peer.closed() == 1009
        assert len(line.frames) <= 64


async def test_parts_count_as_frames(edge: wiring.Service, services: Services) -> None:
    user = await services.user(tier="free")
    async with connected(edge) as peer:
        await greeted(peer, user)
        for _ in range(20):
            peer.send(_TEXT, b"1", fin=False)
            peer.send(_CONT, b"1", fin=False, times=50)
            peer.send(_CONT, b"1")
        assert await peer.closed() == 4530


@pytest.mark.parametrize("sent", [b"", b"GET /healthz HTTP/1.1\r\nHost: netra\r\n", b"GET /healthz HTTP/1.1\r\nHost: netra\r\n\r\nG"])
async def test_a_request_whose_head_does_not_come_is_not_waited_for(
    alone: wiring.Service, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(wire, "_HEAD_S", 0.2)
    async with connected(alone) as peer:
        peer.writer.write(sent)
        assert await peer.ended()


async def test_bytes_that_trickle_in_are_no_head(alone: wiring.Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_HEAD_S", 0.3)
    async with connected(alone) as peer, asyncio.timeout(10):
        peer.writer.write(b"GET /healthz HTTP/1.1\r\n")
        # it ends in order, or by a reset when a byte was on its way
        with contextlib.suppress(ConnectionError):
            while not peer.reader.at_eof():
                peer.writer.write(b"X-A: b\r\n")
                await peer.writer.drain()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.01):
                        await peer.reader.read(1)


async def test_a_connection_that_is_used_is_left_alone(alone: wiring.Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_HEAD_S", 0.3)
    loop = asyncio.get_running_loop()
    began = loop.time()
    async with connected(alone) as peer:
        while loop.time() < began + 1.0:
            peer.writer.write(b"GET /healthz HTTP/1.1\r\nHost: netra\r\n\r\n")
            assert (await peer.answer())[0] == 200


async def test_a_socket_is_not_bound_by_the_time_of_its_handshake(
    edge: wiring.Service, services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "_HEAD_S", 0.2)
    user = await services.user()
    late = asyncio.Event()
    async with connected(edge) as peer:
        await greeted(peer, user)
        asyncio.get_running_loop().call_later(0.6, late.set)
        await late.wait()
        peer.send(_PING, b"x")
        assert await peer.frame() == (_PONG, b"x")


async def test_the_rest_of_a_request_that_was_answered_is_not_waited_for(alone: wiring.Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "_REST_S", 0.2)
    async with connected(alone) as peer:
        peer.writer.write(b"GET /healthz HTTP/1.1\r\nHost: netra\r\nContent-Length: 1000\r\n\r\n")
        assert (await peer.answer())[0] == 200
        # the server's patience with connections that are kept alive ends with the first byte
        peer.writer.write(b"x")
        assert await peer.ended()


async def test_a_body_that_does_not_come_is_not_waited_for(alone: wiring.Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(problems, "_BODY_S", 0.2)
    async with connected(alone) as peer:
        peer.writer.write(_login(b"{"))
        status, problem = await peer.answer()
        assert (status, problem["code"]) == (504, "DEADLINE_EXCEEDED")


@pytest.mark.parametrize("path", ["/auth/login", "/auth/refresh", "/auth/token", "/rpc/netra.auth.v1.AuthService/IssueToken"])
async def test_who_sends_too_many_is_told_before_their_body_comes(services: Services, path: str) -> None:
    alone = await services.gateway(anonymous_per_minute=1)
    async with connected(alone) as peer:
        peer.writer.write(b"GET /metrics HTTP/1.1\r\nHost: netra\r\n\r\n")
        status, headers = await peer.head()
        await peer.reader.readexactly(int(headers["content-length"]))
        assert status == 200
        peer.writer.write(_login(b"{", path))
        status, problem = await peer.answer()
        assert (status, problem["code"]) == (429, "RATE_LIMITED")


@pytest.mark.parametrize("path", ["/", "/metrics", "/openapi.json", "/.well-known/jwks.json"])
async def test_what_anybody_may_ask_is_counted_but_for_probes(services: Services, path: str) -> None:
    await services.auth()
    gateway = await services.gateway(anonymous_per_minute=1)
    async with web.client(base_url=f"http://127.0.0.1:{gateway.port}", timeout=20, trust_env=False) as http:
        assert [(await http.get(path)).status_code for _ in range(2)] == [200, 429]
        assert (await http.get("/healthz")).status_code == 200
        assert (await http.get("/readyz")).json()["parts"]["auth"] is True


async def test_a_peer_that_does_not_take_its_answer_is_cut(services: Services) -> None:
    alone = await services.gateway(stall_s=0.3)
    async with connected(alone, room=4096) as peer:
        # more than the buffers of both ends hold
        peer.writer.write(b"GET /openapi.json HTTP/1.1\r\nHost: netra\r\n\r\n" * 50)
        await peer.writer.drain()
        served = alone.server.server_state.connections
        await until(lambda: served)
        await until(lambda: not served)


async def test_there_are_so_many_connections_and_no_more(services: Services) -> None:
    alone = await services.gateway(max_connections=3)
    async with contextlib.AsyncExitStack() as stack:
        peers = [await stack.enter_async_context(connected(alone)) for _ in range(3)]
        for peer in peers:
            peer.writer.write(b"GET /healthz HTTP/1.1\r\nHost: netra\r\n\r\n")
            assert (await peer.answer())[0] == 200
        async with connected(alone) as one:
            status, headers = await one.head()
            problem = json.loads(await one.reader.readexactly(int(headers["content-length"])))
            assert (status, problem["code"], problem["retry_after_ms"]) == (503, "UNAVAILABLE", 1000)
            assert headers["retry-after"] == "1"
            assert await one.ended()
        peers[0].writer.transport.abort()
        await until(lambda: len(alone.server.server_state.connections) <= 2)
        async with connected(alone) as one:
            one.writer.write(b"GET /healthz HTTP/1.1\r\nHost: netra\r\n\r\n")
            assert (await one.answer())[0] == 200


def _login(body: bytes, path: str = "/auth/login") -> bytes:
    kind = "application/x-www-form-urlencoded" if path == "/auth/token" else "application/json"
    head = f"POST {path} HTTP/1.1\r\nHost: netra\r\nContent-Type: {kind}\r\nContent-Length: 100\r\n\r\n"
    return head.encode() + body
