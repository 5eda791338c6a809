"""What the value promises beyond its fields: narrower children, copies without attachments, logs without secrets, factories, ids."""

import copy
import dataclasses
import io
import json
import logging
import pickle
import traceback
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import pytest
import structlog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chassis import log
from netra import errors, ids
from netra.context import UserExecutionContext
from netra.context.payload import Payload
from tests.fixtures.user_execution_context_fixtures import Somebody, made

SECRET = "hidden-password-7f3a"
PERMISSIONS = st.sets(st.sampled_from([f"{kind}:{verb}" for kind in ("runs", "data", "tools") for verb in ("read", "write")]), min_size=1)
JSON = st.dictionaries(
    st.text(st.characters(codec="utf-8"), max_size=5).map("k".__add__),
    st.recursive(
        st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(st.characters(codec="utf-8"), max_size=5),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
        max_leaves=4,
    ),
    max_size=2,
)


def _pickled(value: UserExecutionContext) -> Any:
    return pickle.loads(pickle.dumps(value))  # noqa: S301 - our own


class Session:
    """Something attached that shows a secret to everybody who asks."""

    def __repr__(self) -> str:
        return SECRET

    def __reduce__(self) -> tuple[Any, ...]:
        return str, (SECRET,)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(PERMISSIONS, PERMISSIONS)
def test_a_child_never_has_a_permission_its_parent_lacks(has: set[str], wants: set[str]) -> None:
    parent = made(scope=has)
    if wants <= has:
        assert parent.child("op", "m2", scope=wants).scope == frozenset(wants)
        # nor does a grandchild get back what its parent was not given
        for more in has - wants:
            with pytest.raises(errors.PermissionDenied):
                parent.child("op", "m2", scope=wants).child("op", "m3", scope={more})
    else:
        with pytest.raises(errors.PermissionDenied) as refused:
            parent.child("op", "m2", scope=wants)
        assert refused.value.details["field"] == "scope"
    assert parent.child("op", "m2").scope == frozenset(has)


@pytest.mark.parametrize("key", ["scope", "Scope", " SCOPE ", "permissions", "roles", "tier"])
def test_a_scope_in_the_payload_is_no_scope_and_is_refused(key: str) -> None:
    parent = made(scope=["runs:read"])
    with pytest.raises(errors.ReservedKey):
        parent.child("op", "m2", {key: ["runs:read", "runs:write"]})
    with pytest.raises(errors.ReservedKey):
        parent.child("op", "m2", json.dumps({key: ["runs:write"]}).encode())
    with pytest.raises(errors.InvalidContext):
        parent.child("op", "m2", scope=[])


def test_an_unnarrowed_parent_may_narrow_its_child_for_good() -> None:
    child = made().child("op", "m2", scope=["runs:read"])
    assert made().child("op", "m2").scope is None
    for back in (_pickled(child), UserExecutionContext.from_claims(child.to_claims())):
        assert back.scope == {"runs:read"}


# the machine may be busy, and how long it takes to think of values says nothing
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(JSON, JSON, st.none() | PERMISSIONS, st.booleans())
def test_copies_are_equal_and_carry_nothing_attached(
    agent: dict[str, Any], audit: dict[str, Any], scope: set[str] | None, digests: bool
) -> None:
    context = made(agent_context=agent, audit_metadata=audit, scope=scope, deadline=datetime.now(UTC) + timedelta(hours=1))
    context = UserExecutionContext.from_claims(context.to_claims()) if digests else context
    attached = context.with_transaction(Session()).with_connection(Session())
    for made_of in (copy.copy, copy.deepcopy, _pickled):
        again = made_of(attached)
        assert again == attached == context
        assert hash(again) == hash(attached)
        assert again is not attached
        assert again.to_claims() == context.to_claims()
        assert again.to_dict() == context.to_dict()
        assert not again.has_transaction
        assert not again.has_connection


def test_nothing_that_is_printed_pickled_or_logged_shows_what_is_attached_or_asked() -> None:
    context = made(agent_context={"question": SECRET}).with_transaction(Session()).with_connection(Session())

    @dataclasses.dataclass
    class Holder:
        context: UserExecutionContext

    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    handler.setFormatter(structlog.stdlib.ProcessorFormatter(processors=[
        structlog.stdlib.ProcessorFormatter.remove_processors_meta, *log._processors("json"),
    ]))  # fmt: skip
    logger = logging.getLogger(f"tests.{context.context_id}")
    logger.addHandler(handler)
    try:
        raise RuntimeError(context)
    except RuntimeError:
        logger.exception("%r %s", context, Holder(context), extra={"context": context})
        printed = traceback.format_exc()
    structured = structlog.wrap_logger(structlog.PrintLogger(lines), processors=log._processors("console"))
    structured.info("told", context=context, holder=Holder(context), trail=context.audit_trail())
    told = [lines.getvalue(), printed, repr(context), f"{context!s} {context}", repr(Holder(context)), str(dataclasses.asdict(context))]
    assert context.context_id in lines.getvalue()
    assert not [each for each in told if SECRET in each]
    # a pickle has the question, which is part of the value, and nothing of the attachments
    assert pickle.dumps(context).count(SECRET.encode()) == 1
    assert SECRET not in pickle.dumps(made().with_transaction(Session())).decode("latin-1")


def test_attachments_are_no_fields() -> None:
    context = made()
    names = {field.name for field in dataclasses.fields(context)}
    assert not names & {"_transaction", "_connection"}
    assert context.with_transaction(Session()) == context.with_connection(Session()) == context
    assert set(context.with_transaction(Session()).to_dict()) == set(context.to_dict())
    assert context.with_transaction(Session()).to_proto() == context.to_proto()
    with pytest.raises(AttributeError):
        context.with_transaction(Session())._transaction = None


def test_to_dict_is_json_and_a_copy() -> None:
    context = made(scope=["runs:write", "runs:read"], agent_context=MappingProxyType({"a": (1, MappingProxyType({"b": [None]}))}))
    told = context.to_dict()
    assert json.loads(json.dumps(told)) == told
    assert told["agent_context"] == {"a": [1, {"b": [None]}]}
    assert (told["scope"], told["deadline"], told["has_transaction"]) == (["runs:read", "runs:write"], None, False)
    assert type(told["user_id"]) is str
    told["agent_context"]["a"].append(1)
    assert context.agent_context == {"a": (1, {"b": (None,)})}
    assert UserExecutionContext.from_claims(context.to_claims()).to_dict()["agent_context"] is None


def test_is_expired() -> None:
    assert not made().is_expired
    assert not made(deadline=datetime.now(UTC) + timedelta(hours=1)).is_expired
    past = made(deadline=datetime.now(UTC) + timedelta(hours=1)).to_proto()
    past.created_at.seconds -= 8_000
    past.deadline.seconds -= 7_200
    assert UserExecutionContext.from_proto(past).is_expired


@pytest.mark.parametrize(
    ("header", "value", "field", "kept"),
    [
        ("user-agent", "a\x00b\x1b[31m\nc", "user_agent", "ab[31mc"),
        ("user-agent", "x" * 9_000, "user_agent", "x" * 256),
        ("user-agent", "", "user_agent", None),
        ("User-Agent", "mixed", "user_agent", "mixed"),
        ("content-type", "text/csv", "content_type", "text/csv"),
        ("authorization", f"Bearer {SECRET}", "authorization", None),
        ("cookie", SECRET, "cookie", None),
        ("x-api-key", SECRET, "x_api_key", None),
        ("x-correlation-id", SECRET, "correlation_id", None),
        ("x-forwarded-for", "1.2.3.4", "client_ip", None),
    ],
)
def test_what_a_request_leaves_in_the_audit_metadata(header: str, value: str, field: str, kept: str | None) -> None:
    scope = {
        "type": "http",
        "path": "/v1/\udc80x",
        "query_string": SECRET.encode(),
        "headers": [(header.encode(), value.encode("latin-1"))],
    }
    context = UserExecutionContext.from_asgi(scope, Somebody(), audit_metadata={"client": "cli"})
    assert context.audit_metadata.get(field) == kept
    assert (context.audit_metadata["path"], context.audit_metadata["client"]) == ("/v1/x", "cli")
    assert SECRET not in json.dumps(context.to_dict())
    assert ids.is_correlation_id(context.correlation_id)
    assert UserExecutionContext.from_proto(context.to_proto()) == context


def test_the_first_of_two_headers_counts_and_a_correlation_id_is_taken_over() -> None:
    known = ids.CorrelationId.new()
    headers = [(b"x-correlation-id", known.encode()), (b"x-correlation-id", ids.CorrelationId.new().encode())]
    assert UserExecutionContext.from_asgi({"type": "http", "headers": headers}, Somebody()).correlation_id == known


@pytest.mark.parametrize(
    ("request_", "make"),
    [(None, "from_asgi"), ({}, "from_asgi"), ({"type": "websocket"}, "from_asgi"), ({"type": "http"}, "from_websocket"), (7, "from_asgi")],
)
def test_what_is_no_request_is_refused(request_: object, make: str) -> None:
    with pytest.raises(errors.InvalidContext) as refused:
        getattr(UserExecutionContext, make)(request_, Somebody())
    assert refused.value.details["field"] == "request"


class Believer:
    """Believes one service and one context token."""

    def __init__(self, context: UserExecutionContext) -> None:
        self.known, self.asked = context, list[tuple[str, ...]]()

    async def service(self, token: str) -> str:
        """The service."""
        self.asked.append((token,))
        return "dispatcher"

    async def context(self, token: str, service: str) -> UserExecutionContext:
        """The context."""
        self.asked.append((token, service))
        return self.known


class AsCall:
    """A call with this metadata."""

    def __init__(self, *pairs: tuple[str, str | bytes]) -> None:
        self.pairs = pairs

    def invocation_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """The metadata."""
        return self.pairs


async def test_from_grpc_asks_who_brings_the_token_and_whose_it_is() -> None:
    believer = Believer(made())
    call = AsCall(("authorization", "bearer svc"), ("x-netra-context", "ctx"), ("x-user-id", ids.uuid7()), ("grpc-bin", b"x"))
    assert await UserExecutionContext.from_grpc(call, believer) is believer.known
    assert believer.asked == [("svc",), ("ctx", "dispatcher")]
    for pairs in (
        (),
        call.pairs[:1],
        call.pairs[1:],
        (*call.pairs, call.pairs[1]),
        (*call.pairs, call.pairs[0]),
        (("authorization", "Basic svc"), call.pairs[1]),
    ):
        with pytest.raises(errors.Unauthenticated):
            await UserExecutionContext.from_grpc(AsCall(*pairs), believer)


def test_payloads_of_two_contexts_are_two_objects_and_cannot_be_changed() -> None:
    one, other = (made(agent_context={})._agent_context for _ in range(2))
    assert one == other
    assert one is not other
    assert one.content is not other.content
    for name in ("digest", "canonical", "_view", "new"):
        with pytest.raises(AttributeError):
            setattr(one, name, None)
        with pytest.raises(AttributeError):
            delattr(one, name)
    assert one != {}
    assert Payload.known("x", one.digest) == one


@pytest.mark.parametrize(
    ("ensure", "kind"),
    [
        (ids.ensure_user_id, ids.UserId), (ids.ensure_tenant_id, ids.TenantId), (ids.ensure_session_id, ids.SessionId),
        (ids.ensure_thread_id, ids.ThreadId), (ids.ensure_run_id, ids.RunId), (ids.ensure_message_id, ids.MessageId),
        (ids.ensure_connection_id, ids.ConnectionId), (ids.ensure_execution_id, ids.ExecutionId),
    ],
)  # fmt: skip
def test_ids_are_ensured(ensure: Any, kind: type[ids.Id]) -> None:
    value = kind.new()
    assert ensure(value) is value
    assert type(ensure(str(value))) is kind
    assert ensure(ids.Id(value)) == value
    other = ids.ArtifactId(value)
    for wrong in (
        "",
        "x",
        None,
        7,
        value.upper(),
        f"{value}\n",
        f"{{{value}}}",
        value.replace("-", ""),
        value.encode(),
        other,
        *ids.NOBODY,
    ):
        with pytest.raises(errors.InvalidPayload) as refused:
            ensure(wrong)
        assert refused.value.details["field"] == kind.field


def test_names_are_ensured_too() -> None:
    assert type(ids.ensure_request_id("m-1")) is ids.RequestId
    assert type(ids.ensure_agent_id("spend-analyst")) is ids.AgentId
    for ensure, wrong in (
        (ids.ensure_request_id, "a b"),
        (ids.ensure_request_id, None),
        (ids.ensure_agent_id, "Agent"),
        (ids.ensure_agent_id, 7),
    ):
        with pytest.raises(errors.InvalidPayload):
            ensure(wrong)


def test_fresh_ids_are_what_they_say() -> None:
    made_at = datetime.now(UTC).timestamp()
    found = [ids.RunId.new() for _ in range(1_000)]
    assert len(set(found)) == 1_000
    for each in found:
        assert ids.RunId(str(each)) == each
        assert (each[14], each[19] in "89ab") == ("7", True)
    assert abs(int(found[0].replace("-", "")[:12], 16) / 1_000 - made_at) < 60
