"""Builds the service from its settings; the one place that names concrete classes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from chassis import audit as audit_
from chassis import identity, lifecycle, limits, log, migrations, postgres, server, streams, tls, trust
from netra import errors
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from services.auth import (
    api_keys,
    audit,
    clients,
    exchange,
    feed,
    keys,
    opaque,
    outside,
    passwords,
    policy,
    providers,
    resets,
    revocations,
    servicer,
    servicer_outside,
    servicer_policy,
    servicer_users,
    sessions,
    store,
    store_audit,
    store_keys,
    store_outside,
    store_outside_system,
    store_policy,
    store_system,
    store_users,
    throttle,
    tokens,
    users,
)  # fmt: skip
from services.auth.settings import AuthSettings

_log = log.get(__name__)
_MIGRATIONS = Path(__file__).parent / "migrations"
_POLL_S = 0.25
# attempts to sign in elsewhere lie there for ten minutes
_SWEEP_S = 600.0
_CHANGED = "changed"


@dataclass(frozen=True, slots=True)
class Service:
    """The running auth service."""

    port: int
    server: server.Server
    trust: trust.Trust
    keys: keys.Keys
    feed: feed.Feed


@dataclass(frozen=True, slots=True)
class _Stores:
    """What is kept, by area, over the two roles."""

    rows: store.Store
    people: store_users.UserStore
    keys: store_keys.KeyStore
    policies: store_policy.PolicyStore
    own_api_keys: store_outside.KeyStore
    system: store_system.SystemStore
    outside: store_outside_system.OutsideStore
    audit: store_audit.AuditStore


class AuthServicer(servicer.SignInServicer, servicer_users.UsersServicer, servicer_policy.PolicyServicer, servicer_outside.OutsideServicer):
    """All of AuthService: each part is named for its area."""

    def __init__(self, **parts: object) -> None:
        for name, part in parts.items():
            setattr(self, f"_{name}", part)


@contextlib.asynccontextmanager
async def build(settings: AuthSettings) -> AsyncIterator[Service]:
    """Start the service; it is serving when this yields. Raises `MissingSecret`, `OSError`, `ValueError` with what to do."""
    async with contextlib.AsyncExitStack() as stack:
        services = clients.Clients(settings.secrets_dir / "services.json")
        services.load()
        known_providers = providers.load(settings.oidc_providers or settings.secrets_dir / "oidc.json")
        wrap, family = settings.wrap("auth.signing_keys"), opaque.Family(settings.derived_key("auth.refresh_tokens"))
        kept = await _stores(settings, stack)
        tasks = lifecycle.Tasks()
        signals = streams.Streams(settings.valkey_dsn("auth"), "auth", settings.valkey_namespace)
        stack.push_async_callback(signals.close)
        stack.push_async_callback(tasks.close)
        counted = limits.Limits(settings.valkey_dsn("auth"), "auth", settings.valkey_namespace)
        stack.push_async_callback(counted.close)

        trusted = trust.Trust(stale_s=settings.trust_stale_s)
        signing, policies = keys.Keys(kept.keys, wrap, timedelta(days=settings.key_rotation_days)), policy.Policies(kept.policies)
        withdrawn = revocations.Revocations(kept.system)
        told = feed.Feed(trusted, signing, policies, withdrawn, settings.max_watchers, _waker(tasks, signals))
        stack.push_async_callback(told.stop)
        hashing = passwords.Passwords(settings.password_threads, settings.password_queue)
        stack.callback(hashing.close)
        people = users.Users(kept.people, kept.system, hashing, trusted, told)
        await signing.prepare()
        await policies.prepare()
        await told.refresh()
        if settings.bootstrap_admin is not None:
            await people.bootstrap(settings.bootstrap_admin, settings.secret("bootstrap_admin").get_secret_value())

        authenticator = identity.Authenticator(trusted)
        issue = tokens.Tokens(signing, authenticator.verifier, settings.access_token_s, settings.service_token_s)
        slowed = throttle.Throttle(counted, throttle.Rates(settings.calls_per_address, settings.successes_per_account))
        signed_in = sessions.Sessions(
            kept.rows, kept.system, hashing, issue, family, told, slowed, trusted, _lifetimes(settings)
        )  # fmt: skip
        elsewhere = outside.Outside(known_providers, kept.outside, signed_in, kept.people)
        stack.push_async_callback(elsewhere.close)
        record = audit.Record(kept.audit)
        refusals = audit_.Refusals(servicer_policy.told_to(record))
        stack.push_async_callback(refusals.close)
        listening = server.Server(settings.host, settings.port, authenticator, settings.drain_s, tls.of(settings), refusals)
        whole = AuthServicer(
            sessions=signed_in, users=people, clients=services, throttle=slowed, tokens=issue, trust=trusted, keys=signing, feed=told,
            resets=resets.Resets(kept.rows, kept.system, hashing, told, slowed), policies=policies, record=record, refusals=refusals,
            api_keys=api_keys.ApiKeys(kept.own_api_keys, kept.outside, issue, told, trusted, slowed), outside=elsewhere,
            exchange=exchange.Exchange(services, authenticator.verifier, issue, trusted, kept.outside, slowed),
        )  # fmt: skip
        descriptor = auth_pb2.DESCRIPTOR.services_by_name["AuthService"]
        listening.add(descriptor, auth_pb2_grpc.add_AuthServiceServicer_to_server, whole)
        stack.push_async_callback(tasks.close)
        stack.push_async_callback(listening.drain)
        # only now: before its keys were known it would call good tokens bad
        await listening.start()
        woken = asyncio.Event()
        tasks.spawn(_follow(told, signing, woken), "auth-follow")
        tasks.spawn(_sweep(kept.system), "auth-sweep")
        tasks.spawn(_listen(signals, woken), "auth-listen")
        tasks.spawn(refusals.run(), "refusals")
        tasks.spawn(_end_streams(listening, told), "auth-end-streams")
        await listening.serving(True)
        yield Service(listening.port, listening, trusted, signing, told)


async def _stores(settings: AuthSettings, stack: contextlib.AsyncExitStack) -> _Stores:
    own, crossing = await asyncio.gather(_pool(settings, "netra_auth", "postgres"), _pool(settings, "netra_auth_system", "postgres_system"))
    stack.push_async_callback(own.close)
    stack.push_async_callback(crossing.close)
    await migrations.awaited(own, "auth", _MIGRATIONS)
    return _Stores(
        store.Store(own), store_users.UserStore(own), store_keys.KeyStore(own), store_policy.PolicyStore(own),
        store_outside.KeyStore(own), store_system.SystemStore(crossing), store_outside_system.OutsideStore(crossing),
        store_audit.AuditStore(crossing),
    )  # fmt: skip


def _lifetimes(settings: AuthSettings) -> sessions.Lifetimes:
    return sessions.Lifetimes(
        timedelta(hours=settings.session_idle_hours), timedelta(hours=settings.session_hours), timedelta(days=settings.session_cli_days),
        settings.sessions_per_user,
    )  # fmt: skip


async def _pool(settings: AuthSettings, role: str, secret: str) -> postgres.DatabaseManager:
    return await postgres.open_pool(settings.postgres_dsn(role, secret), role, size=settings.postgres_pool)


def _waker(tasks: lifecycle.Tasks, signals: streams.Streams) -> Callable[[], object]:
    async def publish() -> None:
        try:
            await signals.publish(_CHANGED, "")
        except errors.Unavailable:
            _log.warning("the other replicas were not woken; they look by themselves")

    return lambda: tasks.spawn(publish(), "auth-wake-others")


async def _listen(signals: streams.Streams, woken: asyncio.Event) -> None:
    async for _ in signals.listen(_CHANGED):
        woken.set()


async def _follow(told: feed.Feed, signing: keys.Keys, woken: asyncio.Event) -> None:
    """Notice what other replicas did, rotate keys when it is time."""
    while True:
        with contextlib.suppress(TimeoutError):
            # not `wait_for`: Python 3.11's can lose a cancel that comes with what it waits for
            async with asyncio.timeout(_POLL_S):
                await woken.wait()
        woken.clear()
        try:
            await signing.rotate_if_due()
            await told.refresh()
        except errors.NetraError as error:
            _log.warning("the database could not be asked what changed", code=error.code)


async def _sweep(system: store_system.SystemStore) -> None:
    """Clean up, now and from time to time. What could not be done is done the next time."""
    while True:
        try:
            await system.sweep()
        except errors.NetraError as error:
            _log.warning("what is over could not be deleted", code=error.code)
        await asyncio.sleep(_SWEEP_S)


async def _end_streams(listening: server.Server, told: feed.Feed) -> None:
    await listening.draining.wait()
    told.close()
