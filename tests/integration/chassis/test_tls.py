"""Mutual TLS: both ends prove their names, a token counts only on a connection of its service, certificates change without a restart."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis import channel, identity, probe, server, tls, trust
from netra import ids
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from tests.fixtures.certificates import Authority, Files

KEY = Ed25519PrivateKey.generate()


def _token(service: str) -> channel.Metadata:
    return channel.bearer(identity.sign(KEY, "k1", identity.SERVICE, {"sub": service}, 600))


class _Auth:
    """What is called: says who called."""

    def __init__(self) -> None:
        self.beat = asyncio.Event()

    async def publish(self, request: Any, _context: Any) -> auth_pb2.PublishKeyResponse:
        assert identity.current().service == request.kid
        return auth_pb2.PublishKeyResponse()

    async def keys(self, _request: Any, _context: Any) -> auth_pb2.GetKeysResponse:
        return auth_pb2.GetKeysResponse(keys=[auth_pb2.Key(kid=identity.current().service)])

    async def permissions(self, _request: Any, _context: Any) -> auth_pb2.GetPermissionsResponse:
        return auth_pb2.GetPermissionsResponse(email=identity.current().user.actor)

    async def watch(self, _request: Any, _context: Any) -> AsyncIterator[auth_pb2.WatchTrustResponse]:
        yield auth_pb2.WatchTrustResponse()
        await self.beat.wait()
        yield auth_pb2.WatchTrustResponse()

    def add_to(self, _servicer: object, to: grpc.aio.Server) -> None:
        unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
        handlers: dict[str, Any] = {
            "PublishKey": unary(self.publish, auth_pb2.PublishKeyRequest.FromString, auth_pb2.PublishKeyResponse.SerializeToString),
            "GetKeys": unary(self.keys, auth_pb2.GetKeysRequest.FromString, auth_pb2.GetKeysResponse.SerializeToString),
            "GetPermissions": unary(
                self.permissions, auth_pb2.GetPermissionsRequest.FromString, auth_pb2.GetPermissionsResponse.SerializeToString
            ),
            "WatchTrust": stream(self.watch, auth_pb2.WatchTrustRequest.FromString, auth_pb2.WatchTrustResponse.SerializeToString),
        }
        to.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("netra.auth.v1.AuthService", handlers),))


class _Place:
    """A listening server, and channels to it."""

    def __init__(self, port: int, called: _Auth, stack: contextlib.AsyncExitStack) -> None:
        self.target = f"127.0.0.1:{port}"
        self.called = called
        self._stack = stack

    async def stub(self, files: Files, name: str = "auth") -> auth_pb2_grpc.AuthServiceAsyncStub:
        """As the process that has these files."""
        certificates = tls.Certificates(files.cert, files.key, files.ca)
        to = channel.connect(self.target, certificates=certificates, name=name)
        await self._stack.enter_async_context(to)
        return auth_pb2_grpc.AuthServiceStub(to)


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def own(authority: Authority) -> Files:
    return authority.issue("auth")


@pytest.fixture
async def place(own: Files, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[_Place]:
    monkeypatch.setattr(tls, "_LOOK_EVERY_S", 0.0)
    known = trust.Trust()
    published = auth_pb2.Key(kid="k1", public_key=KEY.public_key().public_bytes_raw(), issuer="auth")
    grants = [auth_pb2.Grant(role="user", tier="free", permissions=["session:read"])]
    await known.apply(auth_pb2.WatchTrustResponse(keys=[published], policy=auth_pb2.Policy(version=1, grants=grants)))
    certificates = tls.Certificates(own.cert, own.key, own.ca)
    listening = server.Server("127.0.0.1", 0, identity.Authenticator(known), 0.1, certificates)
    called = _Auth()
    listening.add(auth_pb2.DESCRIPTOR.services_by_name["AuthService"], called.add_to, called)
    await listening.start()
    await listening.serving(True)
    async with contextlib.AsyncExitStack() as stack:
        yield _Place(listening.port, called, stack)
    await listening.drain()


async def _refusal(call: Any) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code()


async def test_a_service_is_known_by_token_and_certificate(place: _Place, authority: Authority) -> None:
    stub = await place.stub(authority.issue("context"))
    await stub.PublishKey(auth_pb2.PublishKeyRequest(kid="context"), metadata=_token("context"))
    anybody = await stub.GetKeys(auth_pb2.GetKeysRequest(), metadata=_token("context"))
    assert [key.kid for key in anybody.keys] == ["context"]


async def test_a_token_on_the_connection_of_another_service_is_refused(place: _Place, authority: Authority) -> None:
    stub = await place.stub(authority.issue("events"))
    call = stub.PublishKey(auth_pb2.PublishKeyRequest(kid="context"), metadata=_token("context"))
    assert await _refusal(call) == grpc.StatusCode.UNAUTHENTICATED
    anybody = await stub.GetKeys(auth_pb2.GetKeysRequest(), metadata=_token("context"))
    assert [key.kid for key in anybody.keys] == [""]


async def test_only_the_service_that_acts_may_bring_a_token_on_behalf_of_a_user(place: _Place, authority: Authority) -> None:
    claims = {
        "sub": ids.uuid7(), "sid": ids.uuid7(), "tid": ids.uuid7(), "roles": ["user"], "tier": "free", "ver": 1,
        "scope": ["session:read"], "act": {"sub": "dispatcher"},
    }  # fmt: skip
    metadata = channel.bearer(identity.sign(KEY, "k1", identity.BEHALF, claims, 60))
    request = auth_pb2.GetPermissionsRequest()
    answer = await (await place.stub(authority.issue("dispatcher"))).GetPermissions(request, metadata=metadata)
    assert answer.email == "dispatcher"
    call = (await place.stub(authority.issue("events"))).GetPermissions(request, metadata=metadata)
    assert await _refusal(call) == grpc.StatusCode.UNAUTHENTICATED


async def test_a_client_without_a_certificate_of_ours_does_not_connect(place: _Place, own: Files, tmp_path: Path) -> None:
    stranger = Authority(tmp_path / "theirs").issue("context")
    forged = Files(stranger.cert, stranger.key, own.ca)
    call = (await place.stub(forged)).GetKeys(auth_pb2.GetKeysRequest(), timeout=5)
    assert await _refusal(call) == grpc.StatusCode.UNAVAILABLE
    credentials = grpc.ssl_channel_credentials(own.ca.read_bytes())
    options = (("grpc.ssl_target_name_override", "auth"),)
    for bare in (grpc.aio.secure_channel(place.target, credentials, options), grpc.aio.insecure_channel(place.target)):
        async with bare:
            stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(bare)
            assert await _refusal(stub.GetKeys(auth_pb2.GetKeysRequest(), timeout=5)) == grpc.StatusCode.UNAVAILABLE


async def test_a_server_that_is_not_the_one_meant_is_not_talked_to(place: _Place, authority: Authority) -> None:
    call = (await place.stub(authority.issue("context"), name="events")).GetKeys(auth_pb2.GetKeysRequest(), timeout=5)
    assert await _refusal(call) == grpc.StatusCode.UNAVAILABLE


async def test_a_server_shows_its_new_certificate_without_a_restart(place: _Place, authority: Authority) -> None:
    mine = authority.issue("context")
    expecting = await place.stub(mine, name="auth-2")
    assert await _refusal(expecting.GetKeys(auth_pb2.GetKeysRequest(), timeout=5)) == grpc.StatusCode.UNAVAILABLE
    authority.issue("auth-2", into="auth")
    again = await place.stub(mine, name="auth-2")
    await again.GetKeys(auth_pb2.GetKeysRequest(), timeout=5)


async def test_a_client_shows_its_new_certificate_and_its_open_streams_go_on(place: _Place, authority: Authority) -> None:
    mine = authority.issue("context")
    stub = await place.stub(mine)
    call = stub.WatchTrust(auth_pb2.WatchTrustRequest(), metadata=_token("context"))
    updates = call.__aiter__()
    await updates.__anext__()
    for name in ("events", "gateway", "context"):
        authority.issue(name, into="context")
        answer = await stub.GetKeys(auth_pb2.GetKeysRequest(), metadata=_token(name))
        assert [key.kid for key in answer.keys] == [name]
    place.called.beat.set()
    await updates.__anext__()
    assert [update async for update in updates] == []


async def test_the_probe_shows_the_certificate_of_its_process(place: _Place, own: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not await asyncio.to_thread(probe.answers, place.target)
    for name, value in own.environment().items():
        monkeypatch.setenv(name, value)
    assert await asyncio.to_thread(probe.answers, place.target)
