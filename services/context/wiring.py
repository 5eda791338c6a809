"""Builds the service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType

from chassis import audit, identity, log, migrations, postgres, tls
from chassis.lifecycle import Tasks
from chassis.server import Server
from chassis.trust import Trust, follow
from netra import errors
from netra.context.v1 import context_pb2, context_pb2_grpc
from services.context import artifacts, contexts, expiry, keys, oversight, privacy, sharing, slots, threads, uploads
from services.context.servicer import ContextServicer
from services.context.settings import ContextSettings
from services.context.store_artifacts import ArtifactStore
from services.context.store_contexts import ContextStore
from services.context.store_left_over_system import LeftOverStore
from services.context.store_privacy import PrivacyStore
from services.context.store_sharing import SharingStore
from services.context.store_system import SystemStore
from services.context.store_threads import ThreadStore
from services.context.upstreams import Auth

_log = log.get(__name__)
_MIGRATIONS = Path(__file__).with_name("migrations")
_POLL_S = 0.25
_REPUBLISH_S = 10.0
_SWEEP_S = 60.0
# between two sweeps: who gives up a lot does not keep the database busy
_PAUSE_S = 1.0
# whoever holds a lock longer than that is in trouble, or erases a lot: who waits is told to try again, while their call has time left
_PATIENCE: Mapping[str, str] = MappingProxyType({"lock_timeout": "5s"})
_USERS: Mapping[str, str] = MappingProxyType({**postgres.BY_KEY, **_PATIENCE})
# an estimate of a page's cost must not have its statement compiled
_FILES: Mapping[str, str] = MappingProxyType({**postgres.BY_KEY, "jit": "off"})


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
        told = audit.to_auth(auth.stub, auth.credentials)
        refusals = audit.Refusals(told)
        stack.push_async_callback(refusals.close)
        wrap = settings.wrap("context.signing_keys")
        dsn = settings.postgres_dsn("netra_context", "postgres")
        users = await postgres.open_pool(dsn, "context", size=settings.postgres_pool, options=_USERS)
        stack.push_async_callback(users.close)
        # of their own: files that move must not keep a run from starting
        files = await postgres.open_pool(dsn, "context-artifacts", size=4, options=_FILES)
        stack.push_async_callback(files.close)
        system_dsn = settings.postgres_dsn("netra_context_system", "postgres_system")
        system = await postgres.open_pool(system_dsn, "context-system", size=2, options=_PATIENCE)
        stack.push_async_callback(system.close)
        # of its own: what is withdrawn for reasons of security must not wait for what is read or removed
        ending = await postgres.open_pool(system_dsn, "context-ending", size=2)
        stack.push_async_callback(ending.close)
        removing = await postgres.open_pool(system_dsn, "context-removing", size=2, options=_FILES)
        stack.push_async_callback(removing.close)
        await migrations.awaited(users, "context", _MIGRATIONS)
        crossing = SystemStore(system)
        key = await keys.current(crossing, wrap)
        tasks = Tasks()
        stack.push_async_callback(tasks.close)
        ends = expiry.Expiry(
            SystemStore(ending), timedelta(days=settings.context_keep_days), timedelta(days=settings.context_audit_keep_days)
        )
        # before anything is heard of: what was withdrawn while nobody ran here is told again
        trust.on_revocation(ends.revoked)
        tasks.spawn(follow(trust, auth.stub, auth.credentials), "trust")
        tasks.spawn(refusals.run(), "refusals")
        left_over = asyncio.Event()
        removal = privacy.Removal(LeftOverStore(removing), timedelta(days=settings.thread_keep_days))
        stores = _Stores(ContextStore(users), ThreadStore(users), SharingStore(users), PrivacyStore(users), ArtifactStore(files), crossing)
        tasks.spawn(stores.contexts.open_gathered(), "openings")
        server = _server(settings, trust, auth, stores, _Background(tasks, left_over, removal), key, _Record(refusals, audit.Acts(told)))
        await server.start()
        stack.push_async_callback(server.drain)
        tasks.spawn(_keep_published(server, trust, auth, key), "publish")
        tasks.spawn(_swept(removal, left_over), "sweep")
        tasks.spawn(ends.run(), "expiry")
        yield Service(server, trust)


@dataclass(frozen=True, slots=True)
class _Stores:
    """Where things are kept."""

    contexts: ContextStore
    threads: ThreadStore
    sharing: SharingStore
    privacy: PrivacyStore
    artifacts: ArtifactStore
    system: SystemStore


@dataclass(frozen=True, slots=True)
class _Background:
    """Who goes on when a call is over: the owner of tasks, the word that something was given up, and who removes it."""

    tasks: Tasks
    left_over: asyncio.Event
    removal: privacy.Removal


@dataclass(frozen=True, slots=True)
class _Record:
    """What auth is told: what was refused, and what is done on somebody's behalf."""

    refusals: audit.Refusals
    acts: audit.Acts


def _server(
    settings: ContextSettings, trust: Trust, auth: Auth, stores: _Stores, background: _Background, key: keys.SigningKey, record: _Record
) -> Server:
    authenticator = identity.Authenticator(trust)
    server = Server(settings.host, settings.port, authenticator, settings.drain_s, tls.of(settings), record.refusals)
    moving = slots.Slots(settings.artifacts_moving, settings.artifacts_moving_per_user)
    limits = artifacts.Limits(
        settings.artifact_max_bytes, settings.artifacts_max_bytes_per_user, settings.artifacts_max_per_user, settings.artifact_stall_s,
        trust.limits,
    )  # fmt: skip
    servicer = ContextServicer(
        authenticator.verifier,
        contexts.Contexts(stores.contexts, key, authenticator.verifier),
        oversight.Oversight(stores.contexts, stores.system, trust, record.acts),
        threads.Threads(stores.threads, timedelta(days=settings.thread_keep_days)),
        sharing.Sharing(stores.sharing, auth, key, settings.grant_token_s),
        privacy.Privacy(stores.privacy, background.removal, background.left_over.set),
        artifacts.Artifacts(stores.artifacts, limits, moving, background.left_over.set),
        uploads.Uploads(stores.artifacts, limits, moving, background.left_over.set, background.tasks),
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


async def _swept(removal: privacy.Removal, left_over: asyncio.Event) -> None:
    """Remove what was given up: when told, and what dead processes left from time to time."""
    while True:
        try:
            await removal.sweep()
        except errors.NetraError as error:
            _log.warning("what was given up could not be removed yet", code=error.code)
        await asyncio.sleep(_PAUSE_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_SWEEP_S):
                await left_over.wait()
        left_over.clear()
