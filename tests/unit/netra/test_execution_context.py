"""UserExecutionContext: what it refuses, what it never lets change, and that it survives every hop unchanged."""

import asyncio
import dataclasses
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netra import deadline, errors, ids
from netra.context import CALLS, UserExecutionContext, managed
from netra.context.payload import MAX_NESTING, Payload
from netra.context.v1 import context_pb2

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3),
    max_leaves=8,
)


def made(**values: Any) -> UserExecutionContext:
    defaults: dict[str, Any] = {
        "user_id": ids.UserId.new(), "tenant_id": ids.TenantId.new(), "session_id": ids.SessionId.new(),
        "thread_id": ids.ThreadId.new(), "run_id": ids.RunId.new(), "request_id": "m1", "roles": ["user"], "tier": "free",
        "connection_id": ids.ConnectionId.new(), "deadline": datetime.now(UTC) + timedelta(hours=1),
        "agent_context": {"goal": [1, {"deep": "é"}]}, "audit_metadata": {"client": "::1"},
    }  # fmt: skip
    return UserExecutionContext.from_request(**(defaults | values))


def test_it_is_made_by_factories_only() -> None:
    with pytest.raises(TypeError, match="factories"):
        UserExecutionContext()
    with pytest.raises(TypeError):
        dataclasses.replace(made(), tier="internal")


@pytest.mark.parametrize("name", ["user_id", "roles", "tier", "deadline", "_agent_context", "new"])
def test_no_attribute_can_be_set_or_deleted(name: str) -> None:
    context = made()
    with pytest.raises(AttributeError):
        setattr(context, name, "x")
    with pytest.raises(AttributeError):
        delattr(context, name)


def test_it_is_frozen_all_the_way_down_and_shares_nothing() -> None:
    given_away: dict[str, Any] = {"list": [1], "object": {"a": 1}}
    context = made(agent_context=given_away)
    given_away["object"]["a"] = 2
    assert context.agent_context == {"list": (1,), "object": {"a": 1}}
    with pytest.raises(TypeError):
        context.agent_context["object"]["a"] = 3
    with pytest.raises(TypeError):
        context.agent_context["new"] = 3  # type: ignore[index]


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("user_id", "placeholder", errors.PlaceholderValue),
        ("user_id", "00000000-0000-0000-0000-000000000000", errors.PlaceholderValue),
        ("thread_id", " None ", errors.PlaceholderValue),
        ("run_id", "registry", errors.PlaceholderValue),
        ("tier", "default", errors.PlaceholderValue),
        ("roles", ["mock"], errors.PlaceholderValue),
        ("user_id", "", errors.InvalidContext),
        ("user_id", "someone", errors.InvalidContext),
        ("user_id", None, errors.InvalidContext),
        ("request_id", "a b", errors.InvalidContext),
        ("roles", [], errors.InvalidContext),
        ("roles", "user", errors.InvalidContext),
        ("roles", ["user", "user"], errors.InvalidContext),
        ("tier", "Free!", errors.InvalidContext),
        ("deadline", datetime(2020, 1, 1, tzinfo=UTC), errors.InvalidContext),
        ("deadline", datetime(2999, 1, 1), errors.InvalidContext),  # noqa: DTZ001 - that it has no zone is the point
        ("correlation_id", "abc", errors.InvalidContext),
        ("agent_context", [], errors.InvalidContext),
        ("agent_context", b"[]", errors.InvalidContext),
        ("agent_context", b'{"a":1,"a":2}', errors.InvalidContext),
        ("agent_context", b'{"a":NaN}', errors.InvalidContext),
        ("agent_context", b'{"a":1e999}', errors.InvalidContext),
        ("agent_context", b'{"a":"\\ud800"}', errors.InvalidContext),
        ("agent_context", b"\xff", errors.InvalidContext),
        ("agent_context", b'{"a":' + b"[" * 60_000, errors.InvalidContext),
        ("agent_context", {1: 2}, errors.InvalidContext),
        ("agent_context", {"a": object()}, errors.InvalidContext),
        ("agent_context", {"a": "x" * 65_536}, errors.TooLarge),
        ("audit_metadata", {"a": "x" * 16_384}, errors.TooLarge),
    ],
)
def test_each_wrong_field_is_refused_by_name(field: str, value: object, kind: type[errors.NetraError]) -> None:
    with pytest.raises(kind) as refused:
        made(**{field: value})
    assert refused.value.details["field"] == field


@pytest.mark.parametrize(
    "key", ["user_id", "User_Id", " tenant_id", "user", "roles", "tier", "db_session", "websocket_client_id", "created_at"]
)
@pytest.mark.parametrize("field", ["agent_context", "audit_metadata"])
def test_reserved_keys_are_refused(field: str, key: str) -> None:
    with pytest.raises(errors.ReservedKey) as refused:
        made(**{field: {key: "x"}})
    assert refused.value.details["field"] == f"{field}.{key.strip().casefold()}"


def test_a_long_value_with_a_known_prefix_was_meant() -> None:
    assert made(request_id="temp_2026-11-21T00:00:00").request_id.startswith("temp_")


def test_nesting_has_a_limit() -> None:
    deep: Any = 1
    for _ in range(MAX_NESTING + 1):
        deep = [deep]
    with pytest.raises(errors.InvalidContext, match="nested"):
        made(agent_context={"a": deep})


def test_protobuf_round_trip_is_byte_for_byte() -> None:
    for context in (made(), made(connection_id=None, deadline=None, agent_context=None, audit_metadata=None), made().child("op", "m2")):
        wire = context.to_proto().SerializeToString(deterministic=True)
        back = UserExecutionContext.from_proto(context_pb2.ExecutionContext.FromString(wire))
        assert back == context
        assert hash(back) == hash(context)
        assert back.to_proto().SerializeToString(deterministic=True) == wire


def test_claims_round_trip_with_digests_for_the_payloads() -> None:
    context = made(agent_context={"goal": "a" * 60_000})
    claims = json.loads(json.dumps(context.to_claims()))
    back = UserExecutionContext.from_claims(claims)
    assert back == context
    assert back.to_claims() == context.to_claims()
    assert len(json.dumps(claims)) < 1_500
    for read in (lambda: back.agent_context, lambda: back.audit_metadata, back.to_proto, lambda: back.child("op", "m2")):
        with pytest.raises(errors.FailedPrecondition):
            read()


@pytest.mark.parametrize(
    "change",
    [
        {"depth": 11}, {"depth": True}, {"depth": 1}, {"parent_request_id": "m0"}, {"user_id": 1}, {"roles": "user"}, {"extra": 1},
        {"created_at": 1.5}, {"created_at": 10**30}, {"deadline": "x"}, {"agent_context_sha256": "00"}, {"audit_metadata_sha256": None},
    ],
)  # fmt: skip
def test_claims_must_be_exactly_right(change: dict[str, Any]) -> None:
    with pytest.raises(errors.InvalidContext):
        UserExecutionContext.from_claims(made().to_claims() | change)


def test_claims_must_be_complete() -> None:
    claims = made().to_claims()
    for name in claims:
        with pytest.raises(errors.InvalidContext):
            UserExecutionContext.from_claims({key: value for key, value in claims.items() if key != name})


def test_ten_generations_of_children_and_no_eleventh() -> None:
    root = made()
    youngest = root
    for generation in range(1, 11):
        parent, youngest = youngest, youngest.child("tool:x", f"child-{generation}", {"generation": generation})
        assert youngest.parent_request_id == parent.request_id
        assert youngest.context_id != parent.context_id
    shared = ("user_id", "tenant_id", "session_id", "thread_id", "run_id", "connection_id", "roles", "tier", "deadline", "correlation_id")
    assert all(getattr(youngest, name) == getattr(root, name) for name in shared)
    assert youngest.agent_context == {**root.agent_context, "generation": 10}
    assert root.agent_context == {"goal": (1, {"deep": "é"})}
    with pytest.raises(errors.DepthExceeded):
        youngest.child("tool:x", "child-11")


def test_in_the_context_of_a_sessions_calls_each_call_has_a_frame_of_its_own() -> None:
    calls = made(agent_context=CALLS, scope={"tools:execute"})
    run_id, correlation_id = ids.RunId.new(), ids.CorrelationId.new()
    for known in (calls, UserExecutionContext.from_claims(calls.to_claims())):
        frame = known.of_call(run_id, "m7", correlation_id)
        assert (frame.run_id, frame.request_id, frame.correlation_id) == (run_id, "m7", correlation_id)
        assert frame.created_at > calls.created_at
        own = {"run_id", "request_id", "correlation_id", "created_at"}
        before, after = calls.to_claims(), frame.to_claims()
        assert {name for name in before if before[name] != after[name]} == own
        assert frame.serves_calls
        for wrong in (("no id", "m7", correlation_id), (run_id, "", correlation_id), (run_id, "m7", "c")):
            with pytest.raises(errors.InvalidContext):
                known.of_call(*wrong)
    # what is derived for one call is that call's alone
    child = calls.of_call(run_id, "m7", correlation_id).child("tools/execute", "m8")
    assert (child.run_id, child.correlation_id, child.serves_calls) == (run_id, correlation_id, False)
    for other in (child, made(), made(agent_context={**CALLS, "more": 1})):
        assert not other.serves_calls
        with pytest.raises(errors.InvalidContext):
            other.of_call(run_id, "m7", correlation_id)


def test_a_child_cannot_bring_authority_along() -> None:
    for stolen in ({"roles": ["admin"]}, {"tier": "internal"}, {"user_id": ids.UserId.new()}):
        with pytest.raises(errors.ReservedKey):
            made().child("op", "m2", stolen)
    with pytest.raises(errors.InvalidContext):
        made().child("op", "m1")


async def test_a_scope_cleans_up_when_its_caller_has_no_time_left() -> None:
    left: list[float | None] = []

    async def call() -> None:
        deadline.bind(0.0)
        async with managed(made()) as scope:
            scope.on_close(lambda: left.append(deadline.timeout(5.0)))
            left.append(deadline.timeout(5.0))

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(call())
    assert left == [0.001, 5.0]


def test_repr_tells_nothing_of_the_payload() -> None:
    assert "deep" not in repr(made())
    assert "deep" not in repr(made()._agent_context)


@given(st.dictionaries(st.text(st.characters(codec="utf-8")).map("k".__add__), JSON, max_size=4))
def test_canonical_json_is_a_fixed_point(value: dict[str, Any]) -> None:
    once = Payload.of("agent_context", value, 1 << 20)
    again = Payload.parse("agent_context", once.canonical or b"", 1 << 20)
    assert again == once
    assert again.canonical == once.canonical
    assert json.loads(once.canonical or b"") == value
