"""Limits and policy from outside: HTTP, sockets, and a change that every process of the running system obeys within a second."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

import grpc
import httpx
import pytest

from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from tests.fixtures import sockets, web
from tests.fixtures.stack import System, gateway_url
from tests.fixtures.users import NewUser, User, sign_in

_AUTH = "/rpc/netra.auth.v1.AuthService"


@pytest.fixture
async def http(system: System) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the gateway."""
    async with web.client(base_url=gateway_url(system), timeout=20) as client:
        yield client


def as_user(user: User) -> dict[str, str]:
    """Headers of a user's requests."""
    return {"Authorization": f"Bearer {user.token}"}


async def test_requests_over_the_limit_of_the_tier_are_told_when_to_come_back(http: httpx.AsyncClient, new_user: NewUser) -> None:
    free, other = new_user(tier="free"), new_user(tier="free")
    answered, late = 0, await http.get("/v1/threads", headers=as_user(free))
    while late.status_code == 200 and answered < 1_000:
        answered, late = answered + 1, await http.get("/v1/threads", headers=as_user(free))
    # two a second come back meanwhile
    assert (late.status_code, answered >= 120) == (429, True)
    assert late.json()["code"] == "RATE_LIMITED"
    assert late.json()["details"] == {"limit": "120", "kind": "requests"}
    assert 1 <= int(late.headers["retry-after"]) <= 2
    assert 0 < late.json()["retry_after_ms"] <= 500
    # others, and those who ask for nothing of anybody, are not touched
    assert (await http.get("/v1/threads", headers=as_user(other))).status_code == 200
    assert (await http.get("/readyz")).status_code == 200


async def test_a_user_has_as_many_sockets_and_frames_as_the_tier(system: System, new_user: NewUser) -> None:
    free, internal = new_user(tier="free"), new_user(tier="internal")
    async with (
        sockets.opened(system, free) as one, sockets.opened(system, free), sockets.opened(system, free),
    ):  # fmt: skip
        assert one.frames[0]["limits"]["frames_per_minute"] == 120
        with pytest.raises(Exception, match="4529"):
            async with sockets.opened(system, free):
                pass
        for _ in range(4):
            async with sockets.opened(system, internal) as more:
                assert more.frames[0]["limits"]["frames_per_minute"] == 100_000


class Everywhere:
    """One call of a user to each process."""

    def __init__(self, system: System, http: httpx.AsyncClient, user: User) -> None:
        self._http, self._user = http, user
        self._channels = {name: grpc.aio.insecure_channel(f"127.0.0.1:{system.ports[name]}") for name in system.ports if name != "gateway"}

    async def allowed(self) -> set[str]:
        """The processes that let the user look."""
        calls = self._calls()
        answers = await asyncio.gather(*calls.values(), return_exceptions=True)
        return {name for name, answer in zip(calls, answers, strict=True) if not isinstance(answer, grpc.aio.AioRpcError)}

    def _calls(self) -> dict[str, Awaitable[Any]]:
        bearer = self._user.bearer
        auth: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(self._channels["auth"])
        context: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(self._channels["context"])
        events: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(self._channels["events"])
        runs: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(self._channels["dispatcher"])
        return {
            "auth": auth.ListSessions(auth_pb2.ListSessionsRequest(), metadata=bearer),
            "context": context.ListThreads(context_pb2.ListThreadsRequest(), metadata=bearer),
            "events": events.ListEvents(events_pb2.ListEventsRequest(), metadata=bearer),
            "dispatcher": runs.ListRuns(dispatcher_pb2.ListRunsRequest(), metadata=bearer),
        }

    async def frames(self) -> int:
        """What the gateway grants."""
        found = (await self._http.get("/v1/me", headers=as_user(self._user))).json()
        return int(found["limits"]["frames_per_minute"]) if "limits" in found else 0

    async def until(self, allowed: set[str], frames: int) -> float:
        """How long it takes until it is so in every process."""
        began = time.monotonic()
        async with asyncio.timeout(20):
            while True:
                if await self.allowed() == allowed and await self.frames() == frames:
                    return time.monotonic() - began

    async def close(self) -> None:
        """Close the channels."""
        for channel in self._channels.values():
            await channel.close()


async def test_a_change_of_the_policy_is_obeyed_by_every_process_within_a_second_and_taken_back(
    system: System, http: httpx.AsyncClient, new_user: NewUser
) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{system.ports['auth']}") as channel:
        admin = sign_in(auth_pb2_grpc.AuthServiceStub(channel), system.admin_email, system.admin_password())
    headers = {"Authorization": f"Bearer {admin.access_token}"}

    async def rpc(method: str, **body: Any) -> dict[str, Any]:
        answer = await http.post(f"{_AUTH}/{method}", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    user = new_user("user", "early")
    every = Everywhere(system, http, user)
    before = (await rpc("GetPolicy"))["policy"]
    changed = {**before, "grants": [dict(grant) for grant in before["grants"]], "limits": [dict(limit) for limit in before["limits"]]}
    for grant in changed["grants"]:
        if (grant["role"], grant["tier"]) == ("user", "early"):
            grant["permissions"] = ["session:write", "session:read"]
    next(limit for limit in changed["limits"] if limit["tier"] == "early")["frames_per_minute"] = 77
    assert await every.allowed() == {"auth", "context", "events", "dispatcher"}
    try:
        version = (await rpc("UpdatePolicy", policy=changed, expected_version=before["version"], comment="a test"))["version"]
        forward = await every.until({"auth"}, 77)
    finally:
        reverted = (await rpc("RevertPolicy", version=before["version"]))["version"]
    back = await every.until({"auth", "context", "events", "dispatcher"}, 120)
    await every.close()
    assert (int(version), int(reverted)) == (int(before["version"]) + 1, int(before["version"]) + 2)
    assert max(forward, back) < 1.0
