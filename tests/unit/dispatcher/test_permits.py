"""Who may call a tool: permissions, scope, the rules of the policy, at each call anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chassis import audit, identity, trust
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from netra.context import UserExecutionContext
from netra.tool import tool
from services.dispatcher.tools import dispatch, permits, registry, workspace
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


async def test_another_policy_counts_at_the_next_call() -> None:
    known = trust.Trust()
    mine = await permitted("tools:execute", "data:read", known=known)
    mine.require(read)
    await known.apply(auth_pb2.WatchTrustResponse(policy=policy_of("tools:execute")))
    assert refused(mine).details["permission"] == "data:read"


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

    def tool_executing(self, call: dispatch.Call) -> None:
        """Begins."""

    def tool_completed(self, outcome: dispatch.Outcome, enforcement: Any, step_key: str) -> None:
        """Is over."""
        self.outcomes.append(outcome)

    async def barrier(self) -> None:
        """Nothing waits."""


@pytest.fixture
def files(tmp_path: Path) -> Iterator[workspace.Workspace]:
    """The files of a run that has none."""
    spaces = workspace.Workspaces(tmp_path / "work", None, 1)  # type: ignore[arg-type]
    yield spaces.of(ids.RunId.new(), str)
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
