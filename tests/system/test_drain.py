"""Two gateways over one record: one is told to stop under load, and nobody misses or sees twice anything."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest
import websockets
from websockets.asyncio.client import ClientConnection

from netra.auth.v1 import auth_pb2_grpc
from standalone import processes
from tests.fixtures import own, web
from tests.fixtures.sockets import ENDS
from tests.fixtures.users import NewUser, User, make_user, sign_in

USERS, EACH, RUNS = 10, 2, 4
# more than the queue, the gateway's buffers and those of the kernel take
MANY, LONG = 24, 60_000
_SECOND = next(row for row in processes.TABLE if row.name == "gateway")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[own.Own]:
    """A system with two gateways."""
    second = dataclasses.replace(_SECOND, name="gateway2", replica_of="gateway")
    little = {"gateway": {"NETRA_QUEUE_EVENTS": "8", "NETRA_QUEUE_BYTES": "65536"}}
    with own.running(tmp_path_factory.mktemp("two"), little, (second,)) as system:
        yield system


@pytest.fixture(scope="module")
def user_of_two(two: own.Own) -> NewUser:
    """Makes users of it."""
    stub = auth_pb2_grpc.AuthServiceStub(grpc.insecure_channel(f"127.0.0.1:{two.ports['auth']}"))
    admin = sign_in(stub, two.admin_email, two.admin_password()).access_token
    return lambda role="user", tier="internal": make_user(stub, admin, role, tier)


@contextlib.asynccontextmanager
async def _opened(system: own.Own, gateway: str, user: User, *entries: str, **more: Any) -> AsyncIterator[ClientConnection]:
    protocols: Any = ["netra.v1", f"bearer.{user.token}", *entries]
    async with websockets.connect(f"ws://127.0.0.1:{system.ports[gateway]}/ws", subprotocols=protocols, **more) as connection:
        yield connection


@dataclass(eq=False)
class _Client:
    """Follows its user, resumes where it was, and keeps what it sees."""

    user: User
    cursors: list[int] = field(default_factory=list)
    ended: set[str] = field(default_factory=set)
    last_word: dict[str, Any] = field(default_factory=dict)
    code: int = 0
    open: asyncio.Event = field(default_factory=asyncio.Event)
    seen: asyncio.Event = field(default_factory=asyncio.Event)

    async def follow(self, system: own.Own, gateway: str, wanted: int) -> None:
        """Until so many runs have ended, or the gateway sends it away."""
        resume = f"resume.{self.cursors[-1] if self.cursors else 0}"
        async with _opened(system, gateway, self.user, resume) as connection:
            self.open.set()
            try:
                while len(self.ended) < wanted:
                    self._saw(json.loads(await connection.recv()))
            except websockets.ConnectionClosed as closed:
                self.code = closed.rcvd.code if closed.rcvd is not None else 0

    def _saw(self, frame: dict[str, Any]) -> None:
        if "seq" in frame:
            self.cursors.append(frame["cursor"])
            self.seen.set()
            assert frame["user_id"] == self.user.user_id
            if frame["type"] in ENDS:
                self.ended.add(frame["run_id"])
        elif frame["type"] == "draining":
            self.last_word = frame


async def _runs(system: own.Own, user: User, many: int = RUNS, text: str = "Some text.", pace_s: float = 0.1) -> None:
    async with web.client(base_url=f"http://127.0.0.1:{system.ports['gateway']}", timeout=20) as client:
        for _ in range(many):
            body = {"agent": "text-analyst", "user_request": text, "inputs": {"pace_s": pace_s}}
            answer = await client.post("/v1/runs", json=body, headers={"Authorization": f"Bearer {user.token}"})
            assert answer.status_code == 202, answer.text


async def test_a_gateway_that_stops_loses_nothing(two: own.Own, user_of_two: NewUser) -> None:
    clients = [_Client(user) for user in [await asyncio.to_thread(user_of_two) for _ in range(USERS)] for _ in range(EACH)]
    async with asyncio.timeout(90):
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client.follow(two, "gateway2", RUNS))
            for client in clients:
                await client.open.wait()
            for client in clients[::EACH]:
                group.create_task(_runs(two, client.user))
            for client in clients:
                await client.seen.wait()
            two.end("gateway2")
        away = [client for client in clients if client.code]
        assert {client.code for client in away} <= {4001}
        for client in away:
            assert client.last_word["cursor"] == client.cursors[-1]
        assert len(away) > len(clients) / 2
        async with asyncio.TaskGroup() as group:
            for client in clients:
                group.create_task(client.follow(two, "gateway", RUNS))
        # whichever test comes next finds both
        await asyncio.to_thread(two.restarted, "gateway2")
    for client in clients:
        assert client.cursors == list(range(1, len(client.cursors) + 1))
        assert len(client.ended) == RUNS
    for one, other in zip(clients[::EACH], clients[1::EACH], strict=True):
        assert one.cursors == other.cursors


async def test_a_user_has_a_few_sockets_at_all_gateways_together(two: own.Own, user_of_two: NewUser) -> None:
    user = await asyncio.to_thread(user_of_two, tier="free")
    async with contextlib.AsyncExitStack() as stack, asyncio.timeout(30):
        for number in range(3):
            gateway = ("gateway", "gateway2")[number % 2]
            connection = await stack.enter_async_context(_opened(two, gateway, user, f"client.tab{number}"))
            assert json.loads(await connection.recv())["type"] == "connected"
        async with _opened(two, "gateway2", user) as one_more:
            with pytest.raises(websockets.ConnectionClosed) as refused:
                await one_more.recv()
            assert refused.value.rcvd is not None
            assert refused.value.rcvd.code == 4529
        # the last one is at the first gateway; its client goes to the second
        async with _opened(two, "gateway2", user, "client.tab2") as moved:
            assert json.loads(await moved.recv())["type"] == "connected"
            await connection.wait_closed()
            assert connection.close_code == 4504


async def test_a_reader_that_takes_nothing_for_a_while_has_all_in_the_end(two: own.Own, user_of_two: NewUser) -> None:
    user = await asyncio.to_thread(user_of_two)
    slow, other, size = _Client(user), _Client(user), 0
    async with asyncio.timeout(90), _opened(two, "gateway", user, max_queue=1) as connection:
        await _runs(two, user, MANY, "word " * (LONG // 5), 0)
        await other.follow(two, "gateway2", MANY)
        while len(slow.ended) < MANY:
            text = await connection.recv()
            size += len(text)
            slow._saw(json.loads(text))
    assert slow.cursors == other.cursors == list(range(1, len(other.cursors) + 1))
    assert size > 1_000_000
