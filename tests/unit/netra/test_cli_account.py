"""Why a run took as long as it did and ended as it did: read from its record alone."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from rich.console import Console

from netra import errors, show
from netra.account import REMEDIES, Account, account, summary

RUN: dict[str, Any] = {
    "run_id": "01a1fc97-8f66-765d-ad04-30ac679f73c0",
    "thread_id": "t",
    "request_id": "q",
    "kind": "agent",
    "agent": "spend-analyst",
    "state": "failed",
    "created_at": "2026-11-21T05:00:00Z",
    "started_at": "2026-11-21T05:00:01.500Z",
    "ended_at": "2026-11-21T05:00:10.123456789Z",
    "correlation_id": "ba961d9436dea041c647247e42679769",
}


def event(seq: int, at: float, kind: str, agent: str = "spend-analyst", **data: Any) -> dict[str, Any]:
    return {
        "seq": seq,
        "type": kind,
        "timestamp": f"2026-11-21T05:00:{at:09.6f}Z",
        "data": {"agent_id": RUN["run_id"], "agent_name": agent, **data},
    }


def executing(seq: int, at: float, call: str, tool: str, agent: str = "data") -> dict[str, Any]:
    return event(seq, at, "tool_executing", agent, tool_name=tool, tool_call_id=call, parameters={"a": 1}, status="executing")


def completed(seq: int, at: float, call: str, tool: str, took_ms: float, error: dict[str, Any] | None = None) -> dict[str, Any]:
    status = {"status": "error", "error": error} if error else {"status": "success", "result": 1}
    return event(seq, at, "tool_completed", "data", tool_name=tool, tool_call_id=call, execution_time_ms=took_ms, attempts=1, **status)


FAILURE = {"code": "INVALID_PAYLOAD", "message": "line 7: output_tokens is 'x'", "details": {"line": "7", "column": "output_tokens"}}
FAILED = [
    event(1, 1.5, "agent_started", message="begins"),
    event(2, 1.5, "message_created", role="user", content="Where does the money go?"),
    executing(3, 2.0, "c1", "usage_profile"),
    executing(4, 2.0, "c2", "cost_breakdown"),
    completed(5, 5.0, "c1", "usage_profile", 3000),
    completed(6, 9.0, "c2", "cost_breakdown", 7000, FAILURE),
    event(7, 10.0, "agent_failed", error=FAILURE, message=FAILURE["message"]),
]


def drawn(found: Account) -> str:
    console = Console(record=True, width=160, file=io.StringIO())
    show.why(console, found)
    return console.export_text()


def test_time_is_told_by_what_took_it() -> None:
    found = account(RUN, FAILED)
    assert found.total_s == pytest.approx(10.123456)
    assert [(share.what, round(share.seconds, 3)) for share in found.shares] == [
        ("tool cost_breakdown", 7.0),
        ("tool usage_profile", 3.0),
        ("the agent and the platform", 1.623),  # the tools ran side by side: 7 s of 10.123 s, and 1.5 s before
        ("waiting to begin", 1.5),
    ]
    assert [moment.gap_s for moment in found.moments] == pytest.approx([1.5, 0, 0.5, 0, 3, 4, 1])
    assert [call.beside for call in found.calls] == [True, True]


def test_calls_one_after_another_are_not_side_by_side() -> None:
    calls = [executing(1, 1, "c1", "t"), completed(2, 2, "c1", "t", 1000), executing(3, 2, "c2", "t"), completed(4, 3, "c2", "t", 900)]
    found = account(RUN, calls)
    assert [call.beside for call in found.calls] == [False, False]
    assert next(share.seconds for share in found.shares if share.what == "tool t") == pytest.approx(1.9)


def test_a_failure_is_told_with_its_place_and_remedy() -> None:
    found = account(RUN, FAILED)
    assert (found.ending.state, found.ending.code, found.ending.where) == ("failed", "INVALID_PAYLOAD", "tool cost_breakdown of data")
    assert found.ending.details == {"line": "7", "column": "output_tokens"}
    assert found.next_commands[0] == "netra trace ba961d9436dea041c647247e42679769"
    text = drawn(found)
    for words in ("failed after 10.12 s", "Where does the money go?", "line 7: output_tokens is 'x'", "Correct what the message names",
                  "beside others", "69%", "The longest silence, 4.00 s, was before event 6, tool_completed"):  # fmt: skip
        assert words in text, words


def test_a_call_that_failed_for_another_reason_is_not_blamed() -> None:
    other = {"code": "AGENT_FAILED", "message": "no", "details": {}}
    found = account(RUN, [*FAILED[:-1], event(7, 10.0, "agent_failed", error=other, message="no")])
    assert (found.ending.code, found.ending.where) == ("AGENT_FAILED", "")


def test_a_run_that_goes_on_tells_what_it_is_at() -> None:
    running = {**RUN, "state": "running", "ended_at": None}
    found = account(running, FAILED[:5], now=datetime(2026, 11, 21, 5, 0, 30, tzinfo=UTC))
    assert found.ending.state == ""
    assert found.ending.where == "tool cost_breakdown of data since 28.0 s"
    assert found.next_commands[0] == f"netra events {RUN['run_id']} --follow"
    assert "is running and has not ended" in drawn(found)


def test_a_run_that_waits_has_not_begun() -> None:
    waiting = {**RUN, "state": "queued", "started_at": None, "ended_at": None}
    found = account(waiting, [], now=datetime(2026, 11, 21, 5, 0, 30, tzinfo=UTC))
    assert next((share.what, share.seconds) for share in found.shares) == ("waiting to begin", 30.0)
    assert "nothing has begun it yet" in drawn(found)


def test_a_cancelled_run_names_what_may_still_run() -> None:
    stopped = [{"tool_call_id": "c1", "after_ms": 3, "confirmed": True}, {"tool_call_id": "c2", "after_ms": 5, "confirmed": False}]
    found = account(RUN, [event(1, 2, "agent_started"), event(2, 3, "agent_cancelled", by="user", tools_stopped=stopped, after_ms=12.4)])
    assert found.ending.message == "Cancelled by user, over after 12 ms; not known to have stopped: c2."


def test_a_completed_run_offers_its_files() -> None:
    result = {"message": "Done.", "chart": {"artifact_id": "c-1"}, "report": {"artifact_id": "r-1"}}
    found = account(RUN, [event(1, 2, "agent_started"), event(2, 3, "agent_completed", status="completed", result=result)])
    assert (found.ending.state, found.ending.message) == ("completed", "Done.")
    assert [command for command in found.next_commands if "artifacts" in command] == [
        "netra artifacts download c-1",
        "netra artifacts download r-1",
    ]


def test_a_result_that_is_kept_as_a_file_is_told_by_what_was_said() -> None:
    reference = {"artifact_id": "k-1", "bytes": 300000}
    found = account(
        RUN,
        [event(1, 2, "message_created", role="assistant", content="It costs 5 USD."), event(2, 3, "agent_completed", result_ref=reference)],
    )
    assert found.ending.message == "It costs 5 USD."
    assert "netra artifacts download k-1" in found.next_commands


def test_a_run_that_ended_without_a_word_has_nothing_to_read() -> None:
    found = account({**RUN, "state": "failed"}, [])
    assert (found.ending.state, found.ending.message) == ("failed", "It ended without an event.")
    assert found.next_commands == ["netra trace ba961d9436dea041c647247e42679769"]


def test_a_call_of_one_tool_ends_with_it() -> None:
    found = account({**RUN, "kind": "tool", "state": "completed"}, [executing(1, 1, "c", "t"), completed(2, 2, "c", "t", 5)])
    assert (found.ending.state, found.ending.message) == ("completed", "It was a call of one tool.")
    assert "completed" in drawn(found)


def test_the_json_has_no_events_in_it_and_whole_microseconds() -> None:
    found = summary(account(RUN, FAILED))
    assert "data" not in found["moments"][0]
    assert found["total_s"] == 10.123456
    assert found["ending"]["code"] == "INVALID_PAYLOAD"


def test_every_code_that_ends_a_run_has_a_remedy() -> None:
    never_ends_a_run = {"BUSY", "ALREADY_EXISTS", "FENCED", "CANCELLED", "BAD_JSON", "DUPLICATE_KEY", "NOT_AN_OBJECT", "UNKNOWN_TYPE",
                        "BINARY_NOT_SUPPORTED"}  # fmt: skip
    codes = {kind.code for kind in errors._tree(errors.NetraError)}
    assert codes - never_ends_a_run == set(REMEDIES)
