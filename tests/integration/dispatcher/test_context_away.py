"""Runs that end while the context service is away: their contexts are closed when it is back, and do not hold up their threads."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from chassis import postgres, status
from netra import ids
from netra.agent import Turn, agent
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2
from services.dispatcher import supervisor, wiring
from services.dispatcher.settings import DispatcherSettings
from standalone import prepare
from tests.fixtures import proxy
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs

BEGAN: dict[str, asyncio.Event] = {}


@agent("resting", deadline_s=60)
async def resting(turn: Turn) -> None:
    """Waits for its end."""
    BEGAN[str(turn.inputs["mark"])].set()
    await asyncio.Event().wait()


@pytest.fixture
async def wire(services: Services, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[proxy.Proxy]:
    """All but the dispatcher, and what will be between it and the context service."""
    monkeypatch.setattr(supervisor, "_CLOSE_AGAIN_S", 0.1)
    await services.auth()
    await services.context()
    await services.events()
    async with proxy.listening() as wire:
        wire.to = services.ports["context"]
        yield wire


@contextlib.asynccontextmanager
async def _dispatching(services: Services, wire: proxy.Proxy) -> AsyncIterator[Runs]:
    settings = DispatcherSettings(**services.settings("dispatcher", context_target=f"127.0.0.1:{wire.port}"))
    async with wiring.build(settings, agents=[resting]) as running:
        services.ports["dispatcher"] = running.port
        await running.trust.awaited()
        yield Runs(services)


async def _erased(services: Services, user: User, thread_id: str) -> str:
    """What comes of erasing a thread: empty when it is."""
    stub: Any = context_pb2_grpc.ContextServiceStub(services.channel("context"))
    try:
        await stub.EraseThread(context_pb2.EraseThreadRequest(request_id=ids.uuid7(), thread_id=thread_id), metadata=user.bearer)
    except grpc.aio.AioRpcError as error:
        return status.from_rpc(error).code
    return ""


@pytest.mark.parametrize("restarted", [False, True])
async def test_a_context_is_closed_when_its_service_is_back(
    services: Services, wire: proxy.Proxy, stores: Standalone, database: str, restarted: bool
) -> None:
    user, mark = await services.user(), ids.uuid7()
    BEGAN[mark] = asyncio.Event()
    async with contextlib.AsyncExitStack() as first:
        running = await first.enter_async_context(_dispatching(services, wire))
        started = await running.start(user, "resting", inputs={"mark": mark})
        await asyncio.wait_for(BEGAN[mark].wait(), 20)
        # nobody is there
        wire.to = 0
        wire.cut()
        cancel = dispatcher_pb2.CancelRunRequest(run_id=started.run_id)
        await running.dispatcher.CancelRun(cancel, metadata=user.bearer)
        assert (await running.ended(user, started.run_id))[-1]["type"] == "agent_cancelled"
        query = "SELECT state FROM dispatcher.runs WHERE run_id = $1"
        async with asyncio.timeout(20), postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
            # the run ends all the same
            while await admin.value(query, started.run_id) != "cancelled":  # noqa: ASYNC110 - what PostgreSQL says is waited for
                await asyncio.sleep(0.02)
        assert await _erased(services, user, started.thread_id) == "FAILED_PRECONDITION"
        if restarted:
            await first.aclose()
            await first.enter_async_context(_dispatching(services, wire))
        wire.to = services.ports["context"]
        async with asyncio.timeout(20):
            while (code := await _erased(services, user, started.thread_id)) == "FAILED_PRECONDITION":  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)
        assert code == ""
