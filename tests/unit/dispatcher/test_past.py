"""Steps of earlier owners: found at their places, and what is no difference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson
import pytest

from netra import errors
from services.dispatcher import ledger, past


def kept(steps: Mapping[str, Any]) -> past.Past:
    """A past of these."""
    return past.Past((key, orjson.dumps(result)) for key, result in steps.items())


def intent(key: str, call_id: str, attempt: int = 1) -> tuple[str, bytes]:
    """A call that began."""
    return ledger.Intent(key, "pay", "1.0.0", call_id, {}, attempt=attempt).step()


def over(key: str, call_id: str, value: object) -> tuple[str, bytes]:
    """A call that is over."""
    about = ledger.committed(
        key, {"status": "success", "result": value}, tool="pay", version="1.0.0", tool_call_id=call_id, attempts=1, execution_time_ms=1.0,
        enforcement={}, at=5.0,
    )  # fmt: skip
    return key, orjson.dumps(about)


def test_a_run_that_begins_has_no_past() -> None:
    nothing = past.Past()
    assert nothing.at("1", "think") == "1:think"
    assert nothing.gather("2") == "2:gather"
    assert nothing.found("1:think") == past.Found()
    assert (nothing.unasked(), nothing.open_calls(), nothing.heard(), nothing.numbered("~s")) == ("", [], set(), 0)


def test_steps_of_an_older_process_are_over_all_the_same() -> None:
    found = kept({"1:think": None, "2:sleep": None})
    assert found.found(found.at("1", "think")) == past.Found(over={})
    assert found.unasked() == "2:sleep"


def test_places_whose_numbers_begin_alike_are_told_apart() -> None:
    found = kept({"1:think": {}, "10:sleep": {}, "1.0:1:emit:x": {}} | {"11.0:1:think": {}})
    assert found.at("10", "sleep") == "10:sleep"
    assert found.gather("11") == "11:gather"
    with pytest.raises(errors.NonDeterministicAgent):
        found.at("1", "think")


@pytest.mark.parametrize(
    ("recorded", "place", "name"),
    [("3:think", "3", "sleep"), ("3:child:a/1:think", "3", "child:b"), ("3:tool:a~1", "3", "tool:b"), ("3.0:1:think", "3", "think")],
)
def test_another_step_at_a_place_is_a_difference(recorded: str, place: str, name: str) -> None:
    with pytest.raises(errors.NonDeterministicAgent) as caught:
        kept({recorded: {}}).at(place, name)
    assert caught.value.details == {"field": "step", "recorded": recorded, "asked": f"{place}:{name}"}


def test_a_step_where_there_were_strands_is_a_difference_and_the_other_way_round() -> None:
    with pytest.raises(errors.NonDeterministicAgent):
        kept({"3:think": {}}).gather("3")
    assert kept({"3:gather": {"failed": 1}, "3.1:1:think": {}}).gather("3") == "3:gather"


def test_what_belongs_to_a_step_is_asked_for_with_it() -> None:
    found = kept({"1:sleep~1": {"until": 7}, "2:child:a/1:think": {}, "2:child:a~1": {"ran_s": 1}, "3:tool:t~ask1~1": {}, "~started": {}})
    assert found.found(found.at("1", "sleep")) == past.Found(begun={"until": 7})
    assert found.found(found.at("2", "child:a")).begun == {"ran_s": 1}
    found.at("3", "tool:t")
    assert found.unasked() == "2:child:a/1:think"
    found.skip("2:child:a/")
    assert found.unasked() == ""


def test_below_a_strand_that_was_stopped_nobody_knows_whose_long_places_are() -> None:
    found = kept({f"{'0' * 32}/1:think": {}})
    assert found.unasked() != ""
    found.skip("1.")
    assert found.unasked() == ""


def test_a_call_is_known_as_far_as_it_came() -> None:
    steps = [intent("1:tool:pay", "a"), over("1:tool:pay", "a", 7), intent("2:tool:pay", "b"), intent("2:tool:pay", "b", 2)]
    found = past.Past(steps)
    assert [(call.tool_call_id, call.attempts) for call in found.open_calls()] == [("b", 2)]
    call = found.call("1:tool:pay")
    assert call is not None
    assert (call.kept, call.at, call.stopped) == ({"status": "success", "result": 7}, 5.0, False)
    # what it came to is not kept a second time
    assert found.call("1:tool:pay") is None
    assert found.call("2:tool:pay") is found.call("2:tool:pay") is not None


def test_messages_that_were_taken_and_times_it_was_put_away_are_counted() -> None:
    found = kept({"1:wait_for_message": {"number": 1}, "2:wait_for_message": {"timed_out": True}, "3.0:1:wait_for_message": {"number": 3}}
                 | {"~s1": {}, "~s2": {}, "~r1": {}, "~started": {}})  # fmt: skip
    assert found.heard() == {1, 3}
    assert (found.numbered("~s"), found.numbered("~r")) == (2, 1)
