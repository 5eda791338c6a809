"""Sockets and streams of events: counted together, ended with their session, whenever it ends."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import httpx
import pytest
import websockets

from gateway import wiring
from netra import ids
from netra.agent import Turn, agent
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from tests.fixtures import users, web
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.gateway.conftest import bearer, until

_STREAM = {"Accept": "text/event-stream"}


class Held:
    """What the runs of a test wait for."""

    let_go: asyncio.Event


@agent("waiter")
async def waiter(turn: Turn) -> str:
    """Waits until the test lets it go."""
    await Held.let_go.wait()
    return "done"


@dataclasses.dataclass(slots=True)
class Edge:
    """The gateway and all services, as clients see them."""

    services: Services
    gateway: wiring.Service
    http: httpx.AsyncClient

    async def start(self, user: User, **more: Any) -> str:
        """Start a run that waits."""
        body = {"agent": "waiter", "user_request": "Some text.", **more}
        answer = await self.http.post("/v1/runs", json=body, headers=bearer(user))
        assert answer.status_code == 202, answer.text
        return str(answer.json()["run_id"])

    @contextlib.asynccontextmanager
    async def stream(self, user: User, run_id: str) -> AsyncIterator[httpx.Response]:
        """A stream of its events."""
        async with self.http.stream("GET", f"/v1/runs/{run_id}/events", headers=_STREAM | bearer(user)) as found:
            yield found

    def socket(self, user: User) -> websockets.connect:
        """A socket."""
        return websockets.connect(f"ws://127.0.0.1:{self.gateway.port}/ws", additional_headers=bearer(user), proxy=None)

    def number(self, user: User) -> int:
        """How many sockets and streams the user has."""
        return self.gateway.edge.open.open_for(ids.UserId(user.user_id))

    async def again(self, user: User) -> User:
        """The same user in another session."""

        def sign_in() -> auth_pb2.Tokens:
            with grpc.insecure_channel(f"127.0.0.1:{self.services.ports['auth']}") as channel:
                return users.sign_in(auth_pb2_grpc.AuthServiceStub(channel), user.email, user.password)

        return dataclasses.replace(user, token=(await asyncio.to_thread(sign_in)).access_token)


@pytest.fixture
async def edge(services: Services) -> AsyncIterator[Edge]:
    """Everything, in this process."""
    Held.let_go = asyncio.Event()
    await services.all(agents=[waiter])
    gateway = await services.gateway()
    async with web.client(base_url=f"http://127.0.0.1:{gateway.port}", timeout=20, trust_env=False) as http:
        yield Edge(services, gateway, http)
        Held.let_go.set()


async def test_streams_and_sockets_of_a_user_count_together(edge: Edge) -> None:
    user = await edge.services.user(tier="free")
    run_id = await edge.start(user)
    async with contextlib.AsyncExitStack() as stack:
        found = [await stack.enter_async_context(edge.stream(user, run_id)) for _ in range(2)]
        assert [one.status_code for one in found] == [200, 200]
        await stack.enter_async_context(edge.socket(user))
        assert (await edge.http.get("/v1/me", headers=bearer(user))).json()["usage"]["sockets"] == 3
        refused = await edge.http.get(f"/v1/runs/{run_id}/events", headers=_STREAM | bearer(user))
        assert (refused.status_code, refused.json()["code"]) == (429, "QUOTA_EXCEEDED")
        assert refused.json()["details"] == {"limit": "3", "kind": "sockets"}
        async with edge.socket(user) as one:
            with pytest.raises(websockets.ConnectionClosed):
                await one.recv()
            assert one.close_code == 4529
        # the record itself can be read all the same
        assert (await edge.http.get(f"/v1/runs/{run_id}/events", headers=bearer(user))).status_code == 200
        other = await edge.services.user(tier="free")
        async with edge.stream(other, await edge.start(other)) as theirs:
            assert theirs.status_code == 200
        await found[0].aclose()
        await until(lambda: edge.number(user) == 2)
        async with edge.stream(user, run_id) as again:
            assert again.status_code == 200
    await until(lambda: edge.number(user) == 0)


async def test_a_stream_ends_with_its_session(edge: Edge) -> None:
    user = await edge.services.user()
    other = await edge.again(user)
    run_id = await edge.start(user)
    async with edge.stream(user, run_id) as gone, edge.stream(other, run_id) as kept:
        lines = kept.aiter_lines()
        assert await anext(lines) == "retry: 500"
        await edge.http.post("/auth/logout", headers=bearer(user))
        async with asyncio.timeout(10):
            read = (await gone.aread()).decode()
        assert "agent_completed" not in read
        Held.let_go.set()
        assert "event: agent_completed" in [line async for line in lines]
    await until(lambda: edge.number(user) == 0)


async def test_a_stream_of_a_run_that_waits_has_all_of_it(edge: Edge) -> None:
    user = await edge.services.user()
    first = await edge.start(user)
    thread_id = (await edge.http.get(f"/v1/runs/{first}", headers=bearer(user))).json()["thread_id"]
    second = await edge.start(user, thread_id=thread_id)
    async with edge.stream(user, second) as found:
        assert found.status_code == 200
        Held.let_go.set()
        async with asyncio.timeout(30):
            told = [json.loads(line[6:])["type"] async for line in found.aiter_lines() if line.startswith("data: ")]
    assert (told[0], told[-1]) == ("agent_started", "agent_completed")


async def test_a_session_that_ends_during_the_handshake_gets_no_socket(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    user = await edge.services.user()
    doomed = await edge.again(user)
    reached, go_on = asyncio.Event(), asyncio.Event()
    entitled, known = edge.gateway.edge.entitled, edge.gateway.edge.verifier.trust
    count = entitled.count

    async def held(who: Any) -> None:
        await count(who)
        reached.set()
        await go_on.wait()

    async def shut_out() -> int:
        with pytest.raises(websockets.InvalidStatus) as caught:
            async with edge.socket(doomed):
                pass
        return caught.value.response.status_code

    # the user is followed already: nobody else would look at the token
    async with edge.socket(user) as kept, asyncio.timeout(20):
        assert json.loads(await kept.recv())["type"] == "connected"
        principal = await edge.gateway.edge.verifier.principal(doomed.token)
        monkeypatch.setattr(entitled, "count", held)
        async with asyncio.TaskGroup() as group:
            refused = group.create_task(shut_out())
            await reached.wait()
            stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(edge.services.channel("auth"))
            await stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=doomed.bearer)
            await until(lambda: known.revoked(principal))
            go_on.set()
        assert refused.result() == 401
        assert edge.number(user) == 1
