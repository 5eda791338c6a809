"""Builds the service from its settings; the one place that names concrete classes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from chassis import audit, channel, identity, lifecycle, migrations, postgres, server, streams, tls, trust
from netra.events.v1 import events_pb2, events_pb2_grpc
from services.events import (
    announce,
    commit,
    erasure,
    exports,
    fanout,
    follow,
    intake,
    memory,
    paces,
    reach,
    servicer,
    store,
    store_retention,
    store_system,
    store_threads,
    sweep,
    tail,
    transients,
    upstreams,
)
from services.events.settings import EventsSettings

_POOL = 16
# the rest is for whoever is live and has missed something, for those who read threads, and two for runs that begin
_PAGES_AT_ONCE = _POOL - fanout.CATCH_UPS - follow.AT_ONCE - follow.PAGES_AT_ONCE - 2
_MIGRATIONS = Path(__file__).parent / "migrations"


@dataclass(frozen=True, slots=True)
class Service:
    """The running events service."""

    port: int
    server: server.Server
    trust: trust.Trust
    live: fanout.Fanout


@contextlib.asynccontextmanager
async def build(settings: EventsSettings) -> AsyncIterator[Service]:
    """Start the service; it listens when this yields and is serving once schema and trust are there."""
    async with contextlib.AsyncExitStack() as stack:
        secret, size = settings.secret("service").get_secret_value(), max(settings.postgres_pool, _POOL)
        own, crossing = await asyncio.gather(
            postgres.open_pool(settings.postgres_dsn("netra_events", "postgres"), "netra_events", size=size, options=store.OPTIONS),
            postgres.open_pool(
                settings.postgres_dsn("netra_events_system", "postgres_system"), "netra_events_system", size=4, options=store_system.OPTIONS
            ),
        )
        stack.push_async_callback(own.close)
        stack.push_async_callback(crossing.close)
        valkey = streams.Streams(settings.valkey_dsn("events"), "events", settings.valkey_namespace)
        stack.push_async_callback(valkey.close)
        auth = upstreams.Auth(settings.auth_target, tls.of(settings))
        stack.push_async_callback(auth.close)
        credentials = channel.ServiceCredentials("events", secret, auth.stub)
        told = audit.to_auth(auth.stub, credentials)
        refusals = audit.Refusals(told)
        stack.push_async_callback(refusals.close)
        tasks = lifecycle.Tasks()
        stack.push_async_callback(tasks.close)

        trusted = trust.Trust(settings.state_dir, settings.trust_stale_s)
        authenticator = identity.Authenticator(trusted)
        known = memory.Memory()
        record, cursors = store.Record(own, known), store_system.Cursors(crossing)
        pages = paces.Pages(record, _PAGES_AT_ONCE)
        announcer = announce.Announcer(valkey, settings.events_stream_entries)
        passing = transients.Transients(announcer)
        committer = commit.Committer(store_system.Writer(crossing, known, record.open), announcer, passing.committed)
        threads = follow.Threads(store_threads.Threads(own), cursors, settings.events_follows_per_user)
        live = fanout.Fanout(valkey, record, cursors, tasks, settings.events_compare_s, settings.events_poll_s, threads)
        appends = intake.Intake(committer, authenticator.verifier, tasks, passing.show)
        tails = tail.Tail(live, record, pages, authenticator.verifier, tasks, settings.events_unknown_run_s)
        trusted.on_revocation(tails.revoked)
        erasures = erasure.Erasures(store_retention.Erasures(own))
        old = sweep.Sweep(
            store_retention.Retention(crossing), erasures, lambda tier: trusted.limits(tier).retention_days, sorted(identity.TIERS),
            settings.events_retention_grace_h,
        )  # fmt: skip
        whole = servicer.Whole(
            exports.Exports(pages, settings.events_export_at_once), erasures,
            reach.Reach(record, trusted, audit.Acts(told)),
        )  # fmt: skip

        listening = server.Server(settings.host, settings.port, authenticator, settings.drain_s, tls.of(settings), refusals)
        listening.add(
            events_pb2.DESCRIPTOR.services_by_name["EventsService"],
            events_pb2_grpc.add_EventsServiceServicer_to_server,
            servicer.EventsServicer(record, pages, appends, tails, live, authenticator.verifier, whole, passing.opened, threads),
        )
        await listening.start()
        stack.push_async_callback(listening.drain)
        tasks.spawn(refusals.run(), "refusals")
        tasks.spawn(trust.follow(trusted, auth.stub, credentials), "trust")
        tasks.spawn(committer.run(), "commit")
        tasks.spawn(announcer.run(), "announce")
        tasks.spawn(announcer.trim(), "announce-trim")
        tasks.spawn(_serve(listening, own, trusted, live, old, settings.events_sweep_s), "events-serve")
        tasks.spawn(_end_streams(listening, appends, tails, threads), "events-end-streams")
        yield Service(listening.port, listening, trusted, live)


async def _serve(
    listening: server.Server, database: postgres.DatabaseManager, trusted: trust.Trust, live: fanout.Fanout, old: sweep.Sweep,
    sweep_s: float,
) -> None:  # fmt: skip
    """Serve once everything is there; then keep the live tail going."""
    await migrations.awaited(database, "events", _MIGRATIONS)
    await trusted.awaited()
    await listening.serving(True)
    async with asyncio.TaskGroup() as group:
        group.create_task(live.run())
        group.create_task(live.watch(lambda heard: listening.part("netra.live", heard)))
        group.create_task(old.run(sweep_s))


async def _end_streams(listening: server.Server, appends: intake.Intake, tails: tail.Tail, threads: follow.Threads) -> None:
    await listening.draining.wait()
    appends.close()
    tails.close()
    threads.close()
