"""Calls whose dispatcher is killed: a completed one never runs again, any other is settled as its tool says, and the record tells how."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from chassis import postgres
from netra import ids
from netra.dispatcher.v1 import approvals_pb2, dispatcher_pb2, dispatcher_pb2_grpc
from services.dispatcher import ledger
from standalone import prepare
from tests.fixtures import effects
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs, types


@dataclass(frozen=True, slots=True)
class Asked:
    """A call that a user asked for. The same one again is the same request."""

    tool: str
    arguments: dict[str, Any]
    request_id: str = field(default_factory=ids.uuid7)

    @property
    def mark(self) -> str:
        """What its effects are counted under."""
        return str(self.arguments["mark"])


class World:
    """A user, dispatchers that come and go, and what their tools did outside."""

    def __init__(self, services: Services, user: User, admin_dsn: str, outside: effects.Outside) -> None:
        self.services, self.user, self.outside, self._admin_dsn = services, user, outside, admin_dsn

    def asked(self, tool: str, mark: str, **more: str) -> Asked:
        """A call."""
        return Asked(tool, {"folder": str(self.outside.folder), "mark": mark, **more})

    async def call(self, port: int, asked: Asked) -> Any:
        """Ask a dispatcher for a call."""
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(channel)
            request = dispatcher_pb2.ExecuteToolRequest(
                request_id=asked.request_id, tool_name=asked.tool, arguments=json.dumps(asked.arguments).encode()
            )
            return await stub.ExecuteTool(request, metadata=self.user.bearer, wait_for_ready=True, timeout=30)

    async def lost(self, port: int, asked: Asked) -> bool:
        """Whether whoever asks hears nothing but that the dispatcher is gone."""
        return await self.heard(port, asked) is None

    async def heard(self, port: int, asked: Asked) -> Any:
        """What whoever asks is answered; None when they hear nothing but that the dispatcher is gone."""
        try:
            return await self.call(port, asked)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return None

    async def time_passes(self) -> None:
        """All leases run out."""
        async with postgres.connection(self._admin_dsn) as admin:
            await admin.execute("UPDATE dispatcher.runs SET lease_until = now() WHERE lease_until IS NOT NULL")

    async def recorded(self, calls: int) -> None:
        """Returns when the record says of so many calls that they began."""
        async with asyncio.timeout(30), postgres.connection(self._admin_dsn) as admin:
            while await admin.value("SELECT count(*) FROM events.events WHERE type = 'tool_executing'") < calls:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def settled(self, asked: Asked) -> Any:
        """What the same request is answered, once its call is settled."""
        async with asyncio.timeout(30):
            while True:
                try:
                    return await self.call(self.services.ports["dispatcher"], asked)
                except grpc.aio.AioRpcError as error:
                    # it is still being settled: ABORTED, with BUSY as the reason
                    if "still executes" not in (error.details() or ""):
                        raise
                    await asyncio.sleep(0.02)

    async def told(self, run_id: str) -> list[dict[str, Any]]:
        """The events of a run, once it has ended."""
        return await Runs(self.services).ended(self.user, run_id)


@pytest.fixture
async def world(services: Services, stores: Standalone, database: str, tmp_path: Path) -> World:
    """A world without a dispatcher."""
    await services.auth()
    await services.context()
    await services.events()
    folder = tmp_path / "outside"
    folder.mkdir()
    admin_dsn = prepare.on_database(stores.postgres_admin_url, database)
    return World(services, await services.user(), admin_dsn, effects.Outside(folder))


async def succeed(world: World) -> None:
    """Another dispatcher comes, when the leases of the dead one are over."""
    await world.time_passes()
    # it has less patience: one is asked that never answers
    tools = [dataclasses.replace(tool, timeout_s=2.0) if tool.reconcile is not None else tool for tool in effects.TOOLS]
    await world.services.dispatcher(agents=effects.AGENTS, tools=tools)


def outcome(answer: Any, events: list[dict[str, Any]]) -> tuple[str, str, Any]:
    """Status, how it was settled, and the result or the code of the error; the answer and the record say the same."""
    data = events[-1]["data"]
    assert types(events) == ["tool_executing", "tool_completed"]
    assert (events[0]["data"]["tool_call_id"], data["status"]) == (data["tool_call_id"], answer.status)
    assert (answer.tool_call_id, json.loads(answer.result) if answer.result else None) == (data["tool_call_id"], data.get("result"))
    return answer.status, data.get("settled", ""), data["result"] if answer.status == "success" else answer.error.code


LEFT = {
    # tool, what it says when it is asked; then: status, how it was settled, what it came to, and how many effects there are
    "plain": ("pay", "", "unknown", "unknown", "OWNER_LOST", 1),
    "idempotent": ("put", "", "success", "repeat", {"count": 2}, 2),
    "secret": ("sign", "", "unknown", "unknown", "OWNER_LOST", 1),
    "without effects": ("look", "", "success", "repeat", {"count": 2}, 2),
    "it was made": ("order", "done", "success", "reconcile", {"count": 1}, 1),
    "it was not made": ("order", "not done", "success", "repeat", {"count": 2}, 2),
    "it cannot tell": ("order", "nothing", "unknown", "unknown", "OWNER_LOST", 1),
    "it cannot be asked": ("order", "wrong", "unknown", "unknown", "OWNER_LOST", 1),
    "it takes too long": ("order", "too late", "unknown", "unknown", "OWNER_LOST", 1),
}


async def test_every_call_of_a_killed_dispatcher_is_settled_as_its_tool_declares(world: World) -> None:
    world.outside.hold()
    all_asked = {
        name: world.asked(tool, name, **({"says": says} if says else {"api_key": "hunter2-hunter2"} if tool == "sign" else {}))
        for name, (tool, says, *_) in LEFT.items()
    }
    async with effects.dispatcher(world.services.settings("dispatcher")) as (process, port), asyncio.TaskGroup() as group:
        heard = [group.create_task(world.lost(port, asked)) for asked in all_asked.values()]
        run = group.create_task(_spends(world, port))
        await world.outside.until(dict.fromkeys([*all_asked, "agent pays", "agent orders", "agent looks"], 1))
        # of those without effects it is told a moment later
        await world.recorded(len(all_asked) + 3)
        process.kill()
        process.wait()
    assert all(task.result() for task in heard)
    world.outside.release()
    await succeed(world)
    answers = {name: await world.settled(asked) for name, asked in all_asked.items()}
    found = {
        name: (*outcome(answer, await world.told(answer.run_id)), len(world.outside.of(name))) for name, answer in answers.items()
    }  # fmt: skip
    assert found == {name: tuple(expected) for name, (_, _, *expected) in LEFT.items()}
    for name, answer in answers.items():
        # one key for all that was done for a call, known beforehand
        assert {*world.outside.of(name)} == {ledger.effect_key(answer.run_id, ledger.INTERACTIVE)}
        assert await world.settled(all_asked[name]) == answer
    await _agent_goes_on(world, run.result())


async def _spends(world: World, port: int) -> str:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(channel)
        inputs = json.dumps({"folder": str(world.outside.folder)}).encode()
        request = dispatcher_pb2.StartRunRequest(request_id=ids.uuid7(), agent="spender", user_request="Spend.", inputs=inputs)
        return str((await stub.StartRun(request, metadata=world.user.bearer, wait_for_ready=True, timeout=30)).run_id)


async def _agent_goes_on(world: World, run_id: str) -> None:
    """Its run is carried on: of what nobody can find out a person says that it is not to be done again, and its agent is told so."""
    runs = Runs(world.services)
    asked = next(event for event in await runs.until(world.user, run_id, "agent_suspended") if event["type"] == "approval_requested")
    assert (asked["data"]["tool_name"], asked["data"]["parameters"]["mark"]) == ("pay", "agent pays")
    approval_id = asked["data"]["approval_id"]
    request = approvals_pb2.ResolveApprovalRequest(approval_id=approval_id, decision=approvals_pb2.DECISION_REJECT)
    await runs.dispatcher.ResolveApproval(request, metadata=world.user.bearer, wait_for_ready=True, timeout=30)
    events = await world.told(run_id)
    ends = {data["tool_name"]: (data["status"], data["settled"]) for data in (event["data"] for event in events) if "settled" in data}
    assert ends == {"pay": ("unknown", "unknown"), "order": ("success", "reconcile"), "look": ("success", "repeat")}
    assert (events[-1]["type"], events[-1]["data"]["error"]["code"]) == ("agent_failed", "OWNER_LOST")
    assert [len(world.outside.of(mark)) for mark in ("agent pays", "agent orders", "agent looks")] == [1, 1, 2]


async def test_what_is_in_the_record_is_answered_from_there_and_what_is_not_never_began(world: World) -> None:
    made = [world.asked(name, name) for name in ("pay", "put", "look")]
    never = world.asked("put", "never")
    async with asyncio.TaskGroup() as group:
        dying = group.create_task(_dies(world, made, "commit"))
        lost = group.create_task(_dies(world, [never], "open"))
    assert lost.result() == [None]
    await succeed(world)
    for one, heard in zip(made, dying.result(), strict=True):
        answer = await world.settled(one)
        # whoever was answered before the row said so is answered the same by whoever comes after
        assert heard in (None, answer)
        assert outcome(answer, await world.told(answer.run_id)) == ("success", "", {"count": 1})
    answer = await world.settled(never)
    assert (answer.status, answer.error.code) == ("error", "OWNER_LOST")
    assert "before it did" in answer.error.message
    assert types(await world.told(answer.run_id)) == ["agent_failed"]
    assert [len(world.outside.of(one.mark)) for one in (*made, never)] == [1, 1, 1, 0]


async def _dies(world: World, all_asked: list[Asked], at: str) -> list[Any]:
    """A dispatcher that is asked for these calls, and dies at one point when all of them have come there: what each was answered."""
    settings = world.services.settings("dispatcher")
    async with effects.dispatcher(settings, dies_at=at, calls=len(all_asked)) as (process, port):
        answers = await asyncio.gather(*(world.heard(port, asked) for asked in all_asked))
        assert await asyncio.to_thread(process.wait) < 0
    return answers


async def test_a_process_of_a_tool_that_is_killed_ends_the_attempt_as_the_tool_declares(world: World) -> None:
    await world.services.dispatcher(tools=effects.TOOLS)
    port = world.services.ports["dispatcher"]
    paid, put = world.asked("pay_apart", "paid"), world.asked("put_apart", "put")
    once, again = await world.call(port, paid), await world.call(port, put)
    assert (once.status, once.error.code, len(world.outside.of("paid"))) == ("error", "TOOL_FAILED", 1)
    assert (again.status, again.result, len(world.outside.of("put"))) == ("success", b"2", 2)
    events = [(await world.told(answer.run_id))[-1]["data"] for answer in (once, again)]
    assert [(data["status"], data["attempts"]) for data in events] == [("error", 1), ("success", 2)]
    # who is answered finds the run ended: the same request has the same answer, at once
    assert [await world.call(port, asked) for asked in (paid, put)] == [once, again]
