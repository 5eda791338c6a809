"""What the steps of a run say of its calls, and what a successor does with each of them."""

from __future__ import annotations

import dataclasses
import itertools
import uuid
from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from netra import ids
from netra.tool import Settled, ToolContext, ToolSpec, tool
from services.dispatcher import ledger
from services.dispatcher.ledger import State, Way

CALL_ID = ids.uuid7()
HOW = {"tier": "trusted", "backend": "asyncio"}


@tool()
async def reader() -> int:
    """Changes nothing."""
    return 1


async def found_out(context: ToolContext, arguments: Mapping[str, Any]) -> Settled | None:
    """Does not know."""
    return None


PLAIN = dataclasses.replace(reader, side_effects=True)
IDEMPOTENT = dataclasses.replace(PLAIN, idempotent=True)
ASKED = dataclasses.replace(PLAIN, reconcile=found_out)
ASKED_IDEMPOTENT = dataclasses.replace(ASKED, idempotent=True)
SPECS = {"gone": None, "reader": reader, "plain": PLAIN, "idempotent": IDEMPOTENT, "asked": ASKED, "asked and idempotent": ASKED_IDEMPOTENT}


def intent(key: str = "1:tool:pay", **more: Any) -> ledger.Intent:
    """That a call begins."""
    return ledger.Intent(key, "pay", "1.2.0", CALL_ID, {"cents": 5}, **more)


def outcome(key: str = "1:tool:pay", status: str = "success", attempts: int = 1, **kept: Any) -> tuple[str, bytes]:
    """The step that keeps an outcome."""
    about: dict[str, Any] = {"tool": "pay", "version": "1.2.0", "tool_call_id": CALL_ID, "attempts": attempts, "execution_time_ms": 2.5}
    about["enforcement"] = HOW
    return key, orjson.dumps(ledger.committed(key, {"status": status, **kept}, **about))


def one(*steps: tuple[str, bytes]) -> ledger.Call:
    """The only call that steps tell of."""
    ((key, call),) = ledger.read(steps).items()
    assert key == call.key
    return call


def left(state: State = State.STARTED, *, whole: bool = True) -> ledger.Call:
    """A call that an owner left."""
    return ledger.Call("k", state, "pay", "1.0.0", CALL_ID, 1, {}, whole)


def test_a_key_is_of_one_step_of_one_run_whoever_makes_the_call() -> None:
    runs = [ids.uuid7(), ids.uuid7()]
    calls = list(itertools.product(runs, ["1:tool:pay", "2:tool:pay"]))
    keys = [ledger.effect_key(*call) for call in calls]
    assert len({*keys}) == 4
    assert keys == [ledger.effect_key(*call) for call in calls]
    assert {uuid.UUID(key).version for key in keys} == {5}


def test_an_intent_says_all_that_is_needed_to_make_the_call_again() -> None:
    call = one(intent().step())
    assert call == ledger.Call("1:tool:pay", State.STARTED, "pay", "1.2.0", CALL_ID, 1, {"cents": 5}, True)
    assert call.is_open


def test_what_was_left_out_of_the_arguments_is_known_to_be_missing() -> None:
    call = one(intent(whole=False).step())
    assert (call.whole, call.arguments) == (False, {"cents": 5})


def test_arguments_that_no_call_may_have_are_not_kept() -> None:
    large = dataclasses.replace(intent(), arguments={"x": "x" * 300_000})
    key, kept = large.step()
    assert len(kept) < 1000
    call = one((key, kept))
    assert (call.whole, call.arguments, call.tool_call_id) == (False, {}, CALL_ID)


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_last_owner_counts_whatever_the_order_of_the_steps(order: tuple[int, ...]) -> None:
    steps = [intent(attempt=attempt).step() for attempt in (1, 2, 3)]
    assert len({key for key, _ in steps}) == 3
    assert one(*(steps[place] for place in order)).attempts == 3


@pytest.mark.parametrize("status", ["success", "error", "timeout", "denied", "cancelled", "unknown"])
@pytest.mark.parametrize("reverse", [False, True])
def test_an_outcome_closes_its_call(status: str, reverse: bool) -> None:
    steps = [intent().step(), outcome(status=status, attempts=2, result={"paid": 5})]
    call = one(*(reversed(steps) if reverse else steps))
    assert call.state == (State.UNKNOWN if status == "unknown" else State.COMMITTED)
    assert (call.kept, call.attempts, call.execution_time_ms) == ({"status": status, "result": {"paid": 5}}, 2, 2.5)
    assert (call.arguments, call.whole, call.is_open, call.enforcement) == ({"cents": 5}, True, False, HOW)


def test_an_outcome_needs_no_intent() -> None:
    call = one(outcome(result=1))
    assert (call.state, call.tool_call_id, call.kept) == (State.COMMITTED, CALL_ID, {"status": "success", "result": 1})


def test_other_steps_are_no_calls() -> None:
    others = [("1:think", b"null"), ("2:x", b'{"tool_call":7}'), ("3:x", b'{"tool_call":{"a":1}}'), ("4:x", b"[1]"), ("5:x", b'"s"')]
    assert ledger.read([*others, outcome()]).keys() == {"1:tool:pay"}


def test_calls_are_told_apart_by_their_keys() -> None:
    calls = ledger.read([intent("1:tool:pay").step(), intent("2:tool:pay").step(), outcome("2:tool:pay")])
    assert {key: call.state for key, call in calls.items()} == {"1:tool:pay": State.STARTED, "2:tool:pay": State.COMMITTED}


@pytest.mark.parametrize("state", [State.COMMITTED, State.UNKNOWN])
@pytest.mark.parametrize("name", SPECS)
def test_what_is_over_is_never_made_again(state: State, name: str) -> None:
    assert ledger.way(left(state), SPECS[name]) is Way.RETURN


# are its arguments whole, and may it be made again
ASKED_FOR = ((True, True), (False, True), (True, False))
WAYS = {
    "gone": (Way.REPORT, Way.REPORT, Way.REPORT),
    "reader": (Way.REPEAT, Way.DROP, Way.DROP),
    "plain": (Way.REPORT, Way.REPORT, Way.REPORT),
    "idempotent": (Way.REPEAT, Way.REPORT, Way.REPORT),
    "asked": (Way.ASK, Way.ASK, Way.ASK),
    "asked and idempotent": (Way.ASK, Way.ASK, Way.ASK),
}


@pytest.mark.parametrize("state", [State.INTENT, State.STARTED])
@pytest.mark.parametrize("name", WAYS)
def test_what_is_open_goes_the_way_its_tool_declares(state: State, name: str) -> None:
    found = [
        ledger.way(left(state, whole=whole), SPECS[name], again=again) for whole, again in ((True, True), (False, True), (True, False))
    ]
    assert tuple(found) == WAYS[name]


@pytest.mark.parametrize(
    ("settled", "spec", "ways"),
    [
        (Settled(True, 1), ASKED, (Way.RETURN, Way.RETURN, Way.RETURN)),
        (Settled(True, 1), ASKED_IDEMPOTENT, (Way.RETURN, Way.RETURN, Way.RETURN)),
        (Settled(False), ASKED, (Way.REPEAT, Way.DROP, Way.DROP)),
        (Settled(False), ASKED_IDEMPOTENT, (Way.REPEAT, Way.DROP, Way.DROP)),
        (None, ASKED, (Way.REPORT, Way.REPORT, Way.REPORT)),
        (None, ASKED_IDEMPOTENT, (Way.REPEAT, Way.REPORT, Way.REPORT)),
    ],
)
def test_what_its_tool_says_decides(settled: Settled | None, spec: ToolSpec, ways: tuple[Way, Way, Way]) -> None:
    found = [ledger.asked(left(whole=whole), spec, settled, again=again) for whole, again in ASKED_FOR]
    assert tuple(found) == ways


def test_of_a_call_without_an_intent_nobody_knows() -> None:
    call = ledger.unlabelled("pay", CALL_ID)
    assert (call.is_open, call.key, call.tool_call_id) == (True, "", CALL_ID)
    assert {name: ledger.way(call, spec) for name, spec in SPECS.items() if name in ("plain", "idempotent")} == {
        "plain": Way.REPORT, "idempotent": Way.REPORT,
    }  # fmt: skip


def test_of_calls_that_nobody_asks_for_nothing_is_kept() -> None:
    asked = dataclasses.replace(intent("1:tool:pay"), tool_call_id="asked for")
    reading = ledger.Reading({"asked for"})
    for _, result in (asked.step(), intent("2:tool:pay").step(), outcome("2:tool:pay"), ("3:think", b"null")):
        reading.add(result)
    assert reading.calls().keys() == {"1:tool:pay"}
