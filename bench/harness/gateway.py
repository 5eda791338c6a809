"""A real gateway in a process of its own, over an auth and a record that do nothing but answer: what is measured is the gateway."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.duration_pb2 import Duration

from bench.harness import child
from chassis import identity, log, telemetry
from gateway import wiring
from gateway.settings import GatewaySettings
from netra import ids
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc

_PLENTY = 1_000_000_000


def serve(told: str) -> None:
    """Be the gateway."""
    settings = GatewaySettings.model_validate_json(told)

    async def run() -> None:
        async with wiring.build(settings) as service:
            await child.answer({"port": service.port})

    log.set_up("bench", settings)
    telemetry.set_up("bench", settings)
    uvloop.run(run())


class _Auth(auth_pb2_grpc.AuthServiceServicer):
    def __init__(self, first: auth_pb2.WatchTrustResponse) -> None:
        self._first = first

    async def IssueToken(self, request: auth_pb2.IssueTokenRequest, context: Any) -> auth_pb2.IssueTokenResponse:
        return auth_pb2.IssueTokenResponse(tokens=auth_pb2.Tokens(access_token="service", expires_in=Duration(seconds=3600)))  # noqa: S106

    async def WatchTrust(self, request: auth_pb2.WatchTrustRequest, context: Any) -> AsyncIterator[auth_pb2.WatchTrustResponse]:
        yield self._first
        await asyncio.Event().wait()


def _auth(first: auth_pb2.WatchTrustResponse) -> _Auth:
    # the other methods are not called
    return _Auth(first)  # type: ignore[abstract]


class _Events(events_pb2_grpc.EventsServiceServicer):
    """A tail that sends what it is given."""

    def __init__(self) -> None:
        self.out: asyncio.Queue[events_pb2.TailResponse] = asyncio.Queue()

    async def Tail(self, requests: AsyncIterator[events_pb2.TailRequest], context: Any) -> AsyncIterator[events_pb2.TailResponse]:
        async with asyncio.TaskGroup() as group:
            hearing = group.create_task(self._hear(requests))
            beating = group.create_task(self._beat())
            try:
                while True:
                    yield await self.out.get()
            finally:
                hearing.cancel()
                beating.cancel()

    async def _hear(self, requests: AsyncIterator[events_pb2.TailRequest]) -> None:
        async for request in requests:
            if request.HasField("join"):
                user_id = _subject(request.join.access_token)
                position = events_pb2.TailPosition(user_id=user_id, cursor=0, oldest=1, epoch="bench", joined=True)
                self.out.put_nowait(events_pb2.TailResponse(positions=[position]))

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(1)
            self.out.put_nowait(events_pb2.TailResponse())


def _subject(token: str) -> str:
    body = token.split(".")[1]
    return str(json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))["sub"])


@dataclass(eq=False)
class Place:
    """The gateway and what it talks to."""

    gateway: child.Child
    events: _Events
    key: Ed25519PrivateKey
    cursors: dict[str, int] = field(default_factory=dict)

    def user(self) -> tuple[str, str]:
        """A user's id and token."""
        user_id = ids.UserId.new()
        claims = {"sub": user_id, "sid": ids.SessionId.new(), "tid": ids.TenantId.new(), "roles": ["user"], "tier": "internal", "ver": 1}
        return user_id, identity.sign(self.key, "bench", identity.ACCESS, claims, 900)

    def emit(self, users: list[str], frame: bytes) -> None:
        """One event for each of the users, in one message of the tail."""
        events = []
        for user_id in users:
            cursor = self.cursors[user_id] = self.cursors.get(user_id, 0) + 1
            events.append(events_pb2.Event(cursor=cursor, seq=cursor, user_id=user_id, run_id="r", thread_id="t", type="x", frame=frame))
        self.events.out.put_nowait(events_pb2.TailResponse(events=events))


@contextlib.asynccontextmanager
async def place(script: str) -> AsyncIterator[Place]:
    """For the time of the block; `script --gateway SETTINGS` must call `serve`."""
    key = Ed25519PrivateKey.generate()
    published = auth_pb2.Key(kid="bench", issuer="auth", state=auth_pb2.Key.STATE_CURRENT, public_key=key.public_key().public_bytes_raw())
    tier = auth_pb2.TierLimits(tier="internal", sockets=_PLENTY, frames_per_minute=_PLENTY, requests_per_minute=_PLENTY)
    grants = [auth_pb2.Grant(role="user", tier="internal", permissions=["events:read"])]
    policy = auth_pb2.Policy(version=1, grants=grants, limits=[tier])
    server = grpc.aio.server()
    # its other methods are not called
    events = _Events()  # type: ignore[abstract]
    auth_pb2_grpc.add_AuthServiceServicer_to_server(_auth(auth_pb2.WatchTrustResponse(keys=[published], policy=policy)), server)
    events_pb2_grpc.add_EventsServiceServicer_to_server(events, server)
    target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("service", "valkey"):
            (Path(folder) / name).write_text("bench")
        told = {
            "port": 0, "secrets_dir": folder, "auth_target": target, "events_target": target, "context_target": target,
            "dispatcher_target": target, "valkey_url": "redis://127.0.0.1:1/0", "log_level": "error", "env": "test",
        }  # fmt: skip
        gateway = await asyncio.to_thread(child.Child, script, "--gateway", json.dumps(told))
        try:
            yield Place(gateway, events, key)
        finally:
            await asyncio.to_thread(gateway.close)
            await server.stop(None)


class Socket(asyncio.Protocol):
    """A client that opens a WebSocket and counts bytes."""

    def __init__(self, port: int, token: str, due: bytes) -> None:
        self._due = due
        protocols = f"netra.v1, bearer.{token}" if token else "netra.v1"
        self._request = (
            f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nSec-WebSocket-Protocol: {protocols}\r\n\r\n"
        ).encode()
        self.received = 0
        self._wanted = 1 << 62
        self._greeting = b""
        self._loop = asyncio.get_running_loop()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        self._reached: asyncio.Future[None] | None = None
        self.transport: asyncio.Transport

    @classmethod
    async def open(cls, port: int, token: str = "", greeted: bool = True) -> Socket:
        """A socket that was accepted, and greeted when that is due."""
        due = b'"server_time"' if greeted else b"\r\n\r\n"
        _, one = await asyncio.get_running_loop().create_connection(lambda: cls(port, token, due), "127.0.0.1", port)
        async with asyncio.timeout(30):
            await one._opened
        return one

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        if not self._opened.done():
            self._greeting += data
            if self._due in self._greeting:
                assert b" 101 " in self._greeting, self._greeting
                self._greeting = b""
                self._opened.set_result(None)
            return
        self.received += len(data)
        if self.received >= self._wanted and self._reached is not None and not self._reached.done():
            self._reached.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._opened.done():
            self._opened.set_exception(exc or ConnectionError(self._greeting.decode(errors="replace")))

    async def reached(self, size: int) -> None:
        """Returns when so many bytes have come."""
        self._wanted = size
        if self.received < size:
            self._reached = self._loop.create_future()
            async with asyncio.timeout(60):
                await self._reached

    def close(self) -> None:
        """Cut it."""
        self.transport.abort()
