"""What a run tells its record: one method per kind, in order, masked, checked, by reference when large, and no further than the record."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from chassis import lifecycle
from netra import errors, ids
from netra.events.v1 import events_pb2
from netra.tool import Artifact
from services.dispatcher import journal, kinds, ledger, outbox
from services.dispatcher.tools import dispatch, results
from tests.fixtures import lives

KIB = 1024
CALL = dispatch.Call(ids.ToolCallId.new(), "tool", "1.0.0", {"api_key": "k", "list": [{"token": "t", "n": 1}]})

PLAIN = dispatch.Call(CALL.tool_call_id, "tool", "1.0.0", {"text": "x"})


class Far:
    """The record: answers when it is told to, or at once."""

    def __init__(self) -> None:
        self.at_once = True
        self.requests: list[events_pb2.AppendRequest] = []
        self.shown: list[events_pb2.AppendRequest] = []
        self.waiting: list[asyncio.Future[None]] = []
        self.tokens: list[Callable[[], str] | None] = []
        self.arrived = asyncio.Semaphore(0)
        self.refuses: list[errors.NetraError] = []

    def append(self, request: events_pb2.AppendRequest, user_id: str, token: Callable[[], str] | None = None) -> asyncio.Future[None]:
        """Take an append."""
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.requests.append(request)
        self.tokens.append(token)
        self.arrived.release()
        if self.refuses:
            answer.set_exception(self.refuses.pop(0))
        elif self.at_once:
            answer.set_result(None)
        else:
            self.waiting.append(answer)
        return answer

    def show(self, request: events_pb2.AppendRequest, user_id: str) -> None:
        """Show what is not recorded."""
        self.shown.append(request)

    def answer(self) -> None:
        """Acknowledge what waits, and all that comes."""
        self.at_once = True
        for answer in self.waiting:
            answer.set_result(None)
        self.waiting = []

    @property
    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """Kind and data of all events of the run."""
        return [(event.type, orjson.loads(event.data)) for request in self.requests for event in request.events if request.run_id]

    @property
    def steps(self) -> dict[str, Any]:
        """All steps."""
        return {step.key: orjson.loads(step.result) for request in self.requests for step in request.steps}


class World:
    """A bridge, its record and the files of its user."""

    def __init__(self) -> None:
        self.far = Far()
        self.files: dict[str, tuple[str, str, bytes]] = {}
        self.refusals: list[errors.NetraError] = []
        self.run_id = ids.RunId.new()
        owned = outbox.Owned(self.run_id, ids.UserId(ids.uuid7()), 3, lambda: "context token", self.keep)
        self.bridge = journal.AgentWebSocketBridge(self.far, owned, 1, "first", agent_version="1.2.3")

    async def keep(self, origin: str, name: str, media_type: str, content: bytes) -> Artifact:
        """Keep a file, unless a refusal waits."""
        if self.refusals:
            raise self.refusals.pop()
        self.files[f"artifact {len(self.files)}"] = (name, media_type, content)
        return Artifact(f"artifact {len(self.files) - 1}", name, media_type, len(content), hashlib.sha256(content).hexdigest())

    def unopened(self, *refused: errors.NetraError) -> list[int]:
        """A run that is not in the record yet; how many appends there were each time that it was opened apart, but when `refused`."""
        apart, refusals = list[int](), list(refused)

        async def open_apart() -> None:
            apart.append(len(self.far.requests))
            if refusals:
                raise refusals.pop(0)

        opening = outbox.Opening("0" * 32, "0" * 16, open_apart)
        owned = outbox.Owned(self.run_id, ids.UserId(ids.uuid7()), 1, lambda: "context token", self.keep, opening=opening)
        self.bridge = journal.AgentWebSocketBridge(self.far, owned, 1, "first")
        return apart

    async def told(self) -> list[tuple[str, dict[str, Any]]]:
        """All events, once they are recorded."""
        await asyncio.wait_for(self.bridge.barrier(), 5)
        return self.far.events


@pytest.fixture
def world() -> World:
    """A fresh one."""
    return World()


def outcome(value: object = None, error: errors.NetraError | None = None) -> dispatch.Outcome:
    """What became of the call."""
    result = results.Result(value) if error is None else None
    return dispatch.Outcome(CALL, "success" if error is None else "error", result, error, 1.5)


HOW = {"tier": "trusted", "backend": "asyncio"}
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


async def late(world: World) -> None:
    """Returns when the record has said nothing for longer than is borne."""
    async with asyncio.timeout(10):
        while world.bridge.health().unanswered_s <= outbox._LATE_S:  # noqa: ASYNC110 - time itself is waited for
            await asyncio.sleep(0)


async def test_what_is_not_recorded_is_dropped_when_it_is_large_or_the_record_is_away(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.bridge.delta("x" * 17 * KIB)
    monkeypatch.setattr(outbox, "_LATE_S", 0.01)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    await late(world)
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


async def test_an_agent_goes_no_further_than_its_record(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    monkeypatch.setattr(outbox, "_LATE_S", 3600)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    steps = 0

    async def agent() -> None:
        nonlocal steps
        while True:
            await world.bridge.room()
            world.bridge.step(f"{steps}:sleep", None)
            steps += 1
            await asyncio.sleep(0)

    tasks = lifecycle.Tasks()
    tasks.spawn(agent(), "agent")
    for _ in range(500):
        await asyncio.sleep(0)
    # the first one is on its way
    assert (steps, world.bridge.health().waiting) == (63, 63)
    world.far.answer()
    await asyncio.wait_for(world.far.arrived.acquire(), 5)
    for _ in range(100):
        await asyncio.sleep(0)
    assert steps > 63
    await tasks.close()


async def test_an_agent_waits_when_the_record_does_not_answer(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_LATE_S", 0.02)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    await asyncio.wait_for(world.bridge.room(), 1)
    await late(world)
    tasks = lifecycle.Tasks()
    waiting = tasks.spawn(world.bridge.room(), "room")
    await asyncio.wait({waiting}, timeout=0.05)
    assert not waiting.done()
    # what runs already is told all the same: only steps that begin wait
    world.bridge.tool_completed(outcome(1), HOW, "1:tool")
    world.far.answer()
    await asyncio.wait_for(waiting, 1)
    assert len(await world.told()) == 2


async def test_an_agent_whose_record_is_somebody_elses_goes_no_further(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    world.bridge.thinking("r", 1, None, "1:think")
    world.far.waiting[0].set_exception(errors.Fenced("newer"))
    with pytest.raises(errors.Fenced, match="newer"):
        await world.told()
    with pytest.raises(errors.Fenced, match="newer"):
        await asyncio.wait_for(world.bridge.room(), 1)
    waiting = world.bridge.health().waiting
    tell_everything(world.bridge)
    assert (world.bridge.health().waiting, len(world.far.requests), world.far.shown) == (waiting, 1, [])


def tell_everything(bridge: journal.AgentWebSocketBridge) -> None:
    """An event, a step, an event beside and one that is shown."""
    bridge.message_created("m", "user", "c")
    bridge.step("9:sleep", None)
    BESIDE["quality_alert"](bridge)
    bridge.delta("some")


async def test_who_waits_for_a_record_that_breaks_hears_of_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    monkeypatch.setattr(outbox, "_LATE_S", 0.0)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    tasks = lifecycle.Tasks(on_failure=lambda _error: None)
    waiting = tasks.spawn(world.bridge.room(), "room")
    assert not (await asyncio.wait({waiting}, timeout=0.05))[0]
    world.far.waiting[0].set_exception(errors.TooLarge("too much"))
    with pytest.raises(errors.TooLarge, match="too much"):
        await asyncio.wait_for(waiting, 1)


@pytest.mark.parametrize("is_broken", [False, True])
async def test_an_agent_that_only_takes_steps_lets_others_go_on(world: World, is_broken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    if is_broken:
        world.far.waiting[0].set_exception(errors.NotFound("gone"))
        await asyncio.sleep(0)
    turns = 0

    async def agent() -> None:
        nonlocal turns
        # nothing in here waits for anything: without a turn of the loop in each it would never end
        while turns < 50:
            with contextlib.suppress(errors.NotFound):
                await world.bridge.room()
            turns += 1

    tasks, seen = lifecycle.Tasks(), []
    tasks.spawn(agent(), "agent")
    for _ in range(30):
        await asyncio.sleep(0)
        seen.append(turns)
    assert max(seen) < 50
    await tasks.close()


async def test_after_its_end_a_run_tells_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    world.bridge.cancelled("user", [], 1.0)
    # the agent outlived its cancel
    world.bridge.thinking("r", 1, None, "1:think")
    world.bridge.step("2:sleep", None)
    world.bridge.delta("some")
    world.far.answer()
    assert [kind for kind, _ in await world.told()] == ["agent_started", "agent_cancelled"]
    assert ([request.end for request in world.far.requests], world.far.steps, world.far.shown) == ([False, True], {}, [])
    with pytest.raises(errors.FailedPrecondition, match="ended"):
        await world.bridge.room()


async def test_what_is_told_before_the_end_goes_with_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    lives.at_once(monkeypatch)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    world.bridge.step("1:sleep", None)
    world.bridge.failed(errors.AgentFailed("m"))
    world.far.answer()
    await world.told()
    assert [(len(request.events), len(request.steps), request.end) for request in world.far.requests] == [(1, 0, False), (1, 1, True)]


async def test_a_closed_bridge_tells_nothing_and_lets_nobody_wait(world: World) -> None:
    await world.bridge.close()
    tell_everything(world.bridge)
    assert (world.far.requests, world.far.shown, world.bridge.health().waiting) == ([], [], 0)
    with pytest.raises(errors.FailedPrecondition, match="ended"):
        await asyncio.wait_for(world.bridge.room(), 1)


async def test_a_refusal_of_what_belongs_to_no_run_leaves_the_run_alone(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lives.at_once(monkeypatch)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    BESIDE["quality_alert"](world.bridge)
    world.bridge.tool_executing(CALL, "2:tool", False)
    world.far.waiting.pop(1).set_exception(errors.Unauthenticated("ran out"))
    await asyncio.sleep(0)
    await asyncio.wait_for(world.bridge.room(), 1)
    world.bridge.tool_completed(outcome(1), HOW, "1:tool")
    world.far.answer()
    assert [kind for kind, _ in await world.told()] == ["agent_started", "tool_executing", "tool_completed"]
    assert "ran out" in capsys.readouterr().out


def appends(world: World) -> list[tuple[list[str], list[str]]]:
    """Of each append the kinds of its events, and the keys of its steps."""
    return [([event.type for event in request.events], [step.key for step in request.steps]) for request in world.far.requests]


async def test_a_quick_call_without_effects_is_one_append(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world.bridge.tool_executing(PLAIN, "1:tool", False)
    await asyncio.sleep(0)
    assert world.far.requests == []
    world.bridge.tool_completed(outcome(1), HOW, "1:tool")
    await world.told()
    # that it began need not be kept beside how it ended
    assert appends(world) == [(["tool_executing", "tool_completed"], ["1:tool"])]


async def test_a_call_with_effects_is_two_and_its_intent_is_there_first(world: World) -> None:
    world.bridge.tool_executing(PLAIN, "1:tool", True)
    await world.bridge.barrier()
    assert appends(world) == [(["tool_executing"], ["1:tool~1"])]
    world.bridge.tool_completed(outcome(1), HOW, "1:tool")
    await world.told()
    assert appends(world)[1:] == [(["tool_completed"], ["1:tool"])]


async def test_a_barrier_waits_for_what_is_held(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world.bridge.tool_executing(PLAIN, "1:tool", False)
    await asyncio.wait_for(world.bridge.barrier(), 5)
    assert appends(world) == [(["tool_executing"], ["1:tool~1"])]


async def test_what_is_held_is_told_soon_by_itself(world: World) -> None:
    world.bridge.tool_executing(PLAIN, "1:tool", False)
    await asyncio.wait_for(world.far.arrived.acquire(), 5)
    assert appends(world) == [(["tool_executing"], ["1:tool~1"])]


def opens(world: World) -> list[str]:
    """Of each append the trace that it opens the run with; empty when it does not."""
    return [request.open.trace_id if request.HasField("open") else "" for request in world.far.requests]


async def test_the_first_append_of_a_run_opens_it_and_no_other_does(world: World) -> None:
    apart = world.unopened()
    world.bridge.started(0, "begins")
    await world.told()
    world.bridge.thinking("r", 1, None, "1:think")
    await world.told()
    assert (opens(world), apart) == (["0" * 32, ""], [])
    first, second = world.far.tokens
    assert (first and first(), second) == ("context token", None)


async def test_an_older_service_is_asked_to_open_a_run_and_sent_the_append_again(world: World) -> None:
    apart = world.unopened()
    world.far.refuses = [errors.NotFound("There is no such run in the record. Open it first.")]
    world.bridge.started(0, "begins")
    world.bridge.thinking("r", 1, None, "1:think")
    await world.told()
    world.bridge.failed(errors.AgentFailed("m"))
    await world.told()
    assert apart == [1]
    assert [[event.type for event in request.events] for request in world.far.requests] == [
        ["agent_started", "agent_thinking"], ["agent_started", "agent_thinking"], ["agent_failed"],
    ]  # fmt: skip
    assert [request.first_seq for request in world.far.requests] == [1, 1, 3]
    assert opens(world)[1:] == ["", ""]


async def test_a_run_that_another_owner_has_opened_meanwhile_is_not_gone_on_with(world: World) -> None:
    world.unopened(errors.Fenced("newer"))
    world.far.refuses = [errors.NotFound("no")]
    world.bridge.started(0, "begins")
    with pytest.raises(errors.Fenced, match="newer"):
        await world.told()
    assert len(world.far.requests) == 1


async def test_a_first_append_that_is_refused_and_mended_opens_the_run_after_all(world: World) -> None:
    apart = world.unopened()
    world.far.refuses = [errors.InvalidPayload("odd")]
    world.bridge.started(0, "begins")
    with pytest.raises(errors.InvalidPayload, match="odd"):
        await world.told()
    world.bridge.mend()
    world.bridge.failed(errors.AgentFailed("mended"))
    await asyncio.wait_for(world.bridge.barrier(), 5)
    assert (opens(world), apart) == (["0" * 32] * 2, [])


def tell_quietly(bridge: journal.AgentWebSocketBridge) -> None:
    """All that a run without effects tells before its end."""
    bridge.started(0, "begins", ("~started", {"at": 1}))
    bridge.message_created("m", "user", "What now?", ("~request", {"at": 1}))
    bridge.thinking("r", 1, None, "1:think")
    bridge.tool_executing(PLAIN, "2:tool", False)
    bridge.tool_completed(outcome(1), HOW, "2:tool")


QUIET = ["agent_started", "message_created", "agent_thinking", "tool_executing", "tool_completed"]


async def test_what_a_run_without_effects_tells_goes_together(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    tell_quietly(world.bridge)
    await asyncio.sleep(0)
    assert world.far.requests == []
    await world.told()
    assert appends(world) == [(QUIET, ["~started", "~request", "1:think", "2:tool"])]


async def test_an_answer_of_the_record_does_not_hurry_what_is_held(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world.far.at_once = False
    world.bridge.resumed("message", 1.0)
    tell_quietly(world.bridge)
    world.far.answer()
    for _ in range(10):
        await asyncio.sleep(0)
    assert [kinds_ for kinds_, _ in appends(world)] == [["agent_resumed"]]
    # what is not held takes along what is
    world.bridge.custom("my_kind", {})
    assert [kinds_ for kinds_, _ in appends(world)] == [["agent_resumed"], [*QUIET, "my_kind"]]


async def test_what_came_first_is_held_no_longer_for_what_comes_later(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 0.05)
    world.bridge.started(0, "begins")
    # more comes all the time, and each time the timer could be set anew
    async with asyncio.timeout(5):
        while not world.far.requests:
            world.bridge.thinking("r", 1, None, "1:think")
            await asyncio.sleep(0.01)
    assert appends(world)[0][0][0] == "agent_started"
    # and it was not for their number
    assert len(world.far.requests[0].events) < outbox._ENOUGH


async def test_much_is_not_held(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    for number in range(32):
        assert world.far.requests == []
        world.bridge.thinking("r", 1, None, f"{number}:think")
    assert len(world.far.requests[0].events) == 32
    world.bridge.thinking("x" * 200 * KIB, 1, None, "33:think")
    await world.told()
    assert len(world.far.requests) == 2


async def test_an_outcome_goes_with_the_intent_of_the_step_that_follows_it_at_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_BRIEF_S", 3600)
    other = dataclasses.replace(PLAIN, tool_call_id=ids.ToolCallId.new())
    world.bridge.tool_executing(PLAIN, "1:tool", True)
    await world.bridge.barrier()
    world.bridge.tool_completed(dataclasses.replace(outcome(1), call=PLAIN), HOW, "1:tool")
    await asyncio.sleep(0)
    world.bridge.tool_executing(other, "2:tool", True)
    await world.bridge.barrier()
    assert appends(world) == [(["tool_executing"], ["1:tool~1"]), (["tool_completed", "tool_executing"], ["1:tool", "2:tool~1"])]


async def test_an_outcome_does_not_wait_for_long(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world.bridge.tool_executing(PLAIN, "1:tool", True)
    await world.bridge.barrier()
    world.bridge.thinking("r", 1, None, "2:think")
    world.bridge.tool_completed(dataclasses.replace(outcome(1), call=PLAIN), HOW, "1:tool")
    for _ in range(2):
        await asyncio.wait_for(world.far.arrived.acquire(), 5)
    assert [kinds_ for kinds_, _ in appends(world)] == [["tool_executing"], ["agent_thinking", "tool_completed"]]


async def test_what_became_of_an_earlier_owners_call_waits_for_nothing(world: World) -> None:
    world.bridge.tool_completed(outcome(1), HOW, "1:tool", settled="reconcile")
    assert [kinds_ for kinds_, _ in appends(world)] == [["tool_completed"]]


async def test_a_barrier_does_not_wait_for_what_is_told_after_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world.far.at_once = False
    world.bridge.started(0, "begins")
    async with asyncio.TaskGroup() as group:
        barrier = group.create_task(world.bridge.barrier())
        await asyncio.wait_for(world.far.arrived.acquire(), 5)
        world.bridge.thinking("r", 1, None, "1:think")
        assert not barrier.done()
        world.far.waiting[0].set_result(None)
        await asyncio.wait_for(barrier, 5)
    assert world.bridge.health().waiting == 1


async def test_a_barrier_waits_for_all_that_was_told_before_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world.far.at_once = False
    world.bridge.resumed("message", 1.0)
    world.bridge.thinking("r", 1, None, "1:think")
    async with asyncio.TaskGroup() as group:
        barrier = group.create_task(world.bridge.barrier())
        await asyncio.sleep(0)
        world.far.waiting.pop(0).set_result(None)
        await lives.until(lambda: len(world.far.requests) == 2)
        assert not barrier.done()
        world.far.answer()
    assert world.bridge.health().waiting == 0


async def test_what_is_shown_comes_after_what_was_held(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_HELD_S", 3600)
    world.bridge.tool_executing(PLAIN, "1:tool", False)
    world.bridge.tool_progress(PLAIN, 10.0, None)
    assert (len(world.far.requests), world.far.shown[0].transients[0].after_seq) == (1, 1)


async def test_what_is_shown_waits_until_its_run_is_open(world: World) -> None:
    world.unopened()
    world.far.at_once = False
    world.bridge.tool_executing(PLAIN, "1:tool", False)
    world.bridge.tool_progress(PLAIN, 10.0, None)
    await asyncio.wait_for(world.far.arrived.acquire(), 5)
    assert (world.far.requests[0].HasField("open"), world.far.shown) == (True, [])
    world.far.answer()
    await world.told()
    assert [request.transients[0].after_seq for request in world.far.shown] == [1]


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
