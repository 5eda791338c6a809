"""Signing keys are rotated again and again while everybody calls: no call is refused, and tokens of every key count."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import httpx
import jwt

from netra import ids
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from tests.fixtures import web
from tests.fixtures.stack import System, gateway_url
from tests.fixtures.users import NewUser, User

TIMES = 8
# another replica of auth, which finds again and again that it is time
_ROTATE = """
import asyncio
from datetime import timedelta
from chassis import postgres
from services.auth import keys, store_keys
from services.auth.settings import AuthSettings
async def rotate(times, pause_s):
    settings = AuthSettings.load()
    pool = await postgres.open_pool(settings.postgres_dsn("netra_auth", "postgres"), "netra_auth")
    signing = keys.Keys(store_keys.KeyStore(pool), settings.wrap("auth.signing_keys"), timedelta())
    for _ in range(times):
        await signing.load()
        assert await signing.rotate_if_due()
        await asyncio.sleep(pause_s)
    await pool.close()
"""


def _kid(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


@dataclass(slots=True)
class Crowd:
    """Calls all the time, over every way."""

    system: System
    user: User
    http: httpx.AsyncClient
    channels: dict[str, grpc.aio.Channel]
    done: Counter[str] = field(default_factory=Counter)
    kids: set[str] = field(default_factory=set)
    refused: list[str] = field(default_factory=list)

    async def for_ever(self, what: str, call: Callable[[], Awaitable[None]]) -> None:
        """Make a call again and again; note each that fails."""
        while True:
            try:
                await call()
            except (grpc.aio.AioRpcError, httpx.HTTPError, AssertionError) as error:
                self.refused.append(f"{what}: {error!r}"[:500])
            self.done[what] += 1

    async def everywhere(self, token: str) -> None:
        """The edge and all services know the token."""
        bearer = (("authorization", f"Bearer {token}"),)
        stubs: dict[str, Any] = {
            "auth": auth_pb2_grpc.AuthServiceStub(self.channels["auth"]).GetPermissions(auth_pb2.GetPermissionsRequest(), metadata=bearer),
            "context": context_pb2_grpc.ContextServiceStub(self.channels["context"]).ListThreads(
                context_pb2.ListThreadsRequest(), metadata=bearer
            ),
            "dispatcher": dispatcher_pb2_grpc.DispatcherServiceStub(self.channels["dispatcher"]).ListRuns(
                dispatcher_pb2.ListRunsRequest(), metadata=bearer
            ),
        }
        await asyncio.gather(self._get("/v1/me", token), *stubs.values())

    async def with_the_first_token(self) -> None:
        """One that was issued before it all."""
        await self.everywhere(self.user.token)

    async def with_fresh_tokens(self) -> None:
        """Sign in, renew, and use at once what was given."""
        answer = await self.http.post("/auth/login", json={"email": self.user.email, "password": self.user.password})
        assert answer.is_success, answer.text
        for _ in range(5):
            answer = await self.http.post("/auth/refresh", json={"refresh_token": answer.json()["refresh_token"]})
            assert answer.is_success, answer.text
            token = answer.json()["access_token"]
            self.kids.add(_kid(token))
            await self.everywhere(token)

    async def a_run(self) -> None:
        """The services call each other for it, with tokens of their own and with its context."""
        body = {"agent": "text-analyst", "user_request": "Some text."}
        headers = {"Authorization": f"Bearer {self.user.token}", "Idempotency-Key": ids.uuid7()}
        started = await self.http.post("/v1/runs", json=body, headers=headers)
        assert started.is_success, started.text
        bearer = (("authorization", f"Bearer {self.user.token}"),)
        events = events_pb2_grpc.EventsServiceStub(self.channels["events"])
        following: Any = events.Subscribe(events_pb2.SubscribeRequest(run_id=started.json()["run_id"]), metadata=bearer)
        frames = [event.frame async for batch in following for event in batch.events]
        assert b'"agent_completed"' in frames[-1], frames[-1]

    async def _get(self, path: str, token: str) -> None:
        answer = await self.http.get(path, headers={"Authorization": f"Bearer {token}"})
        assert answer.is_success, answer.text


async def _published(http: httpx.AsyncClient) -> set[str]:
    return {key["kid"] for key in (await http.get("/.well-known/jwks.json")).json()["keys"]}


async def test_no_call_is_refused_while_keys_rotate(system: System, new_user: NewUser) -> None:
    user = await asyncio.to_thread(new_user)
    async with contextlib.AsyncExitStack() as stack:
        limits = httpx.Limits(keepalive_expiry=2.0)
        http = await stack.enter_async_context(web.client(base_url=gateway_url(system), limits=limits, timeout=60))
        channels = {
            name: await stack.enter_async_context(grpc.aio.insecure_channel(f"127.0.0.1:{system.ports[name]}"))
            for name in ("auth", "context", "dispatcher", "events")
        }
        crowd = Crowd(system, user, http, channels)
        before = await _published(http)
        async with asyncio.TaskGroup() as group:
            calls = [crowd.with_the_first_token, crowd.with_fresh_tokens, crowd.with_fresh_tokens, crowd.a_run]
            callers = [group.create_task(crowd.for_ever(call.__name__, call)) for call in calls]
            await asyncio.to_thread(system.python, "auth", f"{_ROTATE}\nasyncio.run(rotate({TIMES}, 0.5))")
            for caller in callers:
                caller.cancel()
        after = await _published(http)
    assert crowd.refused == []
    # each rotation makes one key; the last one has not signed yet
    assert len(after - before) == TIMES
    assert len(crowd.kids) >= TIMES // 2, crowd.kids
    assert min(crowd.done[call.__name__] for call in calls) >= 2, crowd.done
