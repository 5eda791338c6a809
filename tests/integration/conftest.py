"""What integration tests of several services share."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from netra import ids
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from tests.fixtures.storage import Services
from tests.fixtures.users import User

ENDS = {"agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"}


class Runs:
    """Starts runs as a user and reads their record."""

    def __init__(self, services: Services) -> None:
        self.services = services
        self.dispatcher: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(
            services.channel("dispatcher")
        )
        self.events: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(services.channel("events"))

    async def start(self, user: User, agent: str = "", request: str = "Some text.", **more: Any) -> dispatcher_pb2.StartRunResponse:
        """Start a run."""
        inputs = json.dumps(more.pop("inputs", {})).encode()
        wanted = dispatcher_pb2.StartRunRequest(
            request_id=more.pop("request_id", ids.uuid7()), agent=agent, user_request=request, inputs=inputs, **more
        )
        return await self.dispatcher.StartRun(wanted, metadata=user.bearer, wait_for_ready=True, timeout=20)

    async def until(self, user: User, run_id: str, kind: str, times: int = 1) -> list[dict[str, Any]]:
        """The run's events up to the first of a kind, or the one that makes it so many."""
        seen: list[dict[str, Any]] = []
        request = events_pb2.SubscribeRequest(run_id=run_id)
        async with asyncio.timeout(30):
            async for batch in self.events.Subscribe(request, metadata=user.bearer, wait_for_ready=True):
                for event in batch.events:
                    seen.append(json.loads(event.frame))
                    if types(seen).count(kind) == times:
                        return seen
        return seen

    async def ended(self, user: User, run_id: str) -> list[dict[str, Any]]:
        """All events of a run, once it has ended."""
        return await self.until(user, run_id, "the end")


@pytest.fixture
def runs() -> Callable[[Services], Runs]:
    """Makes the helper once the services run."""
    return Runs


def types(events: list[dict[str, Any]]) -> list[str]:
    """The kinds of events, in order."""
    return [event["type"] for event in events]
