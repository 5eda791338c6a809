"""Typed stubs: auth, dispatcher, context, events."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from chassis import channel, replicas, spread, tls
from gateway.settings import GatewaySettings
from netra import ids
from netra.auth.v1 import auth_pb2_grpc
from netra.context.v1 import context_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2_grpc
from netra.events.v1 import events_pb2_grpc

Events: TypeAlias = "replicas.Each[events_pb2_grpc.EventsServiceAsyncStub]"


@dataclass(frozen=True, slots=True)
class Upstreams:
    """Every call is made in the name of a user, whose token goes along; only `tails` run under the gateway's own.

    Of events there may be several replicas: `events` is the one that this gateway asks just now, `records` and `tails` are each.
    Of the dispatcher, too: any of them is asked, in turn.
    """

    auth: auth_pb2_grpc.AuthServiceAsyncStub
    dispatcher: dispatcher_pb2_grpc.DispatcherServiceAsyncStub
    dispatchers: replicas.Replicas
    context: context_pb2_grpc.ContextServiceAsyncStub
    events: events_pb2_grpc.EventsServiceAsyncStub
    records: Events
    tails: Events
    each: replicas.Each[grpc.aio.Channel]
    gateway_id: str
    credentials: channel.ServiceCredentials
    channels: dict[str, grpc.aio.Channel]
    # one for each channel, which keeps every method it was ever asked for
    health: dict[str, Sequence[Any]]  # its types know only the synchronous one

    async def serving(self) -> dict[str, bool]:
        """Which services say over grpc.health.v1 that they serve; one replica of a service is enough."""
        answers = await asyncio.gather(*(self._any_serving(stubs) for stubs in self.health.values()))
        return dict(zip(self.health, answers, strict=True))

    async def _any_serving(self, stubs: Sequence[Any]) -> bool:
        return any(await asyncio.gather(*map(_serving, stubs)))

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
    dispatcher = spread.Spread(
        replicas.Replicas(settings.dispatcher_target),
        lambda target: channel.connect(target, certificates=certificates, name="dispatcher"),
        "dispatcher",
    )
    context = channel.connect(settings.context_target, certificates=certificates, name="context")
    channels: dict[str, grpc.aio.Channel] = {"auth": auth, "context": context, "dispatcher": dispatcher}
    asked = {name: [one] for name, one in channels.items()}
    asked["dispatcher"] = [dispatcher.of(target) for target in dispatcher.replicas.targets]
    found = replicas.Replicas(settings.events_target)

    def to_events(target: str) -> grpc.aio.Channel:
        channels[f"events {target}"] = channel.connect(target, certificates=certificates, name="events")
        return channels[f"events {target}"]

    def to_tail(target: str) -> grpc.aio.Channel:
        channels[f"tail {target}"] = channel.connect(target, credentials, certificates=certificates, name="events")
        return channels[f"tail {target}"]

    each, gateway_id = replicas.Each(found, to_events), ids.uuid7()
    channels["events"] = channel.Chosen(lambda: each.of(found.first(gateway_id)))
    asked["events"] = [each.of(target) for target in found.targets]
    return Upstreams(
        auth=auth_pb2_grpc.AuthServiceStub(auth),
        dispatcher=dispatcher_pb2_grpc.DispatcherServiceStub(dispatcher),
        dispatchers=dispatcher.replicas,
        context=context_pb2_grpc.ContextServiceStub(context),
        events=events_pb2_grpc.EventsServiceStub(channels["events"]),
        records=replicas.Each(found, lambda target: _events(each.of(target))),
        tails=replicas.Each(found, lambda target: _events(to_tail(target))),
        each=each,
        gateway_id=gateway_id,
        credentials=credentials,
        channels=channels,
        health={name: [health_pb2_grpc.HealthStub(one) for one in some] for name, some in asked.items()},
    )


def _events(to: grpc.aio.Channel) -> events_pb2_grpc.EventsServiceAsyncStub:
    stub: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(to)
    return stub
