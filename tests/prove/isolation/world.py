"""The running system with its people: how they are made, how anything is asked in somebody's name."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import orjson
from google.protobuf import duration_pb2

from chassis import postgres, status
from netra import ids
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.context import CALLS
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from standalone import prepare
from tests.fixtures import oidc, users, web
from tests.fixtures.forge import Forge
from tests.fixtures.stack import System, gateway_url
from tests.prove import hostile, ways
from tests.prove.isolation import answers
from tests.prove.isolation.listening import Held
from tests.prove.isolation.people import Party, canary

SERVICES = ("auth", "context", "dispatcher", "events")
# runs where the secrets of the dispatcher are
_ASK = """
import asyncio
from chassis import postgres, status
from services.dispatcher.settings import DispatcherSettings
async def ask(approval_id, run_id, user_id, thread_id, message):
    settings = DispatcherSettings.load()
    async with postgres.connection(settings.postgres_dsn("netra_dispatcher_system", "postgres_system")) as database:
        await database.execute(
            "INSERT INTO dispatcher.approvals (approval_id, run_id, user_id, thread_id, step_key, message, tool_name, parameters, quorum,"
            " expires_at) VALUES ($1, $2, $3, $4, '1:approve', $5, '', '{}', 2, now() + interval '1 day')",
            approval_id, run_id, user_id, thread_id, message)
    async with postgres.connection(settings.postgres_dsn("netra_dispatcher", "postgres")) as database:
        await database.execute("SELECT set_config('netra.user_id', $1, false)", user_id)
        await database.execute(
            "INSERT INTO dispatcher.approval_votes (approval_id, user_id, owner_id, thread_id, decision, comment)"
            " VALUES ($1, $2, $2, $3, 'approve', 'Yes.')", approval_id, user_id, thread_id)
"""
_OPTIONS = (("grpc.max_metadata_size", 64 * 1024), ("grpc.use_local_subchannel_pool", 1))
_TRIES, _PAUSE_MS = 40, 500
# what another try may come through
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.RESOURCE_EXHAUSTED)


@dataclass(slots=True)
class World:
    """Everything a proof asks. `a` owns what is looked for; `b` is of the same tenant, `c` of another, which `foreign_admin` rules."""

    system: System
    forge: Forge
    channels: dict[str, grpc.aio.Channel]
    http: httpx.AsyncClient
    database_url: str = ""
    provider: oidc.Provider | None = None
    parties: dict[str, Party] = field(default_factory=dict)
    # how long whoever asks for a stream in another's name listens, while its owner's go on
    held: Held | None = None

    def __getitem__(self, name: str) -> Party:
        return self.parties[name]

    @property
    def auth(self) -> auth_pb2_grpc.AuthServiceAsyncStub:
        """The auth service."""
        stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(self.channels["auth"])
        return stub

    @property
    def context(self) -> context_pb2_grpc.ContextServiceAsyncStub:
        """The context service."""
        stub: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(self.channels["context"])
        return stub

    @property
    def runs(self) -> dispatcher_pb2_grpc.DispatcherServiceAsyncStub:
        """The dispatcher."""
        stub: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(self.channels["dispatcher"])
        return stub

    @property
    def events(self) -> events_pb2_grpc.EventsServiceAsyncStub:
        """The record."""
        stub: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(self.channels["events"])
        return stub

    def service(self, name: str, context_token: str = "") -> answers.Metadata:
        """Metadata of a service's call, perhaps within a context."""
        bearer = ("authorization", f"Bearer {self.forge.token(hostile.SERVICE, sub=name)}")
        return (bearer, ("x-netra-context", context_token)) if context_token else (bearer,)

    def as_user(self, who: Party) -> dict[str, str]:
        """Headers of a user's request, from an address of its own."""
        return {**ways.a_client(), "Authorization": f"Bearer {who.token}"}

    # what examples need: each time a fresh one

    async def recruit(self, admin: Party) -> str:
        """A user of the administrator's tenant who has not signed in yet. Whoever may not make one names themselves."""
        if admin.boss is not None:
            return admin.user_id
        wanted = auth_pb2.CreateUserRequest(email=f"{secrets.token_hex(8)}@netra.example")
        return (await self.auth.CreateUser(wanted, metadata=admin.bearer)).user_id

    def near(self, who: Party) -> Party:
        """Somebody else of the same tenant: who rules it, or one of its users."""
        return who.boss or self["C" if who is self["F"] else "A"]

    async def spare(self, like: Party, *, signed_in: bool = False) -> Party:
        """Another user of the same tenant, who may be spoilt. Who has not signed in has no password, which would take its time, and a
        token as the platform would sign it."""
        boss = like.boss or like
        # nobody gives a tier that they do not have
        tier, role = "internal" if boss is self["operator"] else "enterprise", "admin" if like.rules else "user"
        email = f"{secrets.token_hex(8)}@netra.example"
        if signed_in:
            user = await self.made(boss, email, role, tier)
        else:
            wanted = auth_pb2.CreateUserRequest(email=email, roles=[role], tier=tier)
            user_id = (await self.auth.CreateUser(wanted, metadata=boss.bearer)).user_id
            claims = {"sub": user_id, "sid": ids.uuid7(), "tid": like.things["tenant_id"], "roles": [role], "tier": tier}
            user = users.User(user_id, email, "", self.forge.token(hostile.ACCESS, **claims), "")
        return Party(user, user.token, like.name, like.canary, like.things, boss, like.rules)

    async def made(self, admin: Party, email: str, role: str, tier: str) -> users.User:
        """A user who has signed in."""
        password = secrets.token_urlsafe(16)
        request = auth_pb2.CreateUserRequest(email=email, password=password, roles=[role], tier=tier)
        user_id = (await self.auth.CreateUser(request, metadata=admin.bearer)).user_id
        tokens = await self.signed_in(email, password)
        return users.User(user_id, email, password, tokens.access_token, tokens.refresh_token)

    async def signed_in(self, email: str, password: str, device: str = "proof") -> auth_pb2.Tokens:
        """Fresh tokens; from an address of their own, through outages and limits. What is refused for good is raised at once."""
        grant = auth_pb2.PasswordGrant(email=email, password=password)
        request = auth_pb2.IssueTokenRequest(password=grant, device=device, client_address=ways.a_client()["X-Forwarded-For"])
        for _ in range(_TRIES):
            try:
                return (await self.auth.IssueToken(request, metadata=self.service("gateway"), timeout=10)).tokens
            except grpc.aio.AioRpcError as error:
                if error.code() not in _PASSING:
                    raise
                pause_ms = status.from_rpc(error).retry_after_ms
            await asyncio.sleep((pause_ms or _PAUSE_MS) / 1000)
        raise TimeoutError(f"nobody lets {email} in")

    async def opened(self, who: Party, **more: Any) -> context_pb2.OpenContextResponse:
        """A context of a user, opened by the dispatcher, with the user's canary in it."""
        said = f'{{"note":"{who.canary}"}}'.encode()
        request = context_pb2.OpenContextRequest(
            request_id=who.word(), access_token=who.token, run_id=ids.RunId.new(), agent_context=said, audit_metadata=said,
            connection_id=ids.uuid7(), **more,
        )  # fmt: skip
        return await self.context.OpenContext(request, metadata=self.service("dispatcher"), timeout=20)

    async def calls_opened(self, who: Party) -> context_pb2.OpenContextResponse:
        """The context of the calls of a user's session, as the dispatcher opens it."""
        request = context_pb2.OpenContextRequest(
            request_id=f"calls:{ids.uuid7()}", access_token=who.token, run_id=ids.RunId.new(), agent_context=orjson.dumps(CALLS)
        )
        return await self.context.OpenContext(request, metadata=self.service("dispatcher"), timeout=20)

    async def run_opened(self, who: Party, epoch: int = 1, **more: Any) -> context_pb2.OpenContextResponse:
        """A context whose run the dispatcher has opened in the record."""
        found = await self.opened(who, **more)
        wanted = events_pb2.OpenRunRequest(run_id=found.context.run_id, epoch=epoch, context_token=found.context_token)
        await self.events.OpenRun(wanted, metadata=self.service("dispatcher"), timeout=20)
        return found

    async def started(self, who: Party, **more: Any) -> dispatcher_pb2.StartRunResponse:
        """A run of a user."""
        more = {"request_id": who.word(), "agent": "text-analyst", "user_request": f"About {who.canary}.", **more}
        request = dispatcher_pb2.StartRunRequest(**more)
        return await self.runs.StartRun(request, metadata=who.bearer, timeout=20)

    async def waiting(self, who: Party) -> str:
        """A run of a user that can be told something; of one of theirs where they name what is another's, that."""
        if who.things.ids.get("user_id", who.user_id) != who.user_id:
            return who.things["run_id"]
        # what of A goes on by itself must be over soon: it is looked at whether anything of theirs changes, once nothing goes on
        pace_s, lasts_s = (4, 3) if who.name == "A" else (60, 3600)
        inputs, deadline = f'{{"pace_s":{pace_s}}}'.encode(), duration_pb2.Duration(seconds=lasts_s)
        return (await self.started(who, inputs=inputs, deadline=deadline)).run_id

    async def ended(self, who: Party, run_id: str) -> None:
        """Returns when a run of a user is over."""
        async for _ in self.events.Subscribe(events_pb2.SubscribeRequest(run_id=run_id), metadata=who.bearer, timeout=60):
            pass

    async def asked_for(self, who: Party, run_id: str, thread_id: str) -> str:
        """What a run of a user asked people for, with one of two votes, which is the user's: saying it again changes nothing.

        No agent that comes with Netra asks, so it is stored as the dispatcher stores it.
        """
        approval_id = ids.uuid7()
        told = approval_id, run_id, who.user_id, thread_id, f"May it go on with {who.canary}?"
        await asyncio.to_thread(self.system.python, "dispatcher", f"{_ASK}\nasyncio.run(ask{told!r})")
        return approval_id

    async def kept(self, who: Party, **more: Any) -> context_pb2.Artifact:
        """A file of a user."""
        body = f"{who.canary}\n".encode()
        header = context_pb2.ArtifactHeader(request_id=who.word(), name=f"{who.canary}.txt", media_type="text/plain", **more)
        parts = [
            context_pb2.PutArtifactRequest(header=header), context_pb2.PutArtifactRequest(data=body),
            context_pb2.PutArtifactRequest(end=True),
        ]  # fmt: skip
        return (await self.context.PutArtifact(iter(parts), metadata=who.bearer, timeout=20)).artifact

    async def back(self, authorization_url: str) -> dict[str, str]:
        """What the outside provider sends the browser of somebody new back with; it is one small process, and may be slow."""
        callback = f"http://127.0.0.1:{self.system.ports['gateway']}/auth/oidc/callback"
        name = secrets.token_hex(8)
        for _ in range(_TRIES):
            with contextlib.suppress(httpx.TransportError):
                return await oidc.sign_in(authorization_url, name, callback)
        raise TimeoutError("the provider lets nobody in")

    async def key(self, who: Party) -> auth_pb2.CreateApiKeyResponse:
        """A key for programs of a user."""
        request = auth_pb2.CreateApiKeyRequest(name=who.canary, scopes=["runs:read"])
        return await self.auth.CreateApiKey(request, metadata=who.bearer, timeout=20)

    async def thread(self, who: Party) -> str:
        """A thread of a user, with one message of theirs in it."""
        found = await self.opened(who)
        told = context_pb2.AppendMessageRequest(request_id=who.word(), role="user", content=f"About {who.canary}.")
        await self.context.AppendMessage(told, metadata=self.service("dispatcher", found.context_token), timeout=20)
        await self.context.CloseContext(
            context_pb2.CloseContextRequest(), metadata=self.service("dispatcher", found.context_token), timeout=20
        )
        return found.context.thread_id


@contextlib.asynccontextmanager
async def around(system: System, *, provider: oidc.Provider | None = None) -> AsyncIterator[World]:
    """The system with its people: A and B of one tenant, C of another, and who rules each. Where the database is not ours to change,
    C's tenant is what a token says that the platform itself could have signed."""
    async with contextlib.AsyncExitStack() as stack:
        channels = {name: grpc.aio.insecure_channel(f"127.0.0.1:{system.ports[name]}", _OPTIONS) for name in SERVICES}
        for one in channels.values():
            stack.push_async_callback(one.close, None)
        http = await stack.enter_async_context(web.client(base_url=gateway_url(system), timeout=30, trust_env=False))
        stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(channels["auth"])
        grant = auth_pb2.PasswordGrant(email=system.admin_email, password=system.admin_password())
        tokens = (await stub.IssueToken(auth_pb2.IssueTokenRequest(password=grant), timeout=20)).tokens
        forge = await asyncio.to_thread(Forge.of, system, tokens.access_token)
        who = users.User(tokens.user_id, system.admin_email, system.admin_password(), tokens.access_token, "")
        operator = Party(who, who.token, "operator", canary("o"), rules=True)
        database = getattr(system, "postgres_admin_url", "")
        url = prepare.on_database(database, getattr(system, "database", "netra")) if database else ""
        world = World(system, forge, channels, http, url, provider, {"operator": operator})
        await _populate(world)
        yield world


async def _populate(world: World) -> None:
    operator = world["operator"]
    for name in ("A", "B"):
        world.parties[name] = await _party(world, operator, name, "user", "internal")
    # an administrator whose tier does not run the installation
    foreign = await _party(world, operator, "F", "admin", "enterprise")
    third = await _party(world, operator, "C", "user", "internal")
    tenant_id = ids.uuid7()
    for one in (foreign, third):
        await _moved(world, one, tenant_id)
    foreign.boss, foreign.rules, third.boss = None, True, foreign
    world.parties |= {"F": foreign, "C": third}


async def _party(world: World, admin: Party, name: str, role: str, tier: str) -> Party:
    user = await world.made(admin, f"{secrets.token_hex(12)}@netra.example", role, tier)
    return Party(user, user.token, name, canary(name), boss=admin)


async def _moved(world: World, who: Party, tenant_id: str) -> None:
    """Into another tenant."""
    if world.database_url:
        async with postgres.connection(world.database_url) as owner:
            await owner.execute("UPDATE auth.users SET tenant_id = $2 WHERE user_id = $1", who.user_id, tenant_id)
        who.token = (await world.signed_in(who.email, who.user.password)).access_token
    else:
        role = ["admin"] if who.name == "F" else ["user"]
        who.token = world.forge.token(hostile.ACCESS, sub=who.user_id, sid=ids.uuid7(), tid=tenant_id, roles=role)
