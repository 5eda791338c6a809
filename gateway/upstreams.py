"""Typed stubs: auth, dispatcher, context, events."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chassis import channel, tls
from gateway.settings import GatewaySettings
from netra.auth.v1 import auth_pb2_grpc
from netra.context.v1 import context_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2_grpc
from netra.events.v1 import events_pb2_grpc


@dataclass(frozen=True, slots=True)
class Upstreams:
    """Every call is made in the name of a user, whose token goes along; only `tail` runs under the gateway's own."""

    auth: auth_pb2_grpc.AuthServiceAsyncStub
    dispatcher: dispatcher_pb2_grpc.DispatcherServiceAsyncStub
    context: context_pb2_grpc.ContextServiceAsyncStub
    events: events_pb2_grpc.EventsServiceAsyncStub
    tail: events_pb2_grpc.EventsServiceAsyncStub
    credentials: channel.ServiceCredentials
    channels: dict[str, grpc.aio.Channel]
    # one for each channel, which keeps every method it was ever asked for
    health: dict[str, Any]  # its types know only the synchronous one

    async def serving(self) -> dict[str, bool]:
        """Which services say over grpc.health.v1 that they serve."""
        answers = await asyncio.gather(*map(_serving, self.health.values()))
        return dict(zip(self.health, answers, strict=True))

    async def close(self) -> None:
        """Close all channels."""
        await asyncio.gather(*(one.close() for one in self.channels.values()))


async def _serving(stub: Any) -> bool:
    try:
        answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=1.0)
    except grpc.aio.AioRpcError:
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def connect(settings: GatewaySettings) -> Upstreams:
    """Channels to the four services. Raises `MissingSecret` without the gateway's own secret."""
    certificates = tls.of(settings)
    auth = channel.connect(settings.auth_target, certificates=certificates, name="auth")
    credentials = channel.ServiceCredentials("gateway", settings.secret("service").get_secret_value(), auth_pb2_grpc.AuthServiceStub(auth))
    dispatcher = channel.connect(settings.dispatcher_target, certificates=certificates, name="dispatcher")
    context = channel.connect(settings.context_target, certificates=certificates, name="context")
    events = channel.connect(settings.events_target, certificates=certificates, name="events")
    tail = channel.connect(settings.events_target, credentials, certificates=certificates, name="events")
    asked = {"auth": auth, "context": context, "dispatcher": dispatcher, "events": events}
    return Upstreams(
        auth=auth_pb2_grpc.AuthServiceStub(auth),
        dispatcher=dispatcher_pb2_grpc.DispatcherServiceStub(dispatcher),
        context=context_pb2_grpc.ContextServiceStub(context),
        events=events_pb2_grpc.EventsServiceStub(events),
        tail=events_pb2_grpc.EventsServiceStub(tail),
        credentials=credentials,
        channels={**asked, "tail": tail},
        health={name: health_pb2_grpc.HealthStub(one) for name, one in asked.items()},
    )
