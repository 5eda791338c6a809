"""The data of events against kinds.proto: every kind, right and wrong."""

from __future__ import annotations

import types
from typing import Any

import orjson
import pytest
from google.protobuf import json_format

from netra import errors, ids
from netra.events.v1 import kinds_pb2
from services.dispatcher import kinds

_ERROR = {"code": "NOT_FOUND", "message": "m", "details": {}}
_BY = {"agent_id": "a", "agent_name": "n"}
GOOD: dict[str, dict[str, Any]] = {
    "agent_started": {"status": "started", "agent_version": "1.0.0", "message": "m", "depth": 0},
    "agent_thinking": {"reasoning": "r", "step_number": 1, "progress_percentage": 5, "status": "thinking"},
    "agent_delta": {"text": "t"},
    "tool_executing": {"tool_name": "t", "tool_version": "1", "tool_call_id": "c", "parameters": {"x": [1]}, "status": "executing"},
    "tool_progress": {"tool_name": "t", "tool_call_id": "c", "status": "executing", "progress_percentage": 5.5},
    "tool_completed": {
        "tool_name": "t", "tool_call_id": "c", "status": "error", "error": _ERROR, "execution_time_ms": 1.5, "attempts": 1,
        "enforcement": {"tier": "trusted", "backend": "asyncio"},
    },
    "message_created": {"message_id": "m", "role": "user", "content": "c"},
    "agent_suspended": {"status": "suspended", "waits_for": "message"},
    "agent_resumed": {"status": "resumed", "reason": "approval", "suspended_ms": 1.0},
    "approval_requested": {"approval_id": "a", "message": "m", "tool_name": "t", "parameters": {}},
    "approval_resolved": {"approval_id": "a", "decision": "approve", "by": "u"},
    "quality_alert": {"severity": "warning", "metric": "m", "current_value": 0.1, "threshold": 0.5, "message": "m"},
    "security_violation": {"violation": "PERMISSION_DENIED", "message": "m", "details": {"x": 1}},
    "agent_completed": {
        "status": "completed", "result": [1, {"x": None}], "execution_time_ms": 1,
        "usage": {"steps": 1, "tools": 0, "tokens": 0, "cost": 0.0},
    },
    "agent_failed": {"error": _ERROR, "message": "m"},
    "agent_timed_out": {"error": _ERROR, "message": "m"},
    "agent_cancelled": {"by": "user", "tools_stopped": [{"tool_call_id": "c", "after_ms": 1.0, "confirmed": True}], "after_ms": 2.0},
}  # fmt: skip
# what no kind of that name may leave out or have
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("agent_started", {"depth": "0"}, "data.depth"),
    ("agent_thinking", {"step_number": 1.5}, "data.step_number"),
    ("agent_thinking", {"reasoning": None}, "data.reasoning"),
    ("tool_executing", {"parameters": [1]}, "data.parameters"),
    ("tool_completed", {"status": "fine"}, "data.status"),
    ("tool_completed", {"error": {**_ERROR, "code": 1}}, "data.error.code"),
    ("tool_completed", {"enforcement": {"tier": "none", "backend": "x"}}, "data.enforcement.tier"),
    ("message_created", {"role": "admin"}, "data.role"),
    ("agent_cancelled", {"tools_stopped": [{"tool_call_id": "c", "after_ms": 1.0}]}, "data.tools_stopped.0"),
    ("agent_completed", {"usage": {"steps": 1}}, "data.usage"),
    ("quality_alert", {"severity": "loud"}, "data.severity"),
    ("security_violation", {"details": "x"}, "data.details"),
    ("agent_suspended", {"waits_for": "godot"}, "data.waits_for"),
]


def test_every_kind_of_the_contract_is_known() -> None:
    assert set(GOOD) == kinds.KINDS


@pytest.mark.parametrize("kind", sorted(GOOD))
def test_right_data_passes_and_is_what_the_proto_says(kind: str) -> None:
    data = {**_BY, **GOOD[kind]}
    kinds.check(kind, data)
    message = getattr(kinds_pb2, "".join(word.title() for word in kind.split("_")))()
    json_format.ParseDict(data, message)


@pytest.mark.parametrize("kind", sorted(GOOD))
def test_another_field_is_refused(kind: str) -> None:
    with pytest.raises(errors.InvalidPayload, match=kind):
        kinds.check(kind, {**_BY, **GOOD[kind], "more": 1})


@pytest.mark.parametrize("kind", sorted(GOOD))
def test_whose_it_is_cannot_be_left_out(kind: str) -> None:
    with pytest.raises(errors.InvalidPayload, match="agent_name"):
        kinds.check(kind, {"agent_id": "a", **GOOD[kind]})


@pytest.mark.parametrize(("kind", "wrong", "field"), WRONG)
def test_wrong_data_is_refused_by_its_field(kind: str, wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidPayload) as caught:
        kinds.check(kind, {**_BY, **GOOD[kind], **wrong})
    assert caught.value.details["field"] == field


def test_ids_are_strings() -> None:
    kinds.check("agent_delta", {"agent_id": ids.RunId.new(), "agent_name": "n", "text": "t"})


def test_the_words_of_a_wrong_value_are_not_repeated() -> None:
    with pytest.raises(errors.InvalidPayload) as caught:
        kinds.check("message_created", {**_BY, **GOOD["message_created"], "role": "my secret"})
    assert "my secret" not in caught.value.message


def test_kinds_of_an_agents_own_promise_nothing() -> None:
    kinds.check("my_kind", {"anything": [1]})


@pytest.mark.parametrize("kind", sorted(GOOD))
def test_what_is_written_is_the_data(kind: str) -> None:
    data = {**_BY, **GOOD[kind]}
    assert kinds.written(kind, data) == orjson.dumps(data)


def test_what_is_large_is_written_once_and_never_read(monkeypatch: pytest.MonkeyPatch) -> None:
    written, read, rows = [], [], [{"x": "y" * 100}] * 1000

    def dumps(value: Any) -> bytes:
        written.append(value)
        return orjson.dumps(value)

    def loads(text: bytes) -> Any:
        read.append(len(text))
        return orjson.loads(text)

    monkeypatch.setattr(kinds, "orjson", types.SimpleNamespace(dumps=dumps, loads=loads, Fragment=orjson.Fragment))
    data = {**_BY, **GOOD["agent_completed"], "result": rows}
    assert orjson.loads(kinds.written("agent_completed", data))["result"] == rows
    assert (sum(value is rows for value in written), sum(read) < 1000) == (1, True)
