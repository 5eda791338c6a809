"""Builds the service from its settings; the one place that names concrete classes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from chassis import identity, lifecycle, log, migrations, postgres, server, trust
from netra import errors
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from services.auth import clients, feed, keys, passwords, revocations, servicer, sessions, store, store_system, tokens, users
from services.auth.settings import AuthSettings

_log = log.get(__name__)
_MIGRATIONS = Path(__file__).parent / "migrations"
_POLL_S = 1.0
_SWEEP_S = 3600.0


@dataclass(frozen=True, slots=True)
class Service:
    """The running auth service."""

    port: int
    server: server.Server
    trust: trust.Trust
    keys: keys.Keys
    feed: feed.Feed


@contextlib.asynccontextmanager
async def build(settings: AuthSettings) -> AsyncIterator[Service]:
    """Start the service; it is serving when this yields. Raises `MissingSecret`, `OSError`, `ValueError` with what to do."""
    async with contextlib.AsyncExitStack() as stack:
        services = clients.Clients(settings.secrets_dir / "services.json")
        services.load()
        wrap = settings.wrap("auth.signing_keys")
        own, crossing = await asyncio.gather(
            _pool(settings, "netra_auth", "postgres"), _pool(settings, "netra_auth_system", "postgres_system")
        )
        stack.push_async_callback(own.close)
        stack.push_async_callback(crossing.close)
        await migrations.awaited(own, "auth", _MIGRATIONS)
        rows, system = store.Store(own), store_system.SystemStore(crossing)

        trusted = trust.Trust()
        signing = keys.Keys(rows, wrap, timedelta(days=settings.key_rotation_days))
        told = feed.Feed(trusted, signing, revocations.Revocations(system), settings.max_watchers)
        hashing = passwords.Passwords(settings.password_threads, settings.password_queue)
        stack.callback(hashing.close)
        people = users.Users(rows, system, hashing)
        await signing.prepare()
        await told.refresh()
        if settings.bootstrap_admin is not None:
            await people.bootstrap(settings.bootstrap_admin, settings.secret("bootstrap_admin").get_secret_value())

        authenticator = identity.Authenticator(trusted)
        issue = tokens.Tokens(signing, authenticator.verifier, settings.access_token_s, settings.service_token_s)
        signed_in = sessions.Sessions(rows, system, hashing, issue, told, _lifetimes(settings))
        listening = server.Server(settings.host, settings.port, authenticator, settings.drain_s)
        listening.add(
            auth_pb2.DESCRIPTOR.services_by_name["AuthService"],
            auth_pb2_grpc.add_AuthServiceServicer_to_server,
            servicer.AuthServicer(signed_in, people, services, issue, signing, told),
        )
        tasks = lifecycle.Tasks()
        stack.push_async_callback(tasks.close)
        stack.push_async_callback(listening.drain)
        # only now: before its keys were known it would call good tokens bad
        await listening.start()
        tasks.spawn(_follow(told, signing, system), "auth-follow")
        tasks.spawn(_end_streams(listening, told), "auth-end-streams")
        await listening.serving(True)
        yield Service(listening.port, listening, trusted, signing, told)


def _lifetimes(settings: AuthSettings) -> sessions.Lifetimes:
    return sessions.Lifetimes(timedelta(days=settings.refresh_idle_days), timedelta(days=settings.session_days))


async def _pool(settings: AuthSettings, role: str, secret: str) -> postgres.DatabaseManager:
    return await postgres.open_pool(settings.postgres_dsn(role, secret), role)


async def _follow(told: feed.Feed, signing: keys.Keys, system: store_system.SystemStore) -> None:
    """Notice what other replicas did, rotate keys when it is time, clean up."""
    swept_at = time.monotonic()
    while True:
        await asyncio.sleep(_POLL_S)
        try:
            await signing.rotate_if_due()
            await told.refresh()
            if time.monotonic() - swept_at > _SWEEP_S:
                await system.sweep()
                swept_at = time.monotonic()
        except errors.NetraError as error:
            _log.warning("the database could not be asked what changed", code=error.code)


async def _end_streams(listening: server.Server, told: feed.Feed) -> None:
    await listening.draining.wait()
    told.close()
