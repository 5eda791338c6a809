"""What a run asks the context service for: one call at its begin and one at its end. An older service is asked for more, as before."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from netra import ids
from netra.agent import Turn, agent
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2
from services.context.servicer import ContextServicer
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs, types

_ASKED = ("OpenContext", "AppendMessage", "CloseContext", "PutArtifact", "HideMessages", "RenewContext")


@agent("answering", deadline_s=60)
async def answering(turn: Turn) -> dict[str, str]:
    """Answers."""
    return {"message": f"You said: {turn.request}"}


@agent("verbose", deadline_s=60)
async def verbose(turn: Turn) -> str:
    """Answers with more than the record takes."""
    return "x" * 300_000


class Service:
    """The context service as it is asked: the calls of runs, in their order. An older one does not know of messages that come along."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_older = False

    def heard(self, name: str, request: Any) -> None:
        """A call comes in."""
        self.asked.append(name)
        if self.is_older and name in ("OpenContext", "CloseContext"):
            request.ClearField("message")


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    """Looked at where its calls come in."""
    service = Service()

    def listening(name: str, method: Any) -> Any:
        async def handled(self: Any, request: Any, context: Any) -> Any:
            service.heard(name, request)
            return await method(self, request, context)

        return handled

    for name in _ASKED:
        monkeypatch.setattr(ContextServicer, name, listening(name, getattr(ContextServicer, name)))
    return service


async def _said(services: Services, user: User, thread_id: str) -> list[tuple[str, str, str]]:
    stub: Any = context_pb2_grpc.ContextServiceStub(services.channel("context"))
    page = await stub.ListMessages(context_pb2.ListMessagesRequest(thread_id=thread_id), metadata=user.bearer)
    return [(message.message_id, message.role, message.content) for message in page.messages]


async def _over(running: Runs, user: User, run_id: str) -> None:
    """Returns when the row of a run has its final state: its context is closed then."""
    async with asyncio.timeout(20):
        while True:
            found = await running.dispatcher.GetRun(dispatcher_pb2.GetRunRequest(run_id=run_id), metadata=user.bearer)
            if found.run.HasField("ended_at"):
                return
            await asyncio.sleep(0.01)


async def _open(services: Services, user: User) -> int:
    stub: Any = context_pb2_grpc.ContextServiceStub(services.channel("context"))
    return len((await stub.ListContexts(context_pb2.ListContextsRequest(open=True), metadata=user.bearer)).contexts)


@pytest.mark.parametrize(
    ("agent_", "is_older", "asked"),
    [
        ("answering", False, ["OpenContext", "CloseContext"]),
        # what is kept as a file is kept before the context is closed
        ("verbose", False, ["OpenContext", "PutArtifact", "AppendMessage", "CloseContext"]),
        ("answering", True, ["OpenContext", "AppendMessage", "CloseContext", "AppendMessage", "CloseContext"]),
    ],
    ids=["usual", "with a file", "older service"],
)
async def test_messages_of_a_run_come_with_its_context(
    services: Services, service: Service, agent_: str, is_older: bool, asked: list[str]
) -> None:
    service.is_older = is_older
    await services.all(agents=[answering, verbose], lease_s=30)
    running, user = Runs(services), await services.user()
    started = await running.start(user, agent_, "Hello.")
    events = await running.ended(user, started.run_id)
    await _over(running, user, started.run_id)
    assert service.asked == asked
    assert await _open(services, user) == 0
    said = await _said(services, user, started.thread_id)
    assert [role for _, role, _ in said] == ["user", "assistant"]
    assert said[0][2] == "Hello."
    assert types(events)[-2:] == ["message_created", "agent_completed"]
    told = [event["data"]["message_id"] for event in events if event["type"] == "message_created"]
    assert told == [message_id for message_id, _, _ in said]


async def test_the_same_request_again_says_nothing_twice(services: Services, service: Service) -> None:
    await services.all(agents=[answering], lease_s=30)
    running, user, request_id = Runs(services), await services.user(), ids.uuid7()
    started = await asyncio.gather(*(running.start(user, "answering", "Hello.", request_id=request_id) for _ in range(4)))
    assert len({each.run_id for each in started}) == 1
    await running.ended(user, started[0].run_id)
    await _over(running, user, started[0].run_id)
    assert [content for _, _, content in await _said(services, user, started[0].thread_id)] == ["Hello.", "You said: Hello."]
    assert "AppendMessage" not in service.asked


async def test_a_run_that_must_not_wait_says_nothing_before_it_may_start(services: Services, service: Service) -> None:
    await services.all(agents=[answering], lease_s=30)
    running, user = Runs(services), await services.user()
    started = await running.start(user, "answering", "Hello.")
    await running.ended(user, started.run_id)
    await _over(running, user, started.run_id)
    service.asked.clear()
    rejecting: Any = {"thread_id": started.thread_id, "on_busy": dispatcher_pb2.ON_BUSY_REJECT}
    again = await running.start(user, "answering", "Again.", **rejecting)
    await running.ended(user, again.run_id)
    await _over(running, user, again.run_id)
    # whether the thread is free is known once its context is there
    assert service.asked == ["OpenContext", "AppendMessage", "CloseContext"]
    said = [content for _, _, content in await _said(services, user, started.thread_id)]
    assert said == ["Hello.", "You said: Hello.", "Again.", "You said: Again."]
