"""Builds the service."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import grpc

from chassis import audit, channel, identity, lifecycle, limits, migrations, postgres, replicas, server, streams, tls, trust
from chassis.settings import MissingSecret
from netra.agent import AgentSpec
from netra.auth.v1 import auth_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from netra.tool import Tier, ToolSpec
from services.dispatcher import (
    admission,
    appender,
    engine,
    entitlements,
    erasure,
    executions,
    exports,
    servicer,
    servicer_privacy,
    store,
    store_erasure,
    store_old_system,
    store_system,
    store_tools,
    store_waits,
    supervisor,
    upstreams,
    waits,
)
from services.dispatcher.agents import registry as agents_
from services.dispatcher.settings import DispatcherSettings
from services.dispatcher.tools import dispatch, means, registrations, workspace
from services.dispatcher.tools import registry as tools_
from services.dispatcher.tools.sandbox import allowances, command, guardian, python, remote, sandboxes, script, tiers, workers

_MIGRATIONS = Path(__file__).parent / "migrations"
# a process that stands still in a transaction must not hold the rows of runs from those that take them over
_PROMPT: Mapping[str, str] = MappingProxyType({"idle_in_transaction_session_timeout": "2s"})
_DESCRIPTOR = dispatcher_pb2.DESCRIPTOR.services_by_name["DispatcherService"]


@dataclass(frozen=True, slots=True)
class Service:
    """The running dispatcher."""

    server: server.Server
    trust: trust.Trust
    # what executes here, as it is looked at from inside
    agents: agents_.AgentRegistry
    executions: executions.Executions
    dispatchers: dispatch.Dispatchers

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
        known_agents = agents_.AgentRegistry(
            [*agents_.built_in(), *agents_.installed(), *agents],
            agents_per_user=settings.agents_per_user,
            session_age_s=settings.session_age_s,
        )
        declared = [*tools_.built_in(), *tools_.installed(), *tools]
        known_tools = tools_.ToolRegistry(declared)
        spaces = await asyncio.to_thread(workspace.Workspaces, settings.workspaces(), workspace.NoArtifacts(), settings.tool_processes)
        stack.push_async_callback(asyncio.to_thread, spaces.close)
        # before there is anything of gRPC: what is started here must not be a copy of a process with its threads
        contained = _sandboxes(settings, declared, spaces.folder)
        stack.push_async_callback(contained.close)
        await contained.start()
        tasks = lifecycle.Tasks()
        trusted = trust.Trust(settings.state_dir, settings.trust_stale_s)
        others = _Others.of(settings)
        spaces.artifacts = others.artifacts
        refusals = audit.Refusals(audit.to_auth(others.auth, others.authorized))
        stack.push_async_callback(refusals.close)
        authenticator = identity.Authenticator(trusted)
        listening = server.Server(settings.host, settings.port, authenticator, settings.drain_s, tls.of(settings), refusals)
        signals, counted, mine, everyone = await _stores(settings, stack)
        entitled = entitlements.Entitlements(trusted, counted, refusals, settings)

        users, all_runs, appends = store.Store(mine), store_system.SystemStore(everyone), appender.Appender(others.records)
        stack.push_async_callback(users.close)
        stack.push_async_callback(all_runs.close)
        registered = registrations.Registrations(store_tools.ToolStore(everyone), known_tools)
        dispatchers = dispatch.Dispatchers(known_tools, contained, _rules(settings), functools.partial(_granted, settings))
        stack.push_async_callback(dispatchers.close)
        executed = executions.Executions(known_agents, silent_s=settings.agent_silent_s, history=settings.engine_history)
        outside = waits.Waits(store_waits.SystemWaits(everyone))
        executing = engine.ExecutionEngine(
            others.contexts, others.records, appends, all_runs, known_agents, dispatchers, entitled, spaces, outside, settings, executed
        )
        whole, old = _kept(mine, everyone, trusted)
        accepted = admission.Admission(others.contexts, users, entitled, settings)
        overseer = supervisor.Supervisor(
            accepted, executing, users, all_runs, others.contexts, signals, known_agents, entitled, trusted, settings
        )
        trusted.on_revocation(overseer.revoked)
        trusted.on_rights(overseer.narrowed)
        listening.add(
            _DESCRIPTOR,
            dispatcher_pb2_grpc.add_DispatcherServiceServicer_to_server,
            servicer.Dispatcher(
                overseer,
                users,
                all_runs,
                known_agents,
                known_tools,
                registered,
                entitled,
                refusals,
                authenticator.verifier,
                settings,
                whole,
            ),
        )
        await listening.start()
        stack.push_async_callback(tasks.close)
        stack.push_async_callback(overseer.close)
        stack.push_async_callback(listening.drain)
        tasks.spawn(trust.follow(trusted, others.auth, others.authorized), name="trust")
        tasks.spawn(refusals.run(), name="refusals")
        tasks.spawn(others.records.replicas.follow(), name="replicas of events")
        tasks.spawn(appends.run(), name="append streams")
        tasks.spawn(appends.watch(lambda reachable: listening.part("netra.record", reachable)), name="health of the record")
        tasks.spawn(executed.watch(lambda heard: listening.part("netra.agents", heard)), name="heartbeats of agents")
        tasks.spawn(
            contained.probe(lambda found: listening.part(f"netra.sandbox.{found.tier}", found.available)), name="probes of the sandboxes"
        )
        tasks.spawn(_serve(mine, trusted, listening, tasks, overseer, registered, lambda: old.run(settings.runs_sweep_s)), name="serving")
        yield Service(listening, trusted, known_agents, executed, dispatchers)


def _kept(
    mine: postgres.DatabaseManager, everyone: postgres.DatabaseManager, trusted: trust.Trust
) -> tuple[servicer_privacy.Whole, erasure.Sweep]:
    """What is done with all that is kept of a user's runs, and the sweep of what is old."""
    of_users = store_erasure.ErasureStore(mine)
    whole = servicer_privacy.Whole(erasure.Erasures(of_users), exports.Exports(of_users))
    old = store_old_system.OldRuns(everyone)
    return whole, erasure.Sweep(old, whole.erasures, lambda tier: trusted.limits(tier).retention_days, sorted(identity.TIERS))


@dataclass(frozen=True, slots=True)
class _Others:
    """The services that this one calls, in its own name."""

    auth: auth_pb2_grpc.AuthServiceAsyncStub
    authorized: channel.ServiceCredentials
    contexts: upstreams.Contexts
    artifacts: upstreams.Artifacts
    records: upstreams.Records

    @classmethod
    def of(cls, settings: DispatcherSettings) -> Self:
        certificates = tls.of(settings)
        auth: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(
            channel.connect(settings.auth_target, certificates=certificates, name="auth")
        )
        authorized = channel.ServiceCredentials("dispatcher", settings.secret("service").get_secret_value(), auth)

        def to(name: str, target: str) -> grpc.aio.Channel:
            return channel.connect(target, authorized, certificates=certificates, name=name)

        return cls(
            auth=auth,
            authorized=authorized,
            contexts=upstreams.Contexts(to("context", settings.context_target)),
            artifacts=upstreams.Artifacts(to("context", settings.context_target)),
            records=upstreams.Records(replicas.Replicas(settings.events_target), functools.partial(to, "events")),
        )


async def _stores(
    settings: DispatcherSettings, stack: contextlib.AsyncExitStack
) -> tuple[streams.Streams, limits.Limits, postgres.DatabaseManager, postgres.DatabaseManager]:
    """Signals, counts, and the database as users and as the system have it; closed with the stack."""
    signals = streams.Streams(settings.valkey_dsn("dispatcher"), "dispatcher", settings.valkey_namespace)
    stack.push_async_callback(signals.close)
    counted = limits.Limits(settings.valkey_dsn("dispatcher"), "dispatcher", settings.valkey_namespace)
    stack.push_async_callback(counted.close)
    dsn, size = settings.postgres_dsn("netra_dispatcher", "postgres"), settings.postgres_pool
    mine = await postgres.open_pool(dsn, "dispatcher", size=size, options={**postgres.BY_KEY, **_PROMPT})
    stack.push_async_callback(mine.close)
    system_dsn = settings.postgres_dsn("netra_dispatcher_system", "postgres_system")
    everyone = await postgres.open_pool(system_dsn, "dispatcher system", options={**postgres.BY_KEY, "jit": "off", **_PROMPT})
    stack.push_async_callback(everyone.close)
    return signals, counted, mine, everyone


def _sandboxes(settings: DispatcherSettings, declared: Iterable[ToolSpec], folder: Path) -> sandboxes.Sandboxes:
    """The tiers that are asked for. Raises `ValueError` naming the setting that cannot be."""
    try:
        limits = allowances.Allowances(settings.sandbox_limits)
    except ValueError as error:
        raise ValueError(f"NETRA_SANDBOX_LIMITS: {error}") from None
    # what runs for a run has ended before another process may take the run over
    heartbeat_s = max(settings.lease_s - 1.0, settings.lease_s / 2)
    guard = guardian.Guardian(heartbeat_s)
    uid, most = settings.sandbox_first_uid, settings.sandbox_calls
    in_python = {spec.function.__module__ for spec in declared if spec.backend == "sandbox"}
    in_workers = {spec.function.__module__ for spec in declared if spec.backend == "worker"}
    modules = sorted({*in_python, *_names(settings.sandbox_modules), "netra"})
    known: dict[Tier, Callable[[], tiers.Sandbox]] = {
        "script": lambda: script.Script(guard, most=most, uids=range(uid + 10_000, uid + 20_000)),
        "python": lambda: python.Python(folder, modules=modules, concurrency=most, heartbeat_s=heartbeat_s, first_uid=uid),
        "command": lambda: command.Command(guard, most=most, uids=range(uid + 20_000, uid + 30_000)),
    }
    wanted = _names(settings.sandbox_tiers)
    if unknown := set(wanted) - set(known):
        raise ValueError(f"NETRA_SANDBOX_TIERS: there is no tier {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    parts: dict[Tier, tiers.Sandbox] = {name: make() for name, make in known.items() if name in wanted}
    warm = workers.Workers(
        settings.tool_workers, guard, preload=sorted(in_workers), memory=settings.tool_worker_memory, spares=settings.tool_worker_spares
    )
    return sandboxes.Sandboxes({**parts, "remote": remote.Remote()}, limits=limits, guard=guard, warm=warm)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _rules(settings: DispatcherSettings) -> means.Rules:
    return means.Rules(
        dispatchers_per_user=settings.dispatchers_per_user, when_full=settings.dispatchers_when_full, calls=settings.tool_calls,
        calls_per_user=settings.tool_calls_per_user, waiting=settings.tool_calls_waiting, failures=settings.breaker_failures,
        open_s=settings.breaker_open_s, violations=settings.quarantine_violations, violations_within_s=settings.quarantine_s,
    )  # fmt: skip


def _granted(settings: DispatcherSettings, tool: str, name: str) -> str:
    """A secret of a tool: the file `tools/<tool>/<name>` among the secrets. Raises `PermissionDenied` when it is not there."""
    try:
        return settings.secret(f"tools/{tool}/{name}").get_secret_value()
    except MissingSecret:
        return means.not_granted(tool, name)


async def _serve(
    database: postgres.DatabaseManager, trusted: trust.Trust, listening: server.Server, tasks: lifecycle.Tasks,
    overseer: supervisor.Supervisor, registered: registrations.Registrations, sweeping: Callable[[], Coroutine[Any, Any, None]],
) -> None:  # fmt: skip
    await migrations.awaited(database, "dispatcher", _MIGRATIONS)
    await trusted.awaited()
    await registered.prepare()
    tasks.spawn(registered.follow(), name="registered tools")
    tasks.spawn(overseer.run(), name="supervisor")
    tasks.spawn(sweeping(), name="sweep of runs")
    await listening.serving(True)
