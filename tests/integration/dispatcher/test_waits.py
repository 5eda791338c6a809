"""Calls that wait for long: they keep their run, their answer and their caller; and nobody waits for what hangs."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from chassis import channel, postgres
from netra import ids
from netra.agent import Turn, agent
from netra.dispatcher.v1 import dispatcher_pb2
from netra.tool import tool
from services.dispatcher import store_system, supervisor, upstreams
from standalone import prepare
from tests.fixtures import web
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs, types

_BRIEF_S = 60.0
BEGAN: dict[str, asyncio.Event] = {}
RELEASED: dict[str, asyncio.Event] = {}


def new_mark() -> str:
    """A fresh mark."""
    mark = ids.uuid7()
    BEGAN[mark], RELEASED[mark] = asyncio.Event(), asyncio.Event()
    return mark


@tool(timeout_s=60, backend="process")
async def occupy(mark: str) -> str:
    """Has a slot until the test lets it go."""
    BEGAN[mark].set()
    await RELEASED[mark].wait()
    return mark


@tool(timeout_s=_BRIEF_S, backend="process")
async def brief() -> str:
    """Takes no time at all, once it has a slot."""
    return "done"


@tool(timeout_s=60)
async def linger(mark: str) -> str:
    """Takes as long as the test wants."""
    BEGAN[mark].set()
    await RELEASED[mark].wait()
    return mark


@agent("held")
async def held(turn: Turn) -> None:
    """Waits for its end."""
    BEGAN[str(turn.inputs["mark"])].set()
    await asyncio.Event().wait()


MORE: dict[str, Any] = {"agents": [held], "tools": [occupy, brief, linger], "tool_processes": 1}


async def call(runs: Runs, user: User, name: str, **arguments: object) -> dispatcher_pb2.ExecuteToolResponse:
    """One interactive call."""
    request = dispatcher_pb2.ExecuteToolRequest(request_id=ids.uuid7(), tool_name=name, arguments=json.dumps(arguments).encode())
    return await runs.dispatcher.ExecuteTool(request, metadata=user.bearer, wait_for_ready=True, timeout=60)


async def test_a_call_that_takes_longer_than_its_first_lease_is_not_taken_for_dead(
    services: Services, stores: Standalone, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # its lease without renewal, which is the tool's time and this: 12 s
    monkeypatch.setattr(supervisor, "_TOOL_GRACE_S", 12.0 - _BRIEF_S)
    await services.all(**MORE, lease_s=12.0)
    runs, user, mark = Runs(services), await services.user(), new_mark()
    url = prepare.on_database(stores.postgres_admin_url, database)
    query = "SELECT count(*) FROM dispatcher.runs WHERE agent = 'brief' AND lease_until > created_at + interval '13 seconds'"
    async with asyncio.TaskGroup() as group, asyncio.timeout(50), postgres.connection(url) as admin:
        first = group.create_task(call(runs, user, "occupy", mark=mark))
        await BEGAN[mark].wait()
        second = group.create_task(call(runs, user, "brief"))
        while not await admin.value(query):  # noqa: ASYNC110 - what PostgreSQL says is waited for
            await asyncio.sleep(0.05)
        RELEASED[mark].set()
    assert (first.result().status, second.result().status) == ("success", "success")
    events = await runs.ended(user, second.result().run_id)
    assert types(events) == ["tool_executing", "tool_completed"]
    assert events[-1]["data"]["status"] == "success"


async def test_a_call_that_is_over_is_answered_however_its_lease_is_looked_at(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    renew, close = store_system.SystemStore.renew, upstreams.Contexts.close
    closing, looks = asyncio.Event(), asyncio.Semaphore(0)

    async def looked(self: store_system.SystemStore, *arguments: Any) -> Any:
        found = await renew(self, *arguments)
        if closing.is_set():
            looks.release()
        return found

    async def late(self: upstreams.Contexts, token: str) -> None:
        closing.set()
        async with asyncio.timeout(20):
            for _ in range(2):
                await looks.acquire()
        await close(self, token)

    monkeypatch.setattr(store_system.SystemStore, "renew", looked)
    await services.all(**MORE)
    runs, user, mark = Runs(services), await services.user(), new_mark()
    # something to renew besides
    await runs.start(user, "held", inputs={"mark": mark})
    await asyncio.wait_for(BEGAN[mark].wait(), 20)
    monkeypatch.setattr(upstreams.Contexts, "close", late)
    assert (await call(runs, user, "brief")).status == "success"


@pytest.fixture
def hung() -> Iterator[str]:
    """The address of a Valkey that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"redis://127.0.0.1:{listening.getsockname()[1]}/0"


async def test_a_cancel_of_a_run_elsewhere_is_answered_while_valkey_hangs(services: Services, hung: str) -> None:
    await services.all(**MORE)
    here, user, mark = Runs(services), await services.user(), new_mark()
    run = await here.start(user, "held", inputs={"mark": mark})
    await asyncio.wait_for(BEGAN[mark].wait(), 20)
    await services.dispatcher(**MORE, valkey_url=hung)
    await asyncio.wait_for(services.trusts[-1].awaited(), 20)
    elsewhere = Runs(services)
    request = dispatcher_pb2.CancelRunRequest(run_id=run.run_id)
    await elsewhere.dispatcher.CancelRun(request, metadata=user.bearer, wait_for_ready=True, timeout=5)
    # the row says it too
    assert (await here.ended(user, run.run_id))[-1]["type"] == "agent_cancelled"


async def test_over_http_a_tool_has_its_own_time_and_not_that_of_other_calls(services: Services, monkeypatch: pytest.MonkeyPatch) -> None:
    await services.all(**MORE)
    user, gateway, mark = await services.user(), await services.gateway(), new_mark()
    given = base64.b64encode(json.dumps({"mark": mark}).encode()).decode()
    body = {"request_id": ids.uuid7(), "tool_name": "linger", "arguments": given}
    # what any other call may take
    monkeypatch.setattr(channel, "DEFAULT_TIMEOUT_S", 1.0)
    path, headers = "/rpc/netra.dispatcher.v1.DispatcherService/ExecuteTool", {"Authorization": f"Bearer {user.token}"}
    async with web.client(base_url=f"http://127.0.0.1:{gateway.port}", timeout=60) as http, asyncio.TaskGroup() as group:
        answer = group.create_task(http.post(path, json=body, headers=headers))
        await asyncio.wait_for(BEGAN[mark].wait(), 20)
        # another call has all the time of other calls, from here on, and ends with it
        assert not (await asyncio.wait({answer}, timeout=channel.DEFAULT_TIMEOUT_S * 2))[0]
        RELEASED[mark].set()
    assert (answer.result().status_code, answer.result().json().get("status")) == (200, "success")
