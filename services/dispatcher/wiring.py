"""Builds the service."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

from chassis import audit, channel, identity, lifecycle, limits, migrations, postgres, replicas, server, streams, tls, trust
from netra.agent import AgentSpec
from netra.auth.v1 import auth_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from netra.tool import ToolSpec
from services.dispatcher import admission, appender, engine, entitlements, servicer, store, store_system, supervisor, upstreams
from services.dispatcher.agents import registry as agents_
from services.dispatcher.settings import DispatcherSettings
from services.dispatcher.tools import registry as tools_
from services.dispatcher.tools import workspace

_MIGRATIONS = Path(__file__).parent / "migrations"
_DESCRIPTOR = dispatcher_pb2.DESCRIPTOR.services_by_name["DispatcherService"]


@dataclass(frozen=True, slots=True)
class Service:
    """The running dispatcher."""

    server: server.Server
    trust: trust.Trust

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.server.port


@contextlib.asynccontextmanager
async def build(
    settings: DispatcherSettings, *, agents: Iterable[AgentSpec] = (), tools: Iterable[ToolSpec] = ()
) -> AsyncIterator[Service]:
    """Run the dispatcher for the time of the block; `agents` and `tools` come on top of the built-in and installed ones."""
    async with contextlib.AsyncExitStack() as stack:
        known_agents = agents_.AgentRegistry([*agents_.built_in(), *agents_.installed(), *agents])
        known_tools = tools_.ToolRegistry([*tools_.built_in(), *tools_.installed(), *tools])
        tasks = lifecycle.Tasks()
        trusted = trust.Trust(settings.state_dir, settings.trust_stale_s)
        certificates = tls.of(settings)

        to_auth = channel.connect(settings.auth_target, certificates=certificates, name="auth")
        auth: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(to_auth)
        authorized = channel.ServiceCredentials("dispatcher", settings.secret("service").get_secret_value(), auth)
        refusals = audit.Refusals(audit.to_auth(auth, authorized))
        stack.push_async_callback(refusals.close)
        authenticator = identity.Authenticator(trusted)
        listening = server.Server(settings.host, settings.port, authenticator, settings.drain_s, certificates, refusals)
        contexts = upstreams.Contexts(channel.connect(settings.context_target, authorized, certificates=certificates, name="context"))
        files = upstreams.Artifacts(channel.connect(settings.context_target, authorized, certificates=certificates, name="context"))
        replicated = replicas.Replicas(settings.events_target)
        records = upstreams.Records(
            replicated, lambda target: channel.connect(target, authorized, certificates=certificates, name="events")
        )
        spaces = await asyncio.to_thread(workspace.Workspaces, settings.workspaces(), files, settings.tool_processes)
        stack.push_async_callback(asyncio.to_thread, spaces.close)
        signals = streams.Streams(settings.valkey_dsn("dispatcher"), "dispatcher", settings.valkey_namespace)
        stack.push_async_callback(signals.close)
        counted = limits.Limits(settings.valkey_dsn("dispatcher"), "dispatcher", settings.valkey_namespace)
        stack.push_async_callback(counted.close)
        entitled = entitlements.Entitlements(trusted, counted, refusals, settings)
        dsn, size = settings.postgres_dsn("netra_dispatcher", "postgres"), settings.postgres_pool
        mine = await postgres.open_pool(dsn, "dispatcher", size=size, options=postgres.BY_KEY)
        stack.push_async_callback(mine.close)
        everyone = await postgres.open_pool(settings.postgres_dsn("netra_dispatcher_system", "postgres_system"), "dispatcher system")
        stack.push_async_callback(everyone.close)

        users, all_runs, appends = store.Store(mine), store_system.SystemStore(everyone), appender.Appender(records)
        executing = engine.ExecutionEngine(contexts, records, appends, all_runs, known_agents, known_tools, entitled, spaces)
        accepted = admission.Admission(contexts, users, entitled, settings)
        overseer = supervisor.Supervisor(accepted, executing, users, all_runs, contexts, signals, known_agents, entitled, trusted, settings)
        trusted.on_revocation(overseer.revoked)
        trusted.on_rights(overseer.narrowed)
        listening.add(
            _DESCRIPTOR,
            dispatcher_pb2_grpc.add_DispatcherServiceServicer_to_server,
            servicer.Dispatcher(overseer, users, all_runs, known_agents, known_tools, entitled, authenticator.verifier, settings),
        )
        await listening.start()
        stack.push_async_callback(tasks.close)
        stack.push_async_callback(overseer.close)
        stack.push_async_callback(listening.drain)
        tasks.spawn(trust.follow(trusted, auth, authorized), name="trust")
        tasks.spawn(refusals.run(), name="refusals")
        tasks.spawn(replicated.follow(), name="replicas of events")
        tasks.spawn(appends.run(), name="append streams")
        tasks.spawn(appends.watch(lambda reachable: listening.part("netra.record", reachable)), name="health of the record")
        tasks.spawn(_serve(mine, trusted, listening, tasks, overseer), name="serving")
        yield Service(listening, trusted)


async def _serve(
    database: postgres.DatabaseManager, trusted: trust.Trust, listening: server.Server, tasks: lifecycle.Tasks,
    overseer: supervisor.Supervisor,
) -> None:  # fmt: skip
    await migrations.awaited(database, "dispatcher", _MIGRATIONS)
    await trusted.awaited()
    tasks.spawn(overseer.run(), name="supervisor")
    await listening.serving(True)
