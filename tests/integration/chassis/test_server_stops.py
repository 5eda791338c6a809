"""A call that is cut because something stops is unavailable to its caller, who may try again; nobody is told that they cancelled it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis import channel, identity, lifecycle, server, status, trust
from netra import errors
from netra.auth.v1 import auth_pb2, auth_pb2_grpc

_KEY = Ed25519PrivateKey.generate()


class _Auth(auth_pb2_grpc.AuthServiceServicer):
    """Waits for something that is cancelled meanwhile, as the tasks of a process are that stops."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self.inner: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    async def GetKeys(self, request: auth_pb2.GetKeysRequest, context: object) -> auth_pb2.GetKeysResponse:
        self.begun.set()
        await self.inner
        return auth_pb2.GetKeysResponse()

    async def ResetPassword(self, request: auth_pb2.ResetPasswordRequest, context: object) -> auth_pb2.ResetPasswordResponse:
        raise errors.Cancelled("You cancelled it.")

    async def WatchTrust(
        self, request: auth_pb2.WatchTrustRequest, context: object
    ) -> AsyncIterator[auth_pb2.WatchTrustResponse]:  # fmt: skip
        yield auth_pb2.WatchTrustResponse()
        self.begun.set()
        await self.inner


class Place:
    """A server of ours, and a caller."""

    def __init__(self, auth: _Auth, listening: server.Server, to: grpc.aio.Channel) -> None:
        self.auth, self.listening, self.to = auth, listening, to
        self.stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(to)
        self.tasks = lifecycle.Tasks(on_failure=lambda _error: None)

    async def keys(self) -> auth_pb2.GetKeysResponse:
        """A call that waits at the server, as callers make it."""
        with status.translated():
            return await self.stub.GetKeys(auth_pb2.GetKeysRequest(), timeout=60.0)

    async def watched(self) -> None:
        """A stream that waits there, as callers read it."""
        token = identity.sign(_KEY, "k1", identity.SERVICE, {"sub": "gateway"}, 60)
        with status.translated():
            async for _ in self.stub.WatchTrust(auth_pb2.WatchTrustRequest(), timeout=60.0, metadata=channel.bearer(token)):
                pass


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    known = trust.Trust()
    published = auth_pb2.Key(kid="k1", public_key=_KEY.public_key().public_bytes_raw(), issuer="auth")
    await known.apply(
        auth_pb2.WatchTrustResponse(keys=[published], policy=auth_pb2.Policy(version=1, grants=[auth_pb2.Grant(role="user", tier="free")]))
    )
    authenticator = identity.Authenticator(known)
    listening = server.Server("127.0.0.1", 0, authenticator, 0.1)
    # the other methods are not called
    auth = _Auth()  # type: ignore[abstract]
    descriptor = auth_pb2.DESCRIPTOR.services_by_name["AuthService"]
    listening.add(descriptor, auth_pb2_grpc.add_AuthServiceServicer_to_server, auth)
    await listening.start()
    await listening.serving(True)
    to = channel.connect(f"127.0.0.1:{listening.port}")
    found = Place(auth, listening, to)
    yield found
    await found.tasks.close()
    await to.close()
    await listening.drain()


async def _begun(place: Place, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
    task = place.tasks.spawn(work, name="call")
    async with asyncio.timeout(20):
        await place.auth.begun.wait()
    return task


async def _failed(task: Awaitable[Any]) -> errors.NetraError:
    async with asyncio.timeout(20):
        with pytest.raises(errors.NetraError) as caught:
            await task
    return caught.value


@pytest.mark.parametrize("method", ["keys", "watched"])
async def test_what_a_server_that_stops_cuts_is_unavailable(place: Place, method: str) -> None:
    call = await _begun(place, getattr(place, method)())
    await place.listening.drain()
    assert type(await _failed(call)) is errors.Unavailable


@pytest.mark.parametrize("method", ["keys", "watched"])
async def test_a_call_whose_work_was_cancelled_is_answered_at_once_and_unavailable(place: Place, method: str) -> None:
    call = await _begun(place, getattr(place, method)())
    place.auth.inner.cancel()
    found = await _failed(call)
    assert (type(found), found.retryable) == (errors.Unavailable, True)
    assert "cancelled" not in found.message


async def test_a_call_on_a_channel_that_is_closed_meanwhile_is_unavailable(place: Place) -> None:
    call = await _begun(place, place.keys())
    await place.to.close()
    assert type(await _failed(call)) is errors.Unavailable
    assert type(await _failed(place.keys())) is errors.Unavailable


async def test_who_cancels_a_call_is_cancelled(place: Place) -> None:
    call = await _begun(place, place.keys())
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call


async def test_what_a_service_says_was_cancelled_was(place: Place) -> None:
    with pytest.raises(errors.Cancelled, match="You cancelled it"), status.translated():
        await place.stub.ResetPassword(auth_pb2.ResetPasswordRequest())


@pytest.mark.parametrize("code", [grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE])
async def test_a_peer_that_cuts_a_call_is_unavailable(code: grpc.StatusCode) -> None:
    class Cuts(grpc.GenericRpcHandler):
        def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
            async def cut(_request: bytes, context: Any) -> None:
                await context.abort(code, "RST_STREAM")

            return grpc.unary_unary_rpc_method_handler(cut)

    behind = grpc.aio.server()
    behind.add_generic_rpc_handlers((Cuts(),))
    port = behind.add_insecure_port("127.0.0.1:0")
    await behind.start()
    try:
        async with channel.connect(f"127.0.0.1:{port}") as to:
            with pytest.raises(errors.Unavailable), status.translated():
                await to.unary_unary("/s/S")(b"")  # type: ignore[arg-type]
    finally:
        await behind.stop(None)
