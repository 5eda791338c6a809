"""What is around the calls of a server: each is counted, methods are found by name, and nothing else is there."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, Sum
from prometheus_client import REGISTRY

from chassis import identity, server, tally, telemetry, trust
from netra import ids
from netra.auth.v1 import auth_pb2, auth_pb2_grpc

_KEY = Ed25519PrivateKey.generate()
_OPEN, _PERMISSIONS = "/netra.auth.v1.AuthService/GetKeys", "/netra.auth.v1.AuthService/GetPermissions"


class _Auth(auth_pb2_grpc.AuthServiceServicer):
    async def GetKeys(self, request: auth_pb2.GetKeysRequest, context: object) -> auth_pb2.GetKeysResponse:
        return auth_pb2.GetKeysResponse()

    async def GetPermissions(self, request: auth_pb2.GetPermissionsRequest, context: object) -> auth_pb2.GetPermissionsResponse:
        return auth_pb2.GetPermissionsResponse(email=identity.current().user_id)


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemoryMetricReader]:
    """Reads what is counted during the test."""
    found = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[found])
    monkeypatch.setattr(telemetry, "meter", provider.get_meter("test"))
    monkeypatch.setattr(server, "_ended", tally.Tally("netra.rpc.server.calls", "", "method", "code"))
    yield found
    provider.shutdown()


@pytest.fixture
async def to() -> AsyncIterator[grpc.aio.Channel]:
    known = trust.Trust()
    published = auth_pb2.Key(kid="k1", public_key=_KEY.public_key().public_bytes_raw(), issuer="auth")
    grants = [auth_pb2.Grant(role="user", tier="free", permissions=["session:read"])]
    await known.apply(auth_pb2.WatchTrustResponse(keys=[published], policy=auth_pb2.Policy(version=1, grants=grants)))
    listening = server.Server("127.0.0.1", 0, identity.Authenticator(known), 0.1)
    # the other methods are not called
    servicer = _Auth()  # type: ignore[abstract]
    listening.add(auth_pb2.DESCRIPTOR.services_by_name["AuthService"], auth_pb2_grpc.add_AuthServiceServicer_to_server, servicer)
    await listening.start()
    await listening.serving(True)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{listening.port}") as channel:
        yield channel
    await listening.drain()


def _call(to: grpc.aio.Channel, path: str) -> Any:
    return to.unary_unary(path)


def _took(method: str) -> float:
    return REGISTRY.get_sample_value("netra_rpc_server_duration_seconds_count", {"method": method}) or 0.0


def _counted(reader: InMemoryMetricReader) -> dict[tuple[object, ...], float]:
    data = reader.get_metrics_data()
    assert data is not None
    (metric,) = data.resource_metrics[0].scope_metrics[0].metrics
    assert isinstance(metric.data, Sum)
    return {tuple((point.attributes or {}).values()): point.value for point in metric.data.data_points}


async def test_each_call_is_counted_by_method_and_code(reader: InMemoryMetricReader, to: grpc.aio.Channel) -> None:
    before, stub = (_took(_OPEN), _took(_PERMISSIONS)), auth_pb2_grpc.AuthServiceStub(to)
    claims = {"sub": ids.uuid7(), "sid": ids.uuid7(), "tid": ids.uuid7(), "roles": ["user"], "tier": "free", "ver": 1}
    token = identity.sign(_KEY, "k1", identity.ACCESS, claims, 60)
    for _ in range(3):
        await stub.GetKeys(auth_pb2.GetKeysRequest())
    mine = await stub.GetPermissions(auth_pb2.GetPermissionsRequest(), metadata=(("authorization", f"Bearer {token}"),))
    assert mine.email == claims["sub"]
    for _ in range(2):
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.GetPermissions(auth_pb2.GetPermissionsRequest())
    expected = {(_OPEN, "OK"): 3, (_PERMISSIONS, "OK"): 1, (_PERMISSIONS, "UNAUTHENTICATED"): 2}
    # who is refused may know it before it is counted
    ends = time.monotonic() + 10
    while _counted(reader) != expected and time.monotonic() < ends:
        await stub.GetKeys(auth_pb2.GetKeysRequest())
        expected[_OPEN, "OK"] += 1
    assert _counted(reader) == expected
    assert (_took(_OPEN), _took(_PERMISSIONS)) == (before[0] + expected[_OPEN, "OK"], before[1] + 3)


@pytest.mark.parametrize("path", ["/netra.auth.v1.AuthService/Nothing", "/netra.context.v1.ContextService/OpenContext", "/nothing"])
async def test_a_method_that_is_not_there_is_unimplemented(to: grpc.aio.Channel, path: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _call(to, path)(b"")
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_health_and_descriptions_are_for_everybody(to: grpc.aio.Channel) -> None:
    stub: Any = health_pb2_grpc.HealthStub(to)
    health = await stub.Check(health_pb2.HealthCheckRequest())
    assert health.status == health_pb2.HealthCheckResponse.SERVING
    asked = reflection_pb2.ServerReflectionRequest(list_services="")
    make: Any = reflection_pb2_grpc.ServerReflectionStub
    answers = make(to).ServerReflectionInfo(iter([asked]))
    names = [each.name async for answer in answers for each in answer.list_services_response.service]
    assert {"netra.auth.v1.AuthService", "grpc.health.v1.Health"} <= set(names)
