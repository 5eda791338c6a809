"""Who may call a tool: permissions, scope, the rules of the policy, at each call anew."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import types
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from chassis import audit, identity, trust
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from netra.context import UserExecutionContext
from netra.tool import tool
from services.dispatcher import runs
from services.dispatcher.tools import dispatch, permits, registry, workspace
from tests.fixtures import workspaces
from tests.fixtures.permits import Counted, Told, permitted, policy_of

Rule = auth_pb2.ToolRule


@tool(name="data.read", permission="data:read")
async def read() -> int:
    """Reads."""
    return 1


def refused(mine: permits.Permits) -> errors.NetraError:
    """Why the tool may not be called."""
    with pytest.raises(errors.PermissionDenied) as caught:
        mine.require(read)
    assert not mine.may_call(read)
    return caught.value


async def test_both_permissions_are_needed_and_the_missing_one_is_named() -> None:
    (await permitted("tools:execute", "data:read")).require(read)
    assert refused(await permitted("data:read")).details == {"permission": "tools:execute", "tool": "data.read"}
    assert refused(await permitted("tools:execute")).details == {"permission": "data:read", "tool": "data.read"}


async def test_a_scope_narrows_and_widens_nothing() -> None:
    both = ("tools:execute", "data:read")
    (await permitted(*both, scope=frozenset({*both, "data:write"}))).require(read)
    assert refused(await permitted(*both, scope=frozenset({"tools:execute"}))).details["permission"] == "data:read"
    assert refused(await permitted("tools:execute", scope=frozenset(both))).details["permission"] == "data:read"


@pytest.mark.parametrize(
    ("rules", "details"),
    [
        ([Rule(tool="data.read", permission="data:more")], {"permission": "data:more"}),
        ([Rule(tool="data.read", tiers=["business", "enterprise"])], {"tiers": "business,enterprise"}),
        ([Rule(tool="data.read", roles=["admin"])], {"roles": "admin"}),
        ([Rule(tool="data.*", roles=["admin"])], {"roles": "admin"}),
        ([Rule(tool="*", roles=["admin"])], {"roles": "admin"}),
        # the longest that fits counts, and the name itself before all patterns
        ([Rule(tool="*"), Rule(tool="data.*", roles=["admin"])], {"roles": "admin"}),
        ([Rule(tool="data.*"), Rule(tool="data.read", roles=["admin"])], {"roles": "admin"}),
    ],
)
async def test_a_rule_narrows_and_says_what_would_help(rules: list[Rule], details: dict[str, str]) -> None:
    assert refused(await permitted("tools:execute", "data:read", tools=rules)).details == {**details, "tool": "data.read"}


@pytest.mark.parametrize(
    "rules",
    [
        [Rule(tool="data.read")],
        [Rule(tool="data.read", permission="data:read", tiers=["free"], roles=["user", "admin"])],
        [Rule(tool="other", roles=["admin"])],
        [Rule(tool="data.w*", roles=["admin"])],
        [Rule(tool="*", roles=["admin"]), Rule(tool="data.*")],
        [Rule(tool="data.*", roles=["admin"]), Rule(tool="data.read")],
    ],
)
async def test_a_rule_for_something_else_does_not_count(rules: list[Rule]) -> None:
    (await permitted("tools:execute", "data:read", tools=rules)).require(read)


@pytest.mark.parametrize(
    ("tier", "least", "tiers"),
    [("free", "", None), ("free", "free", None), ("business", "early", None), ("free", "early", "early,business,enterprise,internal"),
     ("business", "enterprise", "enterprise,internal")],
)  # fmt: skip
async def test_a_tool_may_ask_for_a_tier(tier: str, least: str, tiers: str | None) -> None:
    spec, mine = dataclasses.replace(read, min_tier=least), await permitted("tools:execute", "data:read", tier=tier)
    assert mine.may_call(spec) == (tiers is None)
    if tiers is not None:
        with pytest.raises(errors.PermissionDenied) as caught:
            mine.require(spec)
        assert caught.value.details == {"tiers": tiers, "tool": "data.read"}


@pytest.mark.parametrize(("least", "roles"), [("", None), ("readonly", None), ("user", None), ("admin", "admin")])
async def test_a_tool_may_ask_for_a_role(least: str, roles: str | None) -> None:
    spec, mine = dataclasses.replace(read, min_role=least), await permitted("tools:execute", "data:read")
    assert mine.may_call(spec) == (roles is None)
    if roles is not None:
        with pytest.raises(errors.PermissionDenied) as caught:
            mine.require(spec)
        assert caught.value.details == {"roles": roles, "tool": "data.read"}


async def test_what_is_shown_is_what_may_be_called() -> None:
    names, roles, tiers = ("data.read", "data.write", "other"), ("", "readonly", "user", "admin"), ("", "free", "early", "business")
    specs = [
        dataclasses.replace(read, name=name, permission=permission, min_role=role, min_tier=tier)
        for name, permission, role, tier in itertools.product(names, ("data:read", "data:more"), roles, tiers)
    ]
    rules = [
        [], [Rule(tool="data.*", permission="data:more"), Rule(tool="data.read", tiers=["business"])],
        [Rule(tool="*", roles=["admin"]), Rule(tool="other", roles=["user"], tiers=["free", "early"])],
    ]  # fmt: skip
    permissions = [("tools:execute", "data:read"), ("tools:execute", "data:more", "data:read"), ("data:read",)]
    verdicts = set()
    for tools, held, tier, scope in itertools.product(
        rules, permissions, ("free", "business", "gold"), (None, frozenset({"tools:execute"}))
    ):
        mine = await permitted(*held, tools=tools, tier=tier, scope=scope)
        sight = mine.sight()
        for spec in specs:
            try:
                mine.require(spec)
                allowed = True
            except errors.PermissionDenied:
                allowed = False
            assert sight(spec) == mine.may_call(spec) == allowed, (spec, tools, held, tier, scope)
            verdicts.add((spec.name, allowed))
    assert len(verdicts) == 6


async def test_another_policy_counts_at_the_next_call() -> None:
    known = trust.Trust()
    mine = await permitted("tools:execute", "data:read", known=known)
    mine.require(read)
    await known.apply(auth_pb2.WatchTrustResponse(policy=policy_of("tools:execute")))
    assert refused(mine).details["permission"] == "data:read"


def _left(tier: str, *roles: str) -> runs.Rights:
    return runs.Rights(roles, tier, datetime.now(UTC))


class TestRights:
    """Roles and tier of a user may change while a run of theirs goes on."""

    async def _mine(self, now: runs.Rights | None, counted: Counted | None = None) -> permits.Permits:
        """What a run may call that an admin of the tier business began, who has other rights by now."""
        grants = [
            auth_pb2.Grant(role="admin", tier="business", permissions=["tools:execute", "data:read"]),
            auth_pb2.Grant(role="user", tier="business", permissions=["tools:execute"]),
            auth_pb2.Grant(role="admin", tier="free", permissions=["tools:execute"]),
            auth_pb2.Grant(role="user", tier="enterprise", permissions=["tools:execute", "data:read", "data:more"]),
        ]
        limits = [auth_pb2.TierLimits(tier=tier, tool_calls_per_minute=calls) for tier, calls in (("business", 60), ("free", 6))]
        rule = Rule(tool="data.ruled", roles=["admin"], tiers=["business"])
        known = trust.Trust()
        policy = auth_pb2.Policy(version=1, grants=grants, limits=limits, tools=[rule])
        await known.apply(auth_pb2.WatchTrustResponse(policy=policy))
        holder = permits.Holder(ids.UserId.new(), ("admin",), "business", None, identity.Caller())
        return permits.Permits(holder, known, counted or Counted(), audit.Refusals(Told().send), lambda: now)

    async def test_what_was_taken_away_counts_at_once(self) -> None:
        (await self._mine(None)).require(read)
        (await self._mine(_left("business", "admin"))).require(read)
        assert refused(await self._mine(_left("business", "user"))).details["permission"] == "data:read"
        assert refused(await self._mine(_left("free", "admin"))).details["permission"] == "data:read"

    async def test_what_came_later_gives_a_run_nothing(self) -> None:
        @tool(name="data.more", permission="data:more")
        async def more() -> int:
            """Needs what only the present rights have."""
            return 1

        with pytest.raises(errors.PermissionDenied):
            (await self._mine(_left("enterprise", "user"))).require(more)

    @pytest.mark.parametrize("now", [_left("business", "user"), _left("enterprise", "admin")])
    async def test_a_rule_is_asked_for_both(self, now: runs.Rights) -> None:
        @tool(name="data.ruled", permission="tools:execute")
        async def ruled() -> int:
            """Has a rule."""
            return 1

        (await self._mine(None)).require(ruled)
        with pytest.raises(errors.PermissionDenied):
            (await self._mine(now)).require(ruled)

    async def test_calls_are_counted_by_the_present_tier(self) -> None:
        counted = Counted()
        await (await self._mine(_left("free", "admin"), counted)).count()
        assert [per_minute for _, _, per_minute in counted.asked] == [6]


def context() -> UserExecutionContext:
    """Some context."""
    new: dict[str, Any] = {
        "thread_id": ids.ThreadId.new(),
        "run_id": ids.RunId.new(),
        "request_id": "m1",
        "roles": ["user"],
        "tier": "free",
    }
    return UserExecutionContext.from_request(
        user_id=ids.UserId.new(), tenant_id=ids.TenantId.new(), session_id=ids.SessionId.new(), **new
    )  # fmt: skip


class Reporter:
    """Takes what a call reports."""

    def __init__(self) -> None:
        self.outcomes: list[dispatch.Outcome] = []
        self.begun: list[str] = []
        self.recorded = asyncio.Event()

    def tool_executing(self, call: dispatch.Call, step_key: str, effects: bool) -> None:
        """Begins."""
        self.begun.append(call.tool_call_id)

    def tool_completed(self, outcome: dispatch.Outcome, enforcement: Any, step_key: str) -> None:
        """Is over."""
        self.outcomes.append(outcome)

    def tool_progress(self, call: dispatch.Call, progress: float | None, message: str | None) -> None:
        """Has come so far."""

    def security_violation(self, violation: str, message: str, details: Any = None) -> None:
        """Tried what is forbidden."""

    async def barrier(self) -> None:
        """Waits until the test says that all is recorded."""
        await self.recorded.wait()

    def require_lease(self) -> None:
        """It is ours."""


@pytest.fixture
def files(tmp_path: Path) -> Iterator[workspace.Workspace]:
    """The files of a run that has none."""
    spaces = workspace.Workspaces(tmp_path / "work", None, 1)  # type: ignore[arg-type]
    yield spaces.of(ids.RunId.new(), workspaces.no_token)
    spaces.close()


async def test_calls_are_counted_for_the_user_and_too_many_are_told_as_such(files: workspace.Workspace) -> None:
    counted, reporter = Counted(2), Reporter()
    mine = await permitted("tools:execute", "data:read", counted=counted)
    async with dispatch.UnifiedToolDispatcher.for_context(context(), registry.ToolRegistry([read]), mine, reporter, files) as tools:
        for _ in range(3):
            await tools.execute("data.read", {})
    assert [(outcome.status, outcome.error and outcome.error.code) for outcome in reporter.outcomes] == [
        ("success", None), ("success", None), ("error", "RATE_LIMITED"),
    ]  # fmt: skip
    assert {(kind, per_minute) for kind, _, per_minute in counted.asked} == {("tool_calls", 60)}


async def test_a_deprecated_tool_can_be_called_and_that_is_counted(
    files: workspace.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    told: list[tuple[int, object]] = []
    monkeypatch.setattr(registry, "_deprecated", types.SimpleNamespace(add=lambda *what: told.append(what)))
    old = dataclasses.replace(read, name="data.old", deprecated="Use data.read.")
    tools, mine = registry.ToolRegistry([read, old]), await permitted("tools:execute", "data:read")
    async with dispatch.UnifiedToolDispatcher.for_context(context(), tools, mine, Reporter(), files) as calls:
        assert [found.spec.name for found in calls.discover().tools] == ["data.old", "data.read"]
        assert [(await calls.execute(name, {})).status for name in ("data.old", "data.read", "data.old")] == ["success"] * 3
    assert told == [(1, {"tool": "data.old"})] * 2


async def test_a_call_that_is_refused_costs_nothing_and_is_told_to_the_record_of_access(files: workspace.Workspace) -> None:
    counted, told = Counted(), Told()
    owner = context()
    known = trust.Trust()
    await known.apply(auth_pb2.WatchTrustResponse(policy=policy_of("tools:execute")))
    holder = permits.Holder(owner.user_id, owner.roles, owner.tier, None, identity.Caller(service="dispatcher", context=owner))
    refusals = audit.Refusals(told.send)
    mine = permits.Permits(holder, known, counted, refusals)
    async with dispatch.UnifiedToolDispatcher.for_context(owner, registry.ToolRegistry([read]), mine, Reporter(), files) as tools:
        for _ in range(3):
            assert (await tools.execute("data.read", {})).status == "denied"
    await refusals.flush()
    assert counted.asked == []
    assert [(entry.actor, entry.user_id, entry.action, entry.detail) for entry in told.entries] == [
        (f"service:dispatcher for user:{owner.user_id}", owner.user_id, "deny", "tool data.read: permission_denied, data:read; 3 times"),
    ]  # fmt: skip


class Long:
    """A call that waits for long before its tool is called, under what is trusted meanwhile."""

    def __init__(self) -> None:
        self.known, self.counted, self.told, self.reporter = trust.Trust(), Counted(), Told(), Reporter()
        self.owner, self.refusals = context(), audit.Refusals(self.told.send)
        self.called: list[str] = []

    @contextlib.asynccontextmanager
    async def dispatcher(self, files: workspace.Workspace) -> AsyncIterator[dispatch.UnifiedToolDispatcher]:
        """Calls tools that wait for the record, and for a slot."""

        @tool(name="data.write", permission="data:read", side_effects=True, timeout_s=60)
        async def write() -> int:
            """Changes something."""
            self.called.append("data.write")
            return 1

        @tool(name="data.heavy", permission="data:read", backend="process", timeout_s=60)
        async def heavy() -> int:
            """Works in a process of its own."""
            self.called.append("data.heavy")
            return 1

        await self.known.apply(auth_pb2.WatchTrustResponse(policy=policy_of("tools:execute", "data:read")))
        owner, caller = self.owner, identity.Caller(service="dispatcher", context=self.owner)
        began = owner.created_at.timestamp()
        holder = permits.Holder(owner.user_id, owner.roles, owner.tier, None, caller, owner.session_id, began)
        mine = permits.Permits(holder, self.known, self.counted, self.refusals)
        tools = registry.ToolRegistry([write, heavy])
        async with dispatch.UnifiedToolDispatcher.for_context(owner, tools, mine, self.reporter, files) as made:
            yield made

    async def stopped(self) -> None:
        """The session ends for reasons of security."""
        revocation = auth_pb2.Revocation(session_id=self.owner.session_id, security=True)
        revocation.revoked_at.GetCurrentTime()
        await self.known.apply(auth_pb2.WatchTrustResponse(revocations=[revocation]))

    async def refused(self) -> None:
        """The policy allows it no more."""
        await self.known.apply(auth_pb2.WatchTrustResponse(policy=policy_of("tools:execute")))

    async def turns(self) -> None:
        """Whoever can go on has done so."""
        for _ in range(20):
            await asyncio.sleep(0)


@pytest.mark.parametrize("name", ["data.write", "data.heavy"])
async def test_what_changes_while_a_call_waits_counts_before_its_tool(files: workspace.Workspace, name: str) -> None:
    long = Long()
    async with long.dispatcher(files) as tools, asyncio.timeout(20), asyncio.TaskGroup() as group:
        await files.slots.acquire()
        call = group.create_task(tools.execute(name, {}))
        await long.turns()
        await long.refused()
        long.reporter.recorded.set()
        files.slots.release()
    assert (call.result().status, long.called) == ("denied", [])
    # told in a pair, on record as a refusal, counted once
    assert long.reporter.begun == [outcome.call.tool_call_id for outcome in long.reporter.outcomes]
    assert len(long.counted.asked) == 1
    await long.refusals.flush()
    assert [entry.detail for entry in long.told.entries] == [f"tool {name}: permission_denied, data:read"]


@pytest.mark.parametrize("name", ["data.write", "data.heavy"])
async def test_a_user_who_is_stopped_while_a_call_waits_has_no_tool_called(files: workspace.Workspace, name: str) -> None:
    long = Long()
    async with long.dispatcher(files) as tools, asyncio.timeout(20), asyncio.TaskGroup() as group:
        await files.slots.acquire()
        call = group.create_task(tools.execute(name, {}))
        await long.turns()
        await long.stopped()
        long.reporter.recorded.set()
        files.slots.release()
        await long.turns()
        # the cancel of the run is what ends it
        call.cancel()
    assert (long.called, [outcome.status for outcome in long.reporter.outcomes]) == ([], ["cancelled"])


async def test_who_calls_too_often_is_told_before_the_call_waits(files: workspace.Workspace) -> None:
    long = Long()
    long.counted.left = 0
    async with long.dispatcher(files) as tools, asyncio.timeout(20):
        await files.slots.acquire()
        codes = [
            outcome.error and outcome.error.code for outcome in [await tools.execute(name, {}) for name in ("data.write", "data.heavy")]
        ]
    assert codes == ["RATE_LIMITED", "RATE_LIMITED"]
