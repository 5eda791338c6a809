"""UserExecutionContext as the platform uses it: made, handed on, attached to, told of, and given back; of one user and of many."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import gc
import json
import pickle
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import websockets

from chassis import postgres
from netra import errors, ids
from netra.context import Isolation, UserExecutionContext
from netra.context.v1 import context_pb2
from tests.fixtures import walled as rows
from tests.fixtures.sockets import Socket
from tests.fixtures.storage import Services
from tests.fixtures.user_execution_context_fixtures import TIERS, Grow, MakeMany, Manage, Somebody, arrived, made, websocket_scope
from tests.fixtures.walled import Walled
from tests.fixtures.witness import SEEN
from tests.integration.conftest import Runs

pytestmark = [pytest.mark.user_context]
IDS = ("user_id", "tenant_id", "session_id", "thread_id", "run_id", "request_id")


class TestUserExecutionContextLifecycle:
    """From birth."""

    def test_user_context_creation_with_valid_data(self, realistic_user_context: UserExecutionContext) -> None:
        context = realistic_user_context
        assert type(context.user_id) is ids.UserId
        assert type(context.connection_id) is ids.ConnectionId
        assert (context.roles, context.tier, context.scope, context.depth) == (("user",), "business", None, 0)
        assert context.parent_request_id is None
        assert context.created_at.tzinfo is UTC
        assert abs(datetime.now(UTC) - context.created_at) < timedelta(minutes=5)
        assert not context.is_expired
        assert context.agent_context["inputs"]["days"] == 30
        assert context.audit_metadata["client_ip"] == "203.0.113.7"
        assert len({getattr(context, name) for name in IDS}) == len(IDS)
        with pytest.raises(TypeError, match="factories"):
            UserExecutionContext(user_id=context.user_id)

    @pytest.mark.parametrize("name", [*IDS[:5], "connection_id", "tier", "roles"])
    def test_user_context_validation_prevents_placeholder_values(self, name: str) -> None:
        words = (
            "registry placeholder default temp none null undefined 0 1 xxx yyy example test demo sample template mock fake dummy".split()
        )
        prefixed = [f"{word}_1" for word in "placeholder registry default temp example demo sample template mock fake".split()]
        if name in ("tier", "roles"):
            # these are words themselves: what is none is refused as such
            values = [value for value in words + prefixed if value[0].isalpha()]
        else:
            values = [
                f"{space}{value}" for plain in (*words, *prefixed, *ids.NOBODY) for value in (plain, plain.upper()) for space in ("", " ")
            ]
        for value in values:
            with pytest.raises(errors.PlaceholderValue) as refused:
                made(None, **{name: [value] if name == "roles" else value})
            assert refused.value.details["field"] == name

    def test_user_context_validation_accepts_realistic_values(self) -> None:
        for request_id in ("1", "m-1", "test", "temp_2026-11-21T00:00:00", ids.uuid7(), "a" * 64):
            assert made(request_id=request_id).request_id == request_id
        for tier in TIERS:
            assert made(tier=tier).tier == tier
        words = {"kind": "example", "status": "test", "items": ["default", None, 0, 1]}
        assert made(agent_context=words).to_dict()["agent_context"] == words

    def test_user_context_immutability_enforcement(self, realistic_user_context: UserExecutionContext) -> None:
        context, before = realistic_user_context, realistic_user_context.to_dict()
        for name in (*(field.name for field in dataclasses.fields(context)), "_transaction", "_connection", "anything"):
            with pytest.raises(AttributeError):
                setattr(context, name, None)
            with pytest.raises(AttributeError):
                delattr(context, name)
        inside: Any = context.agent_context
        for change in (
            lambda: inside.update({"goal": 1}),
            lambda: inside["inputs"].pop("days"),
            lambda: inside["inputs"]["artifact_ids"].append(1),
            lambda: inside["inputs"].__setitem__("days", 1),
            lambda: setattr(context._agent_context, "canonical", b"{}"),
        ):
            with pytest.raises((AttributeError, TypeError)):
                change()
        context.to_dict()["agent_context"]["inputs"]["days"] = 99
        assert context.to_dict() == before

    def test_user_context_factory_methods(self) -> None:
        who, thread_id, correlation_id = Somebody(scope=frozenset({"runs:read"})), ids.ThreadId.new(), ids.CorrelationId.new()
        headers = {
            "Authorization": "Bearer hidden-credential", "Cookie": "session=hidden-cookie", "X-Correlation-Id": correlation_id,
            "X-User-Id": ids.uuid7(), "User-Agent": "x" * 500,
        }  # fmt: skip
        found = arrived(who, f"/threads/{thread_id}?token=hidden-query", headers, thread_id=thread_id)
        for context in found.values():
            assert (context.user_id, context.tenant_id, context.session_id) == (who.user_id, who.tenant_id, who.session_id)
            assert (context.roles, context.tier, context.scope) == (who.roles, who.tier, who.scope)
            assert context.correlation_id == correlation_id
            assert "hidden" not in json.dumps(context.to_dict())
        assert found["http"].thread_id == found["websocket"].thread_id == thread_id
        assert found["http"].audit_metadata == {
            "protocol": "http", "client_ip": "198.51.100.1", "method": "POST", "path": f"/threads/{thread_id}", "user_agent": "x" * 256,
            "content_type": "application/json",
        }  # fmt: skip
        assert found["websocket"].connection_id is not None
        assert found["websocket"].audit_metadata["path"] == "/ws"


@pytest.mark.multi_user
class TestUserExecutionContextMultiUserIsolation:
    """Users never meet."""

    async def test_concurrent_user_context_isolation(self, concurrent_context_factory: MakeMany, clean_context_registry: Isolation) -> None:
        users = [Somebody(tier=TIERS[at % len(TIERS)]) for at in range(10)]
        contexts = await concurrent_context_factory(100, users)
        for at, context in enumerate(contexts):
            who = users[at % 10]
            assert (context.user_id, context.tenant_id, context.tier) == (who.user_id, who.tenant_id, who.tier)
            assert context.agent_context == {"owner": f"of-{who.session_id}", "at": at}
            clean_context_registry.watch(context)
        assert clean_context_registry.verify_all() == 100
        for name in ("context_id", "thread_id", "run_id", "request_id", "correlation_id"):
            assert len({getattr(context, name) for context in contexts}) == 100

    def test_user_context_memory_isolation(
        self, multi_user_contexts: dict[str, UserExecutionContext], clean_context_registry: Isolation
    ) -> None:
        shared: dict[str, Any] = {"inputs": {"rows": [1, 2, 3]}, "empty": {}}
        one, other = made(agent_context=shared), made(agent_context=shared)
        shared["inputs"]["rows"].append("of somebody else")
        assert one.agent_context["inputs"]["rows"] == (1, 2, 3)
        assert one.agent_context is not other.agent_context
        assert one.agent_context["inputs"] is not other.agent_context["inputs"]
        assert made().agent_context is not made().agent_context
        for context in (one, other, *multi_user_contexts.values()):
            clean_context_registry.watch(context)
        assert clean_context_registry.verify_all() == 7
        for tier, context in multi_user_contexts.items():
            told = json.dumps(context.to_dict())
            assert [canary for canary in TIERS if f"of-{canary}" in told] == [tier]

    def test_concurrent_context_creation_thread_safety(self) -> None:
        who = Somebody()
        with ThreadPoolExecutor(max_workers=8) as threads:
            contexts = list(threads.map(lambda at: made(who, agent_context={"at": at}).child("step", f"m-{at}"), range(50)))
        assert [context.agent_context["at"] for context in contexts] == list(range(50))
        assert len({context.context_id for context in contexts}) == len({context.correlation_id for context in contexts}) == 50


class TestUserExecutionContextChildContexts:
    """A child is its parent's user, and never more."""

    def test_child_context_creation_and_inheritance(self, realistic_user_context: UserExecutionContext) -> None:
        parent = realistic_user_context
        child = parent.child("tool:read", "m-2", {"step": 1})
        shared = ("user_id", "tenant_id", "session_id", "thread_id", "run_id", "connection_id", "roles", "tier", "scope", "deadline")
        assert all(getattr(child, name) == getattr(parent, name) for name in (*shared, "correlation_id"))
        assert (child.depth, child.parent_request_id, child.request_id) == (1, parent.request_id, "m-2")
        assert child.context_id != parent.context_id
        assert child.agent_context == {**parent.agent_context, "step": 1}
        assert child.audit_metadata == {**parent.audit_metadata, "operation": "tool:read"}

    def test_nested_child_context_hierarchy(self, context_hierarchy_builder: Grow) -> None:
        root = made(agent_context={"root": True})
        generations = context_hierarchy_builder(root, depth=10, breadth=3)
        assert [len(generation) for generation in generations] == [1] + [3] * 10
        for depth, generation in enumerate(generations[1:], 1):
            parent = generations[depth - 1][0]
            assert {(each.depth, each.parent_request_id, each.run_id) for each in generation} == {(depth, parent.request_id, root.run_id)}
        everybody = [each for generation in generations for each in generation]
        assert len({each.request_id for each in everybody}) == len({each.context_id for each in everybody}) == 31
        assert generations[10][0].agent_context == {"root": True, **{f"level_{level}": level for level in range(1, 11)}}

    def test_child_context_isolation_from_parent(self, realistic_user_context: UserExecutionContext) -> None:
        parent, before = realistic_user_context, realistic_user_context.to_dict()
        one, other = parent.child("step", "m-2", {"goal": "changed", "mine": 1}), parent.child("step", "m-3")
        assert one.agent_context["goal"] == "changed"
        assert "mine" not in other.agent_context
        assert other.agent_context == parent.agent_context
        assert other.agent_context is not parent.agent_context
        assert parent.to_dict() == before
        attached = parent.with_transaction(object()).with_connection(object())
        child = attached.child("step", "m-4")
        assert (child.has_transaction, child.has_connection) == (False, False)

    def test_child_context_depth_limit_enforcement(self, context_hierarchy_builder: Grow) -> None:
        youngest = context_hierarchy_builder(made(), depth=10)[-1][0]
        assert youngest.depth == 10
        with pytest.raises(errors.DepthExceeded) as refused:
            youngest.child("step", "m-11")
        assert refused.value.details["field"] == "depth"
        message = youngest.to_proto()
        message.depth = 11
        with pytest.raises(errors.DepthExceeded):
            UserExecutionContext.from_proto(message)

    @pytest.mark.parametrize(
        ("arguments", "field", "kind"),
        [
            *(((operation, "m-2"), "operation", errors.InvalidContext) for operation in ("", "a b", None)),
            *((("step", request_id), "request_id", errors.InvalidContext) for request_id in ("", "m-1", "m 2")),
            (("step", "m-2", {"user_id": "x"}), "agent_context.user_id", errors.ReservedKey),
            (("step", "m-2", {"scope": ["runs:write"]}), "agent_context.scope", errors.ReservedKey),
            (("step", "m-2", []), "agent_context", errors.InvalidContext),
            (("step", "m-2", {"a": "x" * 65_000}), "agent_context", errors.TooLarge),
            (("step", "m-2", {}, ["runs:read", "runs:write"]), "scope", errors.PermissionDenied),
        ],
    )
    def test_child_context_validation_requirements(self, arguments: tuple[Any, ...], field: str, kind: type[errors.NetraError]) -> None:
        parent = made(request_id="m-1", scope=["runs:read"], agent_context={"b": "x" * 1_000})
        with pytest.raises(kind) as refused:
            parent.child(*arguments)
        assert (type(refused.value), refused.value.details["field"]) == (kind, field)


class TestUserExecutionContextCrossServiceIntegration:
    """It survives every hop; what is attached stays behind."""

    @pytest.mark.parametrize("generations", [0, 3])
    def test_context_serialization_deserialization(
        self, realistic_user_context: UserExecutionContext, context_hierarchy_builder: Grow, generations: int
    ) -> None:
        context = context_hierarchy_builder(realistic_user_context, generations)[-1][0]
        wire = context.to_proto().SerializeToString(deterministic=True)
        back = UserExecutionContext.from_proto(context_pb2.ExecutionContext.FromString(wire))
        assert back == context
        assert back.to_proto().SerializeToString(deterministic=True) == wire
        claims = json.loads(json.dumps(context.to_claims()))
        assert UserExecutionContext.from_claims(claims) == context
        assert json.loads(json.dumps(context.to_dict())) == back.to_dict()
        attached = context.with_transaction("postgresql://netra:hidden@db/netra")
        for copied in (pickle.loads(pickle.dumps(attached)), copy.copy(attached), copy.deepcopy(attached)):  # noqa: S301 - our own
            assert copied == context
            assert copied.to_dict() == context.to_dict()
        for told in (pickle.dumps(attached).decode("latin-1"), repr(attached), str(attached.to_dict()), str(dataclasses.asdict(attached))):
            assert "hidden" not in told

    def test_context_correlation_id_generation(self) -> None:
        found = {ids.CorrelationId.new() for _ in range(1_000_000)}
        assert len(found) == 1_000_000
        # full entropy: each of the 32 digits takes every value
        some = [found.pop() for _ in range(2_000)]
        assert all(map(ids.is_correlation_id, some))
        assert {len({each[place] for each in some}) for place in range(32)} == {16}
        root, given = made(), ids.CorrelationId.new()
        assert root.child("step", "m-2").correlation_id == root.correlation_id
        assert made(correlation_id=given).correlation_id == given

    def test_context_audit_trail_generation(self, realistic_user_context: UserExecutionContext) -> None:
        child = realistic_user_context.child("tool:read", "m-2").with_connection(object())
        trail = child.audit_trail()
        assert {name: trail[name] for name in IDS} == {name: getattr(child, name) for name in IDS}
        assert (trail["correlation_id"], trail["depth"], trail["parent_request_id"]) == (
            child.correlation_id, 1, realistic_user_context.request_id,
        )  # fmt: skip
        assert (trail["has_transaction"], trail["has_connection"], trail["is_expired"]) == (False, True, False)
        assert 0 <= trail["age_s"] <= (datetime.now(UTC) - child.created_at).total_seconds()
        assert trail["audit_metadata"]["operation"] == "tool:read"
        # what was asked is nobody's business who reads trails
        assert "Where does the money go?" not in json.dumps(trail)
        assert trail["agent_context_sha256"] == child.agent_context_digest

    @pytest.mark.real_services
    async def test_context_with_db_session_attachment(self, walled: Walled, realistic_user_context: UserExecutionContext) -> None:
        context, database = realistic_user_context, await walled.pool()
        async with database.transaction(context.user_id) as transaction:
            attached = context.with_transaction(transaction)
            assert attached is not context
            assert attached == context
            assert (attached.has_transaction, context.has_transaction) == (True, False)
            mine = attached.transaction(postgres.Transaction)
            assert mine is transaction
            await rows.note(mine, attached.user_id, "mine")
        assert await rows.seen(database, context.user_id) == ["mine"]
        assert await rows.seen(database, ids.uuid7()) == []
        for without in (context, copy.copy(attached), attached.child("step", "m-2")):
            with pytest.raises(errors.FailedPrecondition):
                without.transaction(postgres.Transaction)
        with pytest.raises(errors.FailedPrecondition):
            attached.transaction(postgres.DatabaseManager)
        with pytest.raises(errors.InvalidContext):
            context.with_transaction(None)

    async def test_context_with_websocket_connection_attachment(self, websocket_context_scenarios: dict[str, UserExecutionContext]) -> None:
        new, again = websocket_context_scenarios["new"], websocket_context_scenarios["reconnect"]
        assert (new.run_id, new.thread_id, new.user_id) == (again.run_id, again.thread_id, again.user_id)
        assert len({context.connection_id for context in websocket_context_scenarios.values()}) == 4
        assert websocket_context_scenarios["mobile"].audit_metadata["user_agent"] == "Netra/1.0 (iPhone)"
        assert websocket_context_scenarios["high-frequency"].audit_metadata["frames_per_second"] == 200

        async def echo(connection: websockets.ServerConnection) -> None:
            async for frame in connection:
                await connection.send(frame)

        async with websockets.serve(echo, "127.0.0.1", 0) as server:
            port = next(iter(server.sockets)).getsockname()[1]
            async with websockets.connect(f"ws://127.0.0.1:{port}", proxy=None) as socket:
                attached = new.with_connection(socket, again.connection_id)
                await attached.connection(websockets.ClientConnection).send("hello")
                assert await attached.connection(websockets.ClientConnection).recv() == "hello"
        assert (attached.connection_id, new.has_connection) == (again.connection_id, False)
        assert attached.with_transaction(self).has_connection
        with pytest.raises(errors.PlaceholderValue):
            new.with_connection(attached, "default")


@pytest.mark.real_services
class TestUserExecutionContextBusinessCriticalOperations:
    """Agents, sockets and tools, for real."""

    @pytest.mark.multi_user
    async def test_context_agent_execution_integration(self, witnessed: Services) -> None:
        runs, users = Runs(witnessed), [await witnessed.user(tier=tier) for tier in ("free", "business", "enterprise")]
        started = await asyncio.gather(*(runs.start(user, "witness", inputs={"canary": user.user_id}) for user in users))
        for user, run in zip(users, started, strict=True):
            events = await runs.ended(user, run.run_id)
            assert events[-1]["data"]["result"]["inputs"] == {"canary": user.user_id}
            assert {event["user_id"] for event in events} == {user.user_id}
            seen = SEEN[run.run_id][0]
            assert (seen.user_id, seen.run_id, seen.thread_id) == (user.user_id, run.run_id, run.thread_id)
            assert {event["correlation_id"] for event in events} == {seen.correlation_id}
        assert [SEEN[run.run_id][0].tier for run in started] == ["free", "business", "enterprise"]

    async def test_context_websocket_event_propagation_simulation(self, witnessed: Services) -> None:
        user, stranger = await witnessed.user(), await witnessed.user()
        url = f"ws://127.0.0.1:{(await witnessed.gateway()).port}/ws"
        async with (
            websockets.connect(url, additional_headers=user.bearer, proxy=None) as mine,
            websockets.connect(url, additional_headers=stranger.bearer, proxy=None) as theirs,
        ):
            socket, other = Socket(mine), Socket(theirs)
            run_id = (await socket.run(agent="witness"))["run_id"]
            events, seen = await socket.ended(run_id), SEEN[run_id][0]
            for event in events:
                assert (event["user_id"], event["thread_id"], event["correlation_id"]) == (
                    seen.user_id,
                    seen.thread_id,
                    seen.correlation_id,
                )
            assert seen.connection_id is not None
            # a stranger's own run is the first that they hear of
            await other.ended((await other.run(agent="witness"))["run_id"])
            assert {frame["user_id"] for frame in other.frames if "user_id" in frame} == {stranger.user_id}
            assert run_id not in json.dumps(other.frames)

    async def test_context_tool_dispatch_integration(self, witnessed: Services) -> None:
        runs, user = Runs(witnessed), await witnessed.user()
        run = await runs.start(user, "witness")
        events = await runs.ended(user, run.run_id)
        assert events[-1]["data"]["result"]["whose"] == user.user_id
        of_agent, of_tool = SEEN[run.run_id]
        for name in (*IDS[:5], "roles", "tier", "scope", "correlation_id"):
            assert getattr(of_tool, name) == getattr(of_agent, name)
        assert of_tool.depth >= of_agent.depth


class TestUserExecutionContextErrorHandlingAndValidation:
    """Each wrong thing has its own error, and names its field."""

    def test_context_validation_error_scenarios(self) -> None:
        wrong: list[tuple[str, object, type[errors.NetraError]]] = [
            *((name, value, errors.InvalidContext) for name in IDS for value in ("", None, 7, "a b", "x" * 65)),
            *((name, "placeholder", errors.PlaceholderValue) for name in IDS[:5]),
            ("roles", (), errors.InvalidContext), ("roles", "admin", errors.InvalidContext), ("tier", "GOLD", errors.InvalidContext),
            ("scope", [], errors.InvalidContext), ("scope", ["everything"], errors.InvalidContext),
            ("scope", "runs:read", errors.InvalidContext), ("scope", ["a:b", "a:b"], errors.InvalidContext),
            ("deadline", datetime(2020, 1, 1, tzinfo=UTC), errors.InvalidContext), ("correlation_id", "short", errors.InvalidContext),
            ("agent_context", "text", errors.InvalidContext), ("agent_context", {"a": b""}, errors.InvalidContext),
            ("agent_context", {"a": "x" * 70_000}, errors.TooLarge), ("audit_metadata", {"a": "x" * 17_000}, errors.TooLarge),
            ("audit_metadata", {"roles": []}, errors.ReservedKey),
        ]  # fmt: skip
        for name, value, kind in wrong:
            with pytest.raises(errors.InvalidPayload) as refused:
                made(None, **{name: value})
            assert type(refused.value) is kind, (name, value)
            assert refused.value.details["field"].partition(".")[0] == name

    @pytest.mark.parametrize("field", ["agent_context", "audit_metadata"])
    def test_context_reserved_keys_validation(self, field: str) -> None:
        reserved = (
            "user", "user_id", "tenant_id", "session_id", "thread_id", "run_id", "request_id", "context_id", "connection_id",
            "websocket_client_id", "websocket_connection_id", "created_at", "db_session", "roles", "tier", "scope", "permissions",
        )  # fmt: skip
        for key in reserved:
            for variant in (key, key.upper(), f" {key}\t"):
                with pytest.raises(errors.ReservedKey) as refused:
                    made(None, **{field: {variant: "x"}})
                assert refused.value.details["field"] == f"{field}.{key}"
            # data may say what it likes further down
            assert getattr(made(None, **{field: {"row": {key: "x"}}}), field)["row"] == {key: "x"}

    def test_context_isolation_violation_detection(self, clean_context_registry: Isolation) -> None:
        registry, one, other = clean_context_registry, made(agent_context={"a": [1]}), made(agent_context={"a": [1]})
        registry.verify(one)
        registry.verify(other)
        transaction, everybodys = object(), {"a": 1}
        registry.verify(one.with_transaction(transaction))
        kept = registry.watch(one.with_transaction(transaction))
        with pytest.raises(errors.ContextIsolation) as refused:
            registry.verify(other.with_transaction(transaction))
        assert refused.value.details["field"] == "transaction"
        registry.share(everybodys, "the cache")
        with pytest.raises(errors.ContextIsolation, match="the cache"):
            registry.verify(one.with_connection(everybodys))
        # only by force can payloads be shared; it is seen all the same
        forced = made()
        object.__setattr__(forced, "_agent_context", one._agent_context)
        with pytest.raises(errors.ContextIsolation) as refused:
            registry.verify(forced)
        assert refused.value.details["field"] == "agent_context"
        assert issubclass(errors.ContextIsolation, errors.InvalidContext)
        assert kept.has_transaction

    def test_context_runtime_validation(self, realistic_user_context: UserExecutionContext) -> None:
        message, claims = realistic_user_context.to_proto(), realistic_user_context.to_claims()
        for name, value in (("user_id", "someone"), ("tier", ""), ("agent_context", b"{"), ("correlation_id", ""), ("depth", 1)):
            changed = context_pb2.ExecutionContext.FromString(message.SerializeToString())
            setattr(changed, name, value)
            with pytest.raises(errors.InvalidContext):
                UserExecutionContext.from_proto(changed)
        for name in claims:
            with pytest.raises(errors.InvalidContext):
                UserExecutionContext.from_claims({**claims, name: object()})
        for given in (None, {}, {"type": "http"}, {"type": "lifespan"}):
            with pytest.raises(errors.InvalidContext) as refused:
                UserExecutionContext.from_websocket(given, Somebody())
            assert refused.value.details["field"] == "request"
        with pytest.raises(errors.InvalidContext) as refused:
            UserExecutionContext.from_websocket(websocket_scope(), Somebody(), user_id=ids.uuid7())
        assert refused.value.details["field"] == "user_id"


class TestUserExecutionContextResourceManagement:
    """What was opened is closed."""

    async def test_managed_context_lifecycle(self, realistic_user_context: UserExecutionContext, async_context_manager: Manage) -> None:
        done: list[str] = []

        async def later(name: str) -> None:
            await asyncio.sleep(0)
            done.append(name)

        async with async_context_manager(realistic_user_context) as scope:
            assert scope.context is realistic_user_context
            scope.on_close(lambda: done.append("first"))
            scope.on_close(lambda: later("second"))
            scope.on_close(lambda: done.append("third"))
            assert not done
        assert done == ["third", "second", "first"]
        assert scope.closed
        with pytest.raises(errors.FailedPrecondition):
            scope.on_close(lambda: None)
        await scope.close()
        assert len(done) == 3

    async def test_managed_context_with_exception_handling(
        self, realistic_user_context: UserExecutionContext, async_context_manager: Manage
    ) -> None:
        done: list[str] = []

        def fails() -> None:
            raise OSError("the clean-up failed")

        async def working(error: type[Exception] | None) -> None:
            async with async_context_manager(realistic_user_context) as scope:
                scope.on_close(lambda: done.append("first"))
                scope.on_close(fails)
                if error is not None:
                    raise error

        with pytest.raises(LookupError) as raised:
            await working(LookupError)
        assert (done, raised.value.__notes__) == (["first"], ["clean-up of an execution context failed: OSError"])
        with pytest.raises(ExceptionGroup) as group:
            await working(None)
        assert (done, [type(each) for each in group.value.exceptions]) == (["first", "first"], [OSError])
        began, cleaning = asyncio.Event(), asyncio.Event()

        async def work() -> None:
            async with async_context_manager(realistic_user_context) as scope:
                scope.on_close(lambda: done.append("last"))
                scope.on_close(cleaning.wait)
                began.set()
                await asyncio.Event().wait()

        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(work())
            await began.wait()
            task.cancel()
            await asyncio.sleep(0)
            # cancelled a second time while it cleans up: that waits
            task.cancel()
            await asyncio.sleep(0)
            assert not task.done()
            cleaning.set()
        assert task.cancelled()
        assert done == ["first", "first", "last"]

    async def test_managed_context_with_disabled_cleanup(
        self, realistic_user_context: UserExecutionContext, async_context_manager: Manage
    ) -> None:
        done: list[str] = []
        async with async_context_manager(realistic_user_context, cleanup=False) as scope:
            scope.on_close(lambda: done.append("one"))
        assert (done, scope.closed) == ([], False)
        await scope.close()
        assert (done, scope.closed) == (["one"], True)

    def test_context_memory_usage_patterns(
        self, clean_context_registry: Isolation, performance_test_contexts: dict[int, UserExecutionContext]
    ) -> None:
        for size, context in performance_test_contexts.items():
            assert len(context.canonical_agent_context) == (len('{"filling":""}') + size if size else 2)
        numbers = {"items": list(range(1_000, 11_000))}

        def of_a_round() -> int:
            """How many blocks of memory are in use when 5 contexts of 59 KB and as many children have come and gone."""
            for _ in range(5):
                clean_context_registry.watch(made(agent_context=numbers).child("step", "m-2"))
            gc.collect()
            assert len(clean_context_registry) == 0
            return sys.getallocatedblocks()

        of_a_round()
        first, *_, last = [of_a_round() for _ in range(10)]
        # a single one of the 90 that stayed would keep 10,000 numbers
        assert last - first < 5_000


class TestUserExecutionContextPerformanceAndConcurrency:
    """The bars are those of the specification, far below what `bench/contexts.py` asks for: they catch what is a hundred times too slow."""

    @pytest.mark.multi_user
    async def test_concurrent_context_creation_performance(self, concurrent_context_factory: MakeMany) -> None:
        began = time.perf_counter()
        contexts = await concurrent_context_factory(1_000, [Somebody() for _ in range(50)])
        assert time.perf_counter() - began < 10
        assert len({context.context_id for context in contexts}) == len({context.correlation_id for context in contexts}) == 1_000

    def test_child_context_creation_performance(self, realistic_user_context: UserExecutionContext) -> None:
        began = time.perf_counter()
        children = [realistic_user_context.child("step", f"m-{number}", {"number": number}) for number in range(500)]
        assert time.perf_counter() - began < 5
        assert len({child.context_id for child in children}) == 500
        assert {child.parent_request_id for child in children} == {realistic_user_context.request_id}

    def test_context_method_call_performance(self, realistic_user_context: UserExecutionContext, clean_context_registry: Isolation) -> None:
        context = realistic_user_context
        calls: list[tuple[int, float, Callable[[], object]]] = [
            (10_000, 0.5, lambda: context.correlation_id),
            (1_000, 1.0, context.to_dict),
            (1_000, 1.0, context.audit_trail),
            (1_000, 1.0, lambda: clean_context_registry.verify(context)),
        ]
        for number, at_most_s, call in calls:
            began = time.thread_time()
            for _ in range(number):
                call()
            # processor time: the machine may have other work
            assert time.thread_time() - began < at_most_s

    @pytest.mark.multi_user
    async def test_high_concurrency_context_operations(self, clean_context_registry: Isolation, async_context_manager: Manage) -> None:
        released = asyncio.Event()

        async def operate(at: int) -> UserExecutionContext:
            async with async_context_manager(made(agent_context={"at": at})) as scope:
                child = scope.context.child("step", f"m-{at}", {"child": at})
                gone: list[int] = []
                scope.on_close(lambda: gone.append(at))
                await released.wait()
                assert child.agent_context == {"at": at, "child": at}
            assert gone == [at]
            return clean_context_registry.watch(pickle.loads(pickle.dumps(child)))  # noqa: S301 - our own

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(operate(at)) for at in range(200)]
            await asyncio.sleep(0)
            released.set()
        contexts = [task.result() for task in tasks]
        assert [context.agent_context["at"] for context in contexts] == list(range(200))
        assert clean_context_registry.verify_all() == 200
