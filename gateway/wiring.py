"""Builds the gateway; the one place that names concrete classes."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import uvicorn

from chassis import audit, identity, lifecycle, limits, log, status, streams, trust
from gateway import api_keys, app, bridge, callers, entitlements, http, presence, pump, record, router, rpc, session, upstreams, wire
from gateway import sockets as sockets_
from gateway.settings import GatewaySettings
from netra.dispatcher.v1 import dispatcher_pb2

_log = log.get(__name__)
# what a reader that has stalled may pile up in the kernel
_SEND_BUFFER = 128 * 1024
# frames above the limit are still read, up to this many times it, so that they get an answer
_OVERSIZE = 4
# what is open beside connections of clients
_OTHER_FILES = 128


@dataclass(frozen=True, slots=True)
class Service:
    """The gateway, listening."""

    port: int
    server: uvicorn.Server
    edge: session.Edge


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # the protocol by its name: asyncio sends small answers at once only where it knows that this is TCP
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(f"{host}:{port}: {error.strerror}. Stop what listens there, or set NETRA_GATEWAY_PORT.") from None
    return listener


def _room(wanted: int) -> int:
    """How many connections there may be: as many as wanted, if so many files may be open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < wanted + _OTHER_FILES:
        more = wanted + _OTHER_FILES if hard < 0 else min(wanted + _OTHER_FILES, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (more, hard))
            soft = more
    if 0 <= soft < wanted + _OTHER_FILES:
        _log.warning("fewer connections than NETRA_MAX_CONNECTIONS: this process may not open so many files", files=soft)
        return max(soft - _OTHER_FILES, 1)
    return wanted


def _server(settings: GatewaySettings, edge: session.Edge, services: upstreams.Upstreams) -> uvicorn.Server:
    config = uvicorn.Config(
        app.build(edge, http.Api(edge, services), settings),
        http=wire.bounded(_room(settings.max_connections), settings.stall_s),
        ws=wire.WireProtocol,
        ws_max_size=settings.max_frame_bytes * _OVERSIZE,
        ws_ping_interval=settings.heartbeat_s,
        ws_ping_timeout=settings.pong_s,
        ws_per_message_deflate=False,
        lifespan="off",
        access_log=False,
        log_config=None,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=int(settings.drain_s) + 1,
    )
    return uvicorn.Server(config)


@contextlib.asynccontextmanager
async def build(settings: GatewaySettings) -> AsyncIterator[Service]:
    """Listen, follow auth and the record, serve; drain at the end."""
    services = upstreams.connect(settings)
    known = trust.Trust(settings.state_dir, settings.trust_stale_s)
    counted = limits.Limits(settings.valkey_dsn("gateway"), "gateway", settings.valkey_namespace)
    refusals = audit.Refusals(audit.to_auth(services.auth, services.credentials))
    entitled = entitlements.Entitlements(known, counted, refusals, settings.anonymous_per_minute)
    said = streams.Streams(settings.valkey_dsn("gateway"), "gateway", settings.valkey_namespace)
    leases = limits.Leases(settings.valkey_dsn("gateway"), "gateway", settings.valkey_namespace)
    present = presence.Presence(leases, said)
    manager = sockets_.UnifiedWebSocketManager(entitled.sockets, present)
    known.on_revocation(manager.revoked)
    verifier = identity.Verifier(known)
    keys = api_keys.ApiKeys(services.auth, services.credentials, verifier)
    edge = session.Edge(
        settings=settings,
        verifier=verifier,
        tail=pump.Pump(services.tails, services.gateway_id),
        reader=record.Record(services.records),
        calls=router.Router(services.dispatcher),
        open=manager,
        callers=callers.Callers(verifier, keys, entitled, settings.proxies),
        entitled=entitled,
        streams=bridge.Streams(rpc.streamed(services.channels, services.each)),
    )

    async def noted(request: dispatcher_pb2.RecordStagesRequest) -> None:
        with status.translated():
            await services.dispatcher.RecordStages(request, metadata=await services.credentials())

    listener = _listen(settings.host, settings.port)
    port = listener.getsockname()[1]
    server = _server(settings, edge, services)
    tasks = lifecycle.Tasks()
    serving = tasks.spawn(server._serve([listener]), "serve")  # without uvicorn's own signal handlers
    tasks.spawn(trust.follow(known, services.auth, services.credentials), "trust")
    tasks.spawn(services.dispatchers.follow(), "replicas of the dispatcher")
    tasks.spawn(edge.tail.run(), "pump")
    tasks.spawn(refusals.run(), "refusals")
    tasks.spawn(present.run(manager.replaced), "presence")
    tasks.spawn(edge.stages.run(noted), "stages")
    try:
        while not server.started and not serving.done():
            await asyncio.wait((serving,), timeout=0.01)
        yield Service(port, server, edge)
    finally:
        await manager.drain(settings.drain_s)
        server.should_exit = True
        await asyncio.wait((serving,), timeout=settings.drain_s + 3)
        if server.server_state.tasks:
            # what uvicorn has cancelled at the end still lets go of what it holds
            await asyncio.wait(set(server.server_state.tasks), timeout=1)
        await tasks.close()
        await edge.stages.flush(noted)
        await refusals.close()
        await present.close()
        for store in (counted, leases, said):
            await store.close()
        await services.close()
