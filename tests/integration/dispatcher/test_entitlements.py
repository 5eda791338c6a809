"""What a tier entitles to: runs in a minute, at a time, waiting; tool calls; agents and tools by the rules of the policy."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import grpc
import pytest

from chassis import status
from netra import errors, ids
from netra.agent import Turn, agent
from netra.auth.v1 import auth_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.tool import tool
from tests.fixtures.policies import Administrator, limited, without
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs

STARTED: list[str] = []
RELEASED: dict[str, asyncio.Event] = {}
WOKEN: list[asyncio.Condition] = []


@agent("waiting")
async def waiting(turn: Turn) -> str:
    """Waits until the test lets it go."""
    mark = str(turn.inputs["mark"])
    async with WOKEN[0]:
        STARTED.append(mark)
        WOKEN[0].notify_all()
    await RELEASED.setdefault(mark, asyncio.Event()).wait()
    return mark


@tool()
async def look() -> int:
    """Looks."""
    return 1


@agent("looking")
async def looking(turn: Turn) -> list[str]:
    """Looks twice; in between it waits."""
    seen = []
    for _ in range(2):
        try:
            await turn.tool("look")
            seen.append("ok")
        except errors.NetraError as error:
            seen.append(f"{error.code} {error.details.get('tiers', '')}".strip())
        async with WOKEN[0]:
            STARTED.append("looked")
            WOKEN[0].notify_all()
        await RELEASED.setdefault("looked", asyncio.Event()).wait()
    return seen


@agent("advanced", feature="advanced_agents")
async def advanced(turn: Turn) -> str:
    """Needs a feature."""
    return "done"


@agent("delegating")
async def delegating(turn: Turn) -> list[object]:
    """Has an agent do a part that needs a feature; waits, and does it again."""
    seen: list[object] = []
    for _ in range(2):
        try:
            seen.append(await turn.child("advanced"))
        except errors.NetraError as error:
            seen.append([error.code, error.details["feature"]])
        async with WOKEN[0]:
            STARTED.append("asked")
            WOKEN[0].notify_all()
        await RELEASED.setdefault("asked", asyncio.Event()).wait()
    return seen


MORE: dict[str, Any] = {"agents": [waiting, looking, advanced, delegating], "tools": [look]}


@pytest.fixture(autouse=True)
def _nothing_started() -> Iterator[None]:
    STARTED.clear()
    RELEASED.clear()
    WOKEN[:] = [asyncio.Condition()]
    yield
    for event in RELEASED.values():
        event.set()


async def begun(count: int) -> list[str]:
    """What has begun, once so many have."""
    async with asyncio.timeout(20), WOKEN[0]:
        await WOKEN[0].wait_for(lambda: len(STARTED) >= count)
        return list(STARTED)


async def refused(call: Awaitable[Any]) -> errors.NetraError:
    """The error of a call."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return status.from_rpc(caught.value)


async def start(runs: Runs, user: User, mark: str, **more: Any) -> dispatcher_pb2.StartRunResponse:
    """Start a run that waits."""
    return await runs.start(user, "waiting", inputs={"mark": mark}, **more)


async def state(runs: Runs, user: User, run_id: str) -> str:
    """Where a run is."""
    answer = await runs.dispatcher.GetRun(dispatcher_pb2.GetRunRequest(run_id=run_id), metadata=user.bearer)
    return dispatcher_pb2.RunState.Name(answer.run.state).removeprefix("RUN_STATE_").lower()


async def test_no_more_runs_are_begun_in_a_minute_than_the_tier_has(services: Services) -> None:
    await services.all(**MORE)
    runs, free, other = Runs(services), await services.user(tier="free"), await services.user(tier="free")
    known = ids.uuid7()
    for number in range(10):
        await runs.start(free, "text-analyst", request_id=known if number == 0 else ids.uuid7())
    too_many = await refused(runs.start(free))
    assert (too_many.code, too_many.details["kind"], too_many.details["limit"]) == ("RATE_LIMITED", "runs", "10")
    assert too_many.retry_after_ms is not None
    assert 0 < too_many.retry_after_ms <= 6_000
    # what was accepted before is answered again, and others are not touched
    assert (await runs.start(free, "text-analyst", request_id=known)).run_id
    await runs.start(other)


async def test_no_more_runs_execute_at_a_time_than_the_tier_has_whoever_claims_them(services: Services) -> None:
    await services.all(**MORE, poll_s=0.05)
    runs = Runs(services)
    await services.dispatcher(**MORE, poll_s=0.05)
    free, early = await services.user(tier="free"), await services.user(tier="early")
    started = [await start(runs, free, f"free {number}") for number in range(6)]
    await asyncio.gather(*(start(runs, early, f"early {number}") for number in range(5)))
    first = await begun(5)
    assert sorted(mark.partition(" ")[0] for mark in first) == ["early"] * 3 + ["free"] * 2
    # a place that becomes free is taken by the next one, and by no more than one
    RELEASED["free 0"].set()
    assert (await begun(6))[5] == "free 2"
    states = [await state(runs, free, run.run_id) for run in started]
    assert sorted(states[1:]) == ["queued"] * 3 + ["running"] * 2
    assert len(STARTED) == 6


async def test_no_more_runs_wait_than_the_tier_has(services: Services) -> None:
    await services.all(**MORE)
    admin, runs, user = await Administrator(services).signed_in(), Runs(services), await services.user(tier="free")
    await admin.change_everywhere(limited("free", concurrent_runs=1, queued_runs=2))
    await start(runs, user, "one")
    await begun(1)
    for mark in ("two", "three"):
        await start(runs, user, mark)
    assert (await refused(start(runs, user, "four"))).code == "RATE_LIMITED"
    # hot: the limit is another one at the next request
    await admin.change_everywhere(limited("free", queued_runs=3))
    await start(runs, user, "four")


async def test_a_tier_without_runs_has_none(services: Services) -> None:
    await services.all(**MORE)
    admin, runs, user = await Administrator(services).signed_in(), Runs(services), await services.user(tier="free")
    await admin.change_everywhere(limited("free", concurrent_runs=0))
    assert (await refused(runs.start(user))).code == "QUOTA_EXCEEDED"
    await admin.change_everywhere(limited("free", concurrent_runs=1, runs_per_minute=0))
    assert (await refused(runs.start(user))).code == "QUOTA_EXCEEDED"


async def test_an_agent_comes_with_its_feature(services: Services) -> None:
    await services.all(**MORE)
    runs, free, business = Runs(services), await services.user(tier="free"), await services.user(tier="business")
    denied = await refused(runs.start(free, "advanced"))
    assert (denied.code, denied.details) == (
        "PERMISSION_DENIED", {"feature": "advanced_agents", "tiers": "business,enterprise,internal"},
    )  # fmt: skip
    shown = [
        {found.name for found in (await runs.dispatcher.ListAgents(dispatcher_pb2.ListAgentsRequest(), metadata=user.bearer)).agents}
        for user in (free, business)
    ]
    assert shown[1] - shown[0] == {"advanced"}
    assert (await runs.ended(business, (await runs.start(business, "advanced")).run_id))[-1]["type"] == "agent_completed"


def _advanced_for(*tiers: str) -> Callable[[auth_pb2.Policy], None]:
    def edit(policy: auth_pb2.Policy) -> None:
        for feature in policy.features:
            if feature.feature == "advanced_agents":
                feature.tiers[:] = tiers

    return edit


async def test_an_agent_that_does_a_part_needs_its_feature_too(services: Services) -> None:
    await services.all(**MORE)
    admin, runs, free = await Administrator(services).signed_in(), Runs(services), await services.user(tier="free")
    run = await runs.start(free, "delegating")
    await begun(1)
    await admin.change_everywhere(_advanced_for("free"))
    RELEASED["asked"].set()
    assert (await runs.ended(free, run.run_id))[-1]["data"]["result"] == [["PERMISSION_DENIED", "advanced_agents"], "done"]


@pytest.mark.parametrize(
    ("edit", "missing"),
    [(_advanced_for("internal"), {"feature": "advanced_agents", "tiers": "internal"}),
     (without("user", "business", "runs:write"), {"permission": "runs:write", "tiers": "free,early,enterprise,internal"})],
)  # fmt: skip
async def test_what_was_lost_while_a_run_waited_counts_when_it_begins(
    services: Services, edit: Callable[[auth_pb2.Policy], None], missing: dict[str, str]
) -> None:
    await services.all(**MORE)
    admin, runs, user = await Administrator(services).signed_in(), Runs(services), await services.user(tier="business")
    first = await start(runs, user, "first")
    second = await runs.start(user, "advanced", thread_id=first.thread_id)
    await begun(1)
    await admin.change_everywhere(edit)
    RELEASED["first"].set()
    # what has begun goes on
    assert (await runs.ended(user, first.run_id))[-1]["type"] == "agent_completed"
    events = await runs.ended(user, second.run_id)
    assert [event["type"] for event in events] == ["agent_failed"]
    assert (events[0]["data"]["error"]["code"], events[0]["data"]["error"]["details"]) == ("PERMISSION_DENIED", missing)


def _rule(policy: auth_pb2.Policy) -> None:
    policy.tools.add(tool="look", tiers=["business"])


async def test_a_tool_rule_counts_for_the_next_call_even_of_a_run_that_goes_on(services: Services) -> None:
    await services.all(**MORE)
    admin, runs, free = await Administrator(services).signed_in(), Runs(services), await services.user(tier="free")
    run = await runs.start(free, "looking")
    await begun(1)
    await admin.change_everywhere(_rule)
    RELEASED["looked"].set()
    events = await runs.ended(free, run.run_id)
    assert events[-1]["data"]["result"] == ["ok", "PERMISSION_DENIED business"]
    assert [event["data"]["status"] for event in events if event["type"] == "tool_completed"] == ["success", "denied"]


async def test_an_interactive_call_is_refused_by_rule_and_by_number(services: Services) -> None:
    await services.all(**MORE)
    admin, runs, free = await Administrator(services).signed_in(), Runs(services), await services.user(tier="free")
    await admin.change_everywhere(limited("free", tool_calls_per_minute=3))

    async def call() -> dispatcher_pb2.ExecuteToolResponse:
        request = dispatcher_pb2.ExecuteToolRequest(request_id=ids.uuid7(), tool_name="look")
        return await runs.dispatcher.ExecuteTool(request, metadata=free.bearer, wait_for_ready=True)

    assert [(await call()).status for _ in range(3)] == ["success"] * 3
    fourth = await call()
    assert (fourth.status, fourth.error.code) == ("error", "RATE_LIMITED")
    await admin.change_everywhere(_rule)
    denied = await refused(call())
    assert (denied.code, denied.details) == ("PERMISSION_DENIED", {"tiers": "business", "tool": "look"})
    listed = await runs.dispatcher.ListTools(dispatcher_pb2.ListToolsRequest(), metadata=free.bearer)
    assert "look" not in {found.name for found in listed.tools}


async def test_a_run_begun_with_a_narrowed_token_can_do_no_more_than_the_token(services: Services) -> None:
    await services.all(**MORE)
    admin, runs, user = await Administrator(services).signed_in(), Runs(services), await services.user(tier="free")
    RELEASED["looked"] = asyncio.Event()
    RELEASED["looked"].set()
    seen = {}
    for scopes in (["runs:write", "events:read"], ["runs:write", "events:read", "tools:execute"]):
        key = await admin.stub.CreateApiKey(auth_pb2.CreateApiKeyRequest(name="key", scopes=scopes), metadata=user.bearer)
        grant = auth_pb2.IssueTokenRequest(api_key=auth_pb2.ApiKeyGrant(api_key=key.api_key))
        token = (await admin.stub.IssueToken(grant)).tokens.access_token
        program = User(user.user_id, user.email, "", token, "")
        events = await runs.ended(user, (await runs.start(program, "looking")).run_id)
        seen[len(scopes)] = events[-1]["data"]["result"]
    assert seen == {2: ["PERMISSION_DENIED", "PERMISSION_DENIED"], 3: ["ok", "ok"]}
