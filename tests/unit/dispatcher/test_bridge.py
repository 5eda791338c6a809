"""What a run tells its record: one method per kind, masked, checked, by reference when large."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable

import orjson
import pytest

from netra import errors
from services.dispatcher import journal, kinds, ledger, outbox
from services.dispatcher.tools import dispatch, results
from tests.fixtures import lives
from tests.fixtures.told import CALL, HOW, PLAIN, World, outcome

KIB = 1024
USED = {"steps": 1, "tools": 1, "tokens": 0, "cost": 0.0}
TOLD: dict[str, Callable[[journal.AgentWebSocketBridge], None]] = {
    "agent_started": lambda bridge: bridge.started(0, "begins"),
    "agent_thinking": lambda bridge: bridge.thinking("r", 1, 50.0, "1:think"),
    "tool_executing": lambda bridge: bridge.tool_executing(CALL, "2:tool", False),
    "tool_progress": lambda bridge: bridge.tool_progress(CALL, 10.0, "m", transient=False),
    "tool_completed": lambda bridge: bridge.tool_completed(outcome({"a": 1}), HOW, "2:tool"),
    "message_created": lambda bridge: bridge.message_created("m", "user", "content"),
    "agent_suspended": lambda bridge: bridge.suspended("approval", approval_id="a"),
    "agent_resumed": lambda bridge: bridge.resumed("approval", 1.5),
    "approval_requested": lambda bridge: bridge.approval_requested("a", "may I?", CALL),
    "approval_resolved": lambda bridge: bridge.approval_resolved("a", "reject", comment="no"),
    "agent_completed": lambda bridge: bridge.completed(results.Result({"x": 1}), 2.5, USED),
    "agent_failed": lambda bridge: bridge.failed(errors.NotFound(field="x")),
    "agent_timed_out": lambda bridge: bridge.timed_out(errors.DeadlineExceeded()),
    "agent_cancelled": lambda bridge: bridge.cancelled("user", [{"tool_call_id": "c", "after_ms": 1.0, "confirmed": True}], 2.0),
}
BESIDE: dict[str, Callable[[journal.AgentWebSocketBridge], None]] = {
    "quality_alert": lambda bridge: bridge.quality_alert("warning", "score", 0.2, 0.5, "m"),
    "security_violation": lambda bridge: bridge.security_violation("PERMISSION_DENIED", "m", {"password": "p"}),
}
SHOWN: dict[str, Callable[[journal.AgentWebSocketBridge], None]] = {
    "agent_delta": lambda bridge: bridge.delta("some"),
    "tool_progress": lambda bridge: bridge.tool_progress(CALL, None, "m"),
}


@pytest.fixture
def world() -> World:
    """A fresh one."""
    return World()


def test_there_is_a_method_for_every_kind() -> None:
    assert {*TOLD, *BESIDE, *SHOWN} == kinds.KINDS


@pytest.mark.parametrize("kind", sorted(TOLD))
async def test_each_kind_is_told_as_its_contract_says(world: World, kind: str) -> None:
    TOLD[kind](world.bridge.under("other"))
    ((told, data),) = await world.told()
    kinds.check(kind, data)
    assert (told, data["agent_id"], data["agent_name"]) == (kind, world.run_id, "other")


@pytest.mark.parametrize("kind", sorted(BESIDE))
async def test_what_belongs_to_no_run_goes_with_the_context(world: World, kind: str) -> None:
    BESIDE[kind](world.bridge)
    assert await world.told() == []
    (request,) = world.far.requests
    (token,) = world.far.tokens
    assert (request.run_id, request.epoch, request.first_seq, token and token()) == ("", 0, 0, "context token")
    kinds.check(kind, orjson.loads(request.events[0].data))
    assert b'"p"' not in request.events[0].data


@pytest.mark.parametrize("kind", sorted(SHOWN))
async def test_what_is_not_recorded_says_after_what_it_comes(world: World, kind: str) -> None:
    world.far.at_once = False
    world.bridge.started(0, "begins")
    world.bridge.step("1:sleep", None)
    world.bridge.message_created("m", "user", "c")
    SHOWN[kind](world.bridge)
    (request,) = world.far.shown
    assert (request.transients[0].type, request.transients[0].after_seq, len(request.events)) == (kind, 2, 0)
    kinds.check(kind, orjson.loads(request.transients[0].data))


async def test_what_is_not_recorded_is_dropped_when_it_is_large_or_the_record_is_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.bridge.delta("x" * 17 * KIB)
    monkeypatch.setattr(outbox, "_LATE_S", 0.01)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    await world.late()
    world.bridge.delta("late")
    assert world.far.shown == []


async def test_wrong_data_is_refused_by_its_field_and_leaves_no_hole(world: World) -> None:
    with pytest.raises(errors.InvalidPayload) as caught:
        world.bridge.thinking("r", 1, "half", "1:think")  # type: ignore[arg-type]
    assert caught.value.details["field"] == "data.progress_percentage"
    world.bridge.started(0, "begins")
    assert [kind for kind, _ in await world.told()] == ["agent_started"]
    assert world.far.requests[0].first_seq == 1


async def test_an_agents_own_kinds_pass_and_ours_do_not(world: World) -> None:
    world.bridge.custom("my_kind", {"x": 1, "rows": [{"api_key": "k"}]})
    with pytest.raises(errors.InvalidPayload, match="agent_completed"):
        world.bridge.custom("agent_completed", {})
    ((kind, data),) = await world.told()
    assert (kind, data["x"], data["rows"], data["masked"]) == ("my_kind", 1, [{"api_key": "***"}], ["data.rows[0].api_key"])


async def test_secrets_are_masked_in_the_event_and_whole_in_the_step(world: World) -> None:
    value = {"session_token": "s", "rows": [{"cookie": "c"}]}
    world.bridge.tool_executing(CALL, "2:tool", False)
    world.bridge.tool_completed(outcome(value), HOW, "1:tool")
    world.bridge.tool_completed(outcome(error=errors.ToolFailed("m", password="p", why="w")), HOW, "2:tool")
    world.bridge.completed(results.Result(value), 1.0, USED)
    events = [data for _, data in await world.told()]
    assert events[0]["parameters"] == {"api_key": "***", "list": [{"token": "***", "n": 1}]}
    assert events[0]["masked"] == ["parameters.api_key", "parameters.list[0].token"]
    assert events[1]["result"] == events[3]["result"] == {"session_token": "***", "rows": [{"cookie": "***"}]}
    assert events[1]["masked"] == ["result.session_token", "result.rows[0].cookie"]
    assert (events[2]["error"]["details"], events[2]["masked"]) == ({"password": "***", "why": "w"}, ["error.details.password"])
    assert world.far.steps["1:tool"]["result"] == value
    assert world.far.steps["2:tool"]["error"]["details"]["password"] == "p"


async def test_the_preview_of_a_large_result_shows_no_secret(world: World) -> None:
    value = {"password": "hidden", "rows": ["x" * 100] * 4000}
    text = orjson.dumps(value)
    kept = results.Result(value, await world.keep("", "x.json", results.MEDIA_TYPE, text), results.preview_of(text))
    world.bridge.completed(kept, 1.0, USED)
    ((_, data),) = await world.told()
    assert data["preview"].startswith('{"password":"***","rows":["xxx')
    assert (len(data["preview"]), data["masked"]) == (2048, ["result.password"])


LARGE = "é" * (257 * KIB // 2)
IN_PARTS = [(f"part {number}", "x" * 4000) for number in range(70)]


def large(field: str) -> tuple[Callable[[journal.AgentWebSocketBridge], None], bytes, str]:
    """What tells a kind with this field too large, the field as it is kept, and its media type."""
    call = dispatch.Call(CALL.tool_call_id, "tool", "1.0.0", dict(IN_PARTS))
    error = errors.ToolFailed("m")
    error.details = dict(IN_PARTS)
    stopped = [{"tool_call_id": str(number) * 8, "after_ms": 1.0, "confirmed": True} for number in range(6000)]
    return {
        "reasoning": (lambda bridge: bridge.thinking(LARGE, 1, None, "1:think"), LARGE.encode(), "text/plain; charset=utf-8"),
        "content": (lambda bridge: bridge.message_created("m", "user", LARGE), LARGE.encode(), "text/plain; charset=utf-8"),
        "parameters": (lambda bridge: bridge.tool_executing(call, "1:tool", True), orjson.dumps(call.arguments), "application/json"),
        "error": (
            lambda bridge: bridge.tool_completed(outcome(error=error), HOW, "1:tool"),
            orjson.dumps(journal.error_data(error)),
            "application/json",
        ),
        "tools_stopped": (lambda bridge: bridge.cancelled("user", stopped, 1.0), orjson.dumps(stopped), "application/json"),
    }[field]


@pytest.mark.parametrize("field", ["reasoning", "content", "parameters", "error", "tools_stopped"])
async def test_what_is_large_goes_by_reference_and_in_order(world: World, field: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    tell, text, media_type = large(field)
    world.bridge.started(0, "begins")
    # these wait behind the first one, and would go together
    world.bridge.message_created("m", "user", "before")
    tell(world.bridge)
    world.bridge.message_created("m", "assistant", "after")
    (_, first), (_, before), (kind, data), *last = await world.told()
    ((name, kept_type, kept),) = world.files.values()
    assert (kept, kept_type, name.partition(".")[0]) == (text, media_type, field)
    assert data[f"{field}_ref"] == {
        "artifact_id": "artifact 0", "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest(), "media_type": media_type,
    }  # fmt: skip
    assert data[f"{field}_preview"] == results.preview_of(text)
    assert field not in data
    assert (first["status"], before["content"]) == ("started", "before")
    # nothing comes after an end
    assert [data["content"] for _, data in last] == ([] if field == "tools_stopped" else ["after"])
    kinds.check(kind, data)
    assert [request.first_seq for request in world.far.requests] == [1, 2, 3]
    assert all(len(step.result) < 4 * KIB for request in world.far.requests for step in request.steps)


async def test_a_result_of_the_most_that_is_told_whole_is_told_whole(world: World) -> None:
    value = "x" * (256 * KIB - 2)
    world.bridge.tool_completed(outcome(value), HOW, "1:tool")
    ((_, data),) = await world.told()
    assert (data["result"], world.files) == (value, {})


async def test_keeping_waits_for_a_part_of_the_platform_that_is_away(world: World) -> None:
    world.refusals = [errors.Unavailable(), errors.DeadlineExceeded()]
    large("content")[0](world.bridge)
    ((_, data),) = await world.told()
    assert "content_ref" in data


@pytest.mark.parametrize("refusal", [errors.TooLarge("too much"), errors.QuotaExceeded("full")])
async def test_what_cannot_be_kept_is_told_and_can_be_mended(world: World, refusal: errors.NetraError) -> None:
    world.bridge.started(0, "begins")
    world.refusals = [refusal]
    large("content")[0](world.bridge)
    with pytest.raises(type(refusal), match=refusal.message):
        await world.told()
    world.bridge.mend()
    world.bridge.failed(errors.AgentFailed("mended"))
    assert [kind for kind, _ in await world.told()] == ["agent_started", "agent_failed"]
    assert [request.first_seq for request in world.far.requests] == [1, 2]


async def test_an_event_of_many_fields_that_nothing_can_be_taken_from_is_refused(world: World) -> None:
    world.bridge.custom("my_kind", {f"field_{number}": "x" * 1000 for number in range(400)})
    with pytest.raises(errors.TooLarge, match="my_kind"):
        await world.told()


async def test_secrets_in_arguments_are_not_kept(world: World) -> None:
    world.bridge.tool_executing(CALL, "1:tool", True)
    await world.told()
    (call,) = ledger.read((step.key, step.result) for request in world.far.requests for step in request.steps).values()
    assert (call.arguments, call.whole) == ({"api_key": "***", "list": [{"token": "***", "n": 1}]}, False)


async def test_a_call_that_is_made_again_is_told_once(world: World) -> None:
    world.bridge.tool_executing(PLAIN, "1:tool", True)
    world.bridge.tool_again(PLAIN, "1:tool", 2)
    await world.bridge.barrier()
    world.bridge.tool_completed(dataclasses.replace(outcome(1), attempts=2), HOW, "1:tool", settled="repeat")
    (began, _), (ended, data) = await world.told()
    assert (began, ended, data["attempts"], data["settled"]) == ("tool_executing", "tool_completed", 2, "repeat")
    assert sorted(world.far.steps) == ["1:tool", "1:tool~1", "1:tool~2"]
    (call,) = ledger.read((step.key, step.result) for request in world.far.requests for step in request.steps).values()
    assert (call.state, call.attempts, call.kept) == (ledger.State.COMMITTED, 2, {"status": "success", "result": 1})


async def test_who_leaves_a_run_tells_what_was_told_and_nothing_of_its_own_going(world: World) -> None:
    world.far.at_once = False
    world.bridge.started(0, "begins")
    world.bridge.tool_executing(PLAIN, "1:tool", False)
    world.bridge.leave()
    world.bridge.tool_completed(outcome(error=errors.Cancelled()), HOW, "1:tool")
    world.far.answer()
    assert [kind for kind, _ in await world.told()] == ["agent_started", "tool_executing"]
    assert sorted(world.far.steps) == ["1:tool~1"]
