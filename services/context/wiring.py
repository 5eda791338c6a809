"""Builds the service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from chassis import audit, identity, log, migrations, postgres, tls
from chassis.lifecycle import Tasks
from chassis.server import Server
from chassis.trust import Trust, follow
from netra import errors
from netra.context.v1 import context_pb2, context_pb2_grpc
from services.context import artifacts, contexts, keys, slots, threads, uploads
from services.context.servicer import ContextServicer
from services.context.settings import ContextSettings
from services.context.store_artifacts import ArtifactStore
from services.context.store_contexts import ContextStore
from services.context.store_system import SystemStore
from services.context.store_threads import ThreadStore
from services.context.upstreams import Auth

_log = log.get(__name__)
_MIGRATIONS = Path(__file__).with_name("migrations")
_POLL_S = 0.25
_REPUBLISH_S = 10.0
_SWEEP_S = 60.0


@dataclass(frozen=True, slots=True)
class Service:
    """The running service."""

    server: Server
    trust: Trust

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self.server.port


@contextlib.asynccontextmanager
async def build(settings: ContextSettings) -> AsyncIterator[Service]:
    """Listen at once; SERVING when the schema is there, auth is followed and the signing key is known everywhere."""
    async with contextlib.AsyncExitStack() as stack:
        trust = Trust(settings.state_dir, settings.trust_stale_s)
        auth = Auth(settings.auth_target, settings.secret("service").get_secret_value(), tls.of(settings))
        stack.push_async_callback(auth.close)
        refusals = audit.Refusals(audit.to_auth(auth.stub, auth.credentials))
        stack.push_async_callback(refusals.close)
        wrap = settings.wrap("context.signing_keys")
        dsn = settings.postgres_dsn("netra_context", "postgres")
        users = await postgres.open_pool(dsn, "context")
        stack.push_async_callback(users.close)
        # of their own: files that move must not keep a run from starting
        files = await postgres.open_pool(dsn, "context-artifacts", size=4)
        stack.push_async_callback(files.close)
        system = await postgres.open_pool(settings.postgres_dsn("netra_context_system", "postgres_system"), "context-system", size=2)
        stack.push_async_callback(system.close)
        await migrations.awaited(users, "context", _MIGRATIONS)
        crossing = SystemStore(system)
        key = await keys.current(crossing, wrap)
        tasks = Tasks()
        stack.push_async_callback(tasks.close)
        tasks.spawn(follow(trust, auth.stub, auth.credentials), "trust")
        tasks.spawn(refusals.run(), "refusals")
        left_over = asyncio.Event()
        server = _server(settings, trust, users, _Files(ArtifactStore(files), tasks, left_over), key, refusals)
        await server.start()
        stack.push_async_callback(server.drain)
        tasks.spawn(_keep_published(server, trust, auth, key), "publish")
        tasks.spawn(_swept(crossing, left_over), "sweep")
        yield Service(server, trust)


@dataclass(frozen=True, slots=True)
class _Files:
    """What moving files needs."""

    store: ArtifactStore
    tasks: Tasks
    left_over: asyncio.Event


def _server(
    settings: ContextSettings, trust: Trust, users: postgres.DatabaseManager, files: _Files, key: keys.SigningKey, refusals: audit.Refusals
) -> Server:
    authenticator = identity.Authenticator(trust)
    server = Server(settings.host, settings.port, authenticator, settings.drain_s, tls.of(settings), refusals)
    moving = slots.Slots(settings.artifacts_moving, settings.artifacts_moving_per_user)
    limits = artifacts.Limits(settings.artifact_max_bytes, settings.artifacts_max_bytes_per_user, settings.artifact_stall_s)
    servicer = ContextServicer(
        authenticator.verifier,
        contexts.Contexts(ContextStore(users), key),
        threads.Threads(ThreadStore(users)),
        artifacts.Artifacts(files.store, moving, files.left_over.set),
        uploads.Uploads(files.store, limits, moving, files.left_over.set, files.tasks),
    )
    descriptor = context_pb2.DESCRIPTOR.services_by_name["ContextService"]
    server.add(descriptor, context_pb2_grpc.add_ContextServiceServicer_to_server, servicer)
    return server


async def _keep_published(server: Server, trust: Trust, auth: Auth, key: keys.SigningKey) -> None:
    # for ever: auth may be restored from a copy that does not have the key
    while True:
        while not (trust.ready and trust.key("context", key.kid)):
            try:
                await auth.publish(key.kid, key.public)
                await trust.awaited_key("context", key.kid)
            except errors.NetraError as error:
                _log.warning("the signing key could not be published yet", code=error.code)
            await asyncio.sleep(_POLL_S)
        await server.serving(True)
        await asyncio.sleep(_REPUBLISH_S)


async def _swept(system: SystemStore, left_over: asyncio.Event) -> None:
    """Remove what was given up: when told, and what dead processes left from time to time."""
    while True:
        try:
            await system.give_up_abandoned()
            while await system.remove_some():
                pass
        except errors.NetraError as error:
            _log.warning("left-over files could not be removed yet", code=error.code)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SWEEP_S):
                await left_over.wait()
        left_over.clear()
