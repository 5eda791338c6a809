"""Auth stands still, or dies: everybody goes on with what they know, for a while; then tools wait, and go on when it is back."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import grpc
import httpx
import pytest

from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from tests.fixtures import own, sockets, users, web
from tests.fixtures.stack import gateway_url

# auth says something every five seconds; tools wait when it has been silent for this long
STALE_S = 12.0
pytestmark = pytest.mark.timeout(240)


@dataclass(frozen=True, slots=True)
class Here:
    """A system, a user of it, and their client."""

    system: own.Own
    user: users.User
    http: httpx.AsyncClient

    async def heard(self) -> None:
        """Returns when the dispatcher has heard of something that happens now: an earlier test may have left auth silent for long."""
        ports = self.system.ports
        async with (
            grpc.aio.insecure_channel(f"127.0.0.1:{ports['auth']}") as auth,
            grpc.aio.insecure_channel(f"127.0.0.1:{ports['dispatcher']}") as dispatcher,
        ):
            stub = auth_pb2_grpc.AuthServiceStub(auth)
            bearer = (await asyncio.to_thread(self._another)).bearer
            await stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=bearer)
            refused = None
            while refused is not grpc.StatusCode.UNAUTHENTICATED:
                try:
                    await dispatcher_pb2_grpc.DispatcherServiceStub(dispatcher).ListRuns(dispatcher_pb2.ListRunsRequest(), metadata=bearer)
                except grpc.aio.AioRpcError as error:
                    refused = error.code()

    def _another(self) -> users.User:
        """The same user, signed in once more."""
        with grpc.insecure_channel(f"127.0.0.1:{self.system.ports['auth']}") as channel:
            tokens = users.sign_in(auth_pb2_grpc.AuthServiceStub(channel), self.user.email, self.user.password)
        return dataclasses.replace(self.user, token=tokens.access_token, refresh_token=tokens.refresh_token)

    async def get(self, path: str) -> int:
        """The status of an answer."""
        return (await self.http.get(path, headers={"Authorization": f"Bearer {self.user.token}"})).status_code

    async def tools_wait(self) -> bool:
        """Whether a call of a tool waits for auth, as the dispatcher measures it."""
        page = (await self.http.get(f"http://127.0.0.1:{self.system.metrics['dispatcher']}/metrics")).text
        return re.search(r"^netra_tools_waiting_for_auth(\{.*\})? 1\.0$", page, re.MULTILINE) is not None

    async def signed_in(self) -> None:
        """Returns when sign-in works."""
        while (await self.http.post("/auth/login", json={"email": self.user.email, "password": self.user.password})).status_code != 200:
            pass


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[own.Own]:
    """One in which tools are careful early."""
    with own.running(tmp_path_factory.mktemp("netra"), NETRA_TRUST_STALE_S=str(STALE_S)) as started:
        yield started


@pytest.fixture
async def here(system: own.Own) -> AsyncIterator[Here]:
    """A user, signed in."""

    def made() -> users.User:
        with grpc.insecure_channel(f"127.0.0.1:{system.ports['auth']}") as channel:
            stub = auth_pb2_grpc.AuthServiceStub(channel)
            admin = users.sign_in(stub, system.admin_email, system.admin_password()).access_token
            return users.make_user(stub, admin, "user", "internal")

    user = await asyncio.to_thread(made)
    async with web.client(base_url=gateway_url(system), timeout=30) as http:
        found = Here(system, user, http)
        await found.heard()
        yield found


async def test_while_auth_stands_still_all_go_on_then_tools_wait_until_it_is_back(here: Here) -> None:
    async with sockets.opened(here.system, here.user) as before, asyncio.TaskGroup() as group:
        with here.system.stopped("auth"):
            # whoever is known is known: calls, sockets, runs with their tools
            assert [await here.get(path) for path in ("/v1/runs", "/v1/threads", "/v1/tools")] == [200] * 3
            async with sockets.opened(here.system, here.user) as during:
                end = (await during.ended((await during.run())["run_id"]))[-1]
                assert end["type"] == "agent_completed", end["data"]
            async with asyncio.timeout(3 * STALE_S):
                while True:
                    ended = group.create_task(before.ended((await before.run())["run_id"]))
                    while not (waits := await here.tools_wait()) and not ended.done():
                        pass
                    if waits:
                        break
                    end = (await ended)[-1]
                    assert end["type"] == "agent_completed", end["data"]
            # what is no tool goes on
            assert await here.get("/v1/runs") == 200
        events = await ended
    assert [event["data"]["status"] for event in events if event["type"] == "tool_completed"] == ["success"] * 2
    assert events[-1]["type"] == "agent_completed"


async def test_a_service_that_starts_meanwhile_knows_whom_the_one_before_knew(here: Here) -> None:
    with here.system.stopped("auth"):
        await asyncio.to_thread(here.system.kill, "context")
        await asyncio.to_thread(here.system.restarted, "context")
        assert await here.get("/v1/threads") == 200


async def test_while_auth_dies_again_and_again_no_call_is_refused(here: Here) -> None:
    async with sockets.opened(here.system, here.user) as socket:
        for _ in range(3):
            run = await socket.run(inputs={"pace_s": 0.5})
            await asyncio.to_thread(here.system.kill, "auth")
            assert [await here.get("/v1/runs") for _ in range(20)] == [200] * 20
            await asyncio.to_thread(here.system.restarted, "auth")
            # on a slow machine three restarts are a long silence: then a tool waits a moment, and goes on
            ended = (await socket.ended(run["run_id"]))[-1]
            assert ended["type"] == "agent_completed", ended["data"]
    # whoever lost it looks for it again within a second
    await here.signed_in()
