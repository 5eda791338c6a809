"""Builds the service from its settings; the one place that names concrete classes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from chassis import audit, channel, identity, lifecycle, migrations, postgres, server, streams, tls, trust
from netra.events.v1 import events_pb2, events_pb2_grpc
from services.events import announce, commit, fanout, intake, servicer, store, store_system, tail, upstreams
from services.events.settings import EventsSettings

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
        secret = settings.secret("service").get_secret_value()
        own, crossing = await asyncio.gather(
            postgres.open_pool(settings.postgres_dsn("netra_events", "postgres"), "netra_events"),
            postgres.open_pool(settings.postgres_dsn("netra_events_system", "postgres_system"), "netra_events_system", size=4),
        )
        stack.push_async_callback(own.close)
        stack.push_async_callback(crossing.close)
        valkey = streams.Streams(settings.valkey_dsn("events"), "events", settings.valkey_namespace)
        stack.push_async_callback(valkey.close)
        auth = upstreams.Auth(settings.auth_target, tls.of(settings))
        stack.push_async_callback(auth.close)
        credentials = channel.ServiceCredentials("events", secret, auth.stub)
        refusals = audit.Refusals(audit.to_auth(auth.stub, credentials))
        stack.push_async_callback(refusals.close)
        tasks = lifecycle.Tasks()
        stack.push_async_callback(tasks.close)

        trusted = trust.Trust(settings.state_dir, settings.trust_stale_s)
        authenticator = identity.Authenticator(trusted)
        record, cursors = store.Record(own), store_system.Cursors(crossing)
        announcer = announce.Announcer(valkey, settings.events_stream_entries)
        committer = commit.Committer(store_system.Writer(crossing), announcer)
        live = fanout.Fanout(valkey, record, cursors, tasks, settings.events_compare_s, settings.events_poll_s)
        appends = intake.Intake(committer, tasks)
        tails = tail.Tail(live, record, authenticator.verifier, tasks, settings.events_unknown_run_s)
        trusted.on_revocation(tails.revoked)

        listening = server.Server(settings.host, settings.port, authenticator, settings.drain_s, tls.of(settings), refusals)
        listening.add(
            events_pb2.DESCRIPTOR.services_by_name["EventsService"],
            events_pb2_grpc.add_EventsServiceServicer_to_server,
            servicer.EventsServicer(record, appends, tails, live, authenticator.verifier),
        )
        await listening.start()
        stack.push_async_callback(listening.drain)
        tasks.spawn(refusals.run(), "refusals")
        tasks.spawn(trust.follow(trusted, auth.stub, credentials), "trust")
        tasks.spawn(committer.run(), "commit")
        tasks.spawn(announcer.run(), "announce")
        tasks.spawn(_serve(listening, own, trusted, live), "events-serve")
        tasks.spawn(_end_streams(listening, appends, tails), "events-end-streams")
        yield Service(listening.port, listening, trusted, live)


async def _serve(
    listening: server.Server, database: postgres.DatabaseManager, trusted: trust.Trust, live: fanout.Fanout
) -> None:  # fmt: skip
    """Serve once everything is there; then keep the live tail going."""
    await migrations.awaited(database, "events", _MIGRATIONS)
    await trusted.awaited()
    await listening.serving(True)
    async with asyncio.TaskGroup() as group:
        group.create_task(live.run())
        group.create_task(live.watch())


async def _end_streams(listening: server.Server, appends: intake.Intake, tails: tail.Tail) -> None:
    await listening.draining.wait()
    appends.close()
    tails.close()
