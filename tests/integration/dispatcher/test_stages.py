"""The nine stages of a message, from the edge and back to it, as its run shows them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import grpc
import pytest
from google.protobuf import timestamp_pb2

from netra import ids
from netra.dispatcher.v1 import dispatcher_pb2
from services.dispatcher import stages
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs

TO_THE_ANSWER = list(stages.ORDER[:-1])


@pytest.fixture
async def running(services: Services) -> Runs:
    """All services; a run has shown that they are ready."""
    await services.all()
    running = Runs(services)
    user = await services.user()
    await running.ended(user, (await running.start(user)).run_id)
    return running


def at(moment: datetime) -> timestamp_pb2.Timestamp:
    """As it is sent."""
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(moment)
    return stamp


async def passed(running: Runs, user: User, run_id: str) -> dict[str, datetime]:
    """The stages of a run that has ended."""
    async with asyncio.timeout(10):
        while True:
            run = (await running.dispatcher.GetRun(dispatcher_pb2.GetRunRequest(run_id=run_id), metadata=user.bearer)).run
            if run.HasField("ended_at"):
                return {stage.name: stage.at.ToDatetime(UTC) for stage in run.stages}
            await asyncio.sleep(0.01)


async def notify(running: Runs, told: list[tuple[str, datetime]], metadata: Any = None) -> None:
    """The gateway says that users were told."""
    request = dispatcher_pb2.RecordStagesRequest(
        notified=[dispatcher_pb2.Notified(run_id=run_id, at=at(moment)) for run_id, moment in told]
    )
    await running.dispatcher.RecordStages(request, metadata=metadata or await running.services.service_token("gateway"))


async def test_a_message_passes_nine_stages_in_order(running: Runs) -> None:
    user, now = await running.services.user(), datetime.now(UTC)
    received, validated = now - timedelta(seconds=2), now - timedelta(seconds=1)
    started = await running.start(user, "text-analyst", received_at=at(received), validated_at=at(validated))
    await running.ended(user, started.run_id)
    before = await passed(running, user, started.run_id)
    assert list(before) == TO_THE_ANSWER
    told = datetime.now(UTC)
    await notify(running, [(started.run_id, told)])
    after = await passed(running, user, started.run_id)
    assert list(after) == list(stages.ORDER)
    assert list(after.values()) == sorted(after.values())
    assert (after[stages.RECEIVED], after[stages.VALIDATED], after[stages.NOTIFIED]) == (received, validated, told)
    assert {name: moment for name, moment in after.items() if name in before} == before


async def test_the_first_notification_counts_and_unknown_runs_are_passed_over(running: Runs) -> None:
    user = await running.services.user()
    run_ids = [(await running.start(user)).run_id for _ in range(3)]
    for run_id in run_ids:
        await running.ended(user, run_id)
    first = datetime.now(UTC)
    await notify(running, [(run_ids[0], first), (run_ids[0], first + timedelta(seconds=1)), (ids.uuid7(), first), (run_ids[1], first)])
    await notify(running, [(run_ids[0], first + timedelta(seconds=-5)), (run_ids[1], first + timedelta(hours=1))])
    await notify(running, [])
    seen = [(await passed(running, user, run_id)).get(stages.NOTIFIED) for run_id in run_ids]
    assert seen == [first, first, None]


async def test_only_the_gateway_may_say_that_users_were_told(running: Runs) -> None:
    user = await running.services.user(role="admin")
    for metadata in (user.bearer, await running.services.service_token("events")):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await notify(running, [(ids.uuid7(), datetime.now(UTC))], metadata)
        assert caught.value.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED)


async def test_too_many_at_once_and_what_is_no_run_are_refused(running: Runs) -> None:
    now = datetime.now(UTC)
    for told in ([(ids.uuid7(), now)] * 1001, [("nonsense", now)]):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await notify(running, told)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_times_that_cannot_be_are_not_believed(running: Runs) -> None:
    user, before = await running.services.user(), datetime.now(UTC)
    later, long_ago = before + timedelta(hours=1), before - timedelta(days=1)
    for wrong in (later, long_ago):
        started = await running.start(user, received_at=at(wrong), validated_at=at(wrong))
        await running.ended(user, started.run_id)
        times = await passed(running, user, started.run_id)
        assert before - timedelta(seconds=1) < times[stages.RECEIVED] <= times[stages.VALIDATED] < before + timedelta(minutes=1)


async def test_a_call_has_the_stages_that_apply(running: Runs) -> None:
    user, request_id = await running.services.user(), ids.uuid7()
    request = dispatcher_pb2.ExecuteToolRequest(request_id=request_id, tool_name="text_statistics", arguments=b'{"text":"One."}')
    answer = await running.dispatcher.ExecuteTool(request, metadata=user.bearer, wait_for_ready=True, timeout=20)
    assert list(await passed(running, user, answer.run_id)) == [
        stages.RECEIVED, stages.VALIDATED, stages.ROUTING, stages.RESPONSE_PERSISTED,
    ]  # fmt: skip
