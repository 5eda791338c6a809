"""Two walls stand around what is somebody's: row-level security, and what each statement says itself. Each is taken away while the other
one stands, in a system of these tests' own: the proof finds the one, and the other one holds."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from chassis import postgres
from standalone import prepare
from tests.fixtures import own
from tests.prove.isolation import probes, proof, settle, tables, world
from tests.prove.isolation.asking import Rpc
from tests.prove.isolation.example import USER
from tests.prove.isolation.judge import Findings, Judge

# policies of what services do in users' names; and what the role may do there at all
_POLICIES = (
    "SELECT p.polrelid::regclass::text AS name, p.polname AS policy, p.polcmd::text AS command,"
    " pg_get_expr(p.polqual, p.polrelid) AS shown, pg_get_expr(p.polwithcheck, p.polrelid) AS checked,"
    " has_any_column_privilege(r.oid, p.polrelid, 'SELECT') AS reads, has_any_column_privilege(r.oid, p.polrelid, 'INSERT') AS makes"
    " FROM pg_policy AS p JOIN pg_roles AS r ON r.oid = ANY(p.polroles) WHERE r.rolname = ANY($1) ORDER BY 1, 2"
)
# what nobody has by having used the system a little
_MORE = (
    "INSERT INTO auth.login_codes (code_digest, bound_to, user_id, method, expires_at)"
    " SELECT sha256('a'), sha256('b'), $1::uuid, 'password', now() + interval '1 hour'",
    "INSERT INTO auth.reset_tokens (token_digest, user_id, expires_at) SELECT sha256('c'), $1::uuid, now() + interval '1 hour'",
    "INSERT INTO auth.identities (provider, subject, user_id) VALUES ('corp', 'a', $1::uuid)",
    "INSERT INTO auth.known_devices (user_id, device_digest) VALUES ($1::uuid, sha256('d'))",
    "INSERT INTO events.erasures (user_id, request_id, asked_by, asked_at, upto, runs) VALUES ($1::uuid, 'x', $1::uuid, now(), 0, 0)",
    "INSERT INTO dispatcher.erasures (user_id, request_id) VALUES ($1::uuid, 'x')",
    "INSERT INTO context.hidden_runs (user_id, run_id, thread_id)"
    " SELECT $1::uuid, gen_random_uuid(), thread_id FROM context.threads WHERE user_id = $1::uuid LIMIT 1",
    "INSERT INTO dispatcher.messages (run_id, number, message_id, user_id, owner_id, thread_id, request_id, content)"
    " SELECT run_id, 1000, gen_random_uuid(), user_id, user_id, thread_id, 'walls', 'a' FROM dispatcher.runs"
    " WHERE user_id = $1::uuid AND kind = 'agent' LIMIT 1",
    "WITH asked AS (INSERT INTO dispatcher.approvals"
    "  (approval_id, run_id, user_id, thread_id, step_key, message, tool_name, parameters, quorum, expires_at)"
    "  SELECT gen_random_uuid(), run_id, user_id, thread_id, 'walls', 'a', '', '{}', 1, now() + interval '1 hour' FROM dispatcher.runs"
    "  WHERE user_id = $1::uuid AND kind = 'agent' LIMIT 1 RETURNING approval_id, user_id, thread_id)"
    " INSERT INTO dispatcher.approval_votes (approval_id, user_id, owner_id, thread_id, decision, comment)"
    " SELECT approval_id, user_id, user_id, thread_id, 'approve', 'a' FROM asked",
)

# beside what reads one thing that is named
SAMPLE = (
    "auth.EndSessions", "auth.RevokeApiKey", "auth.ListSessions", "auth.ListApiKeys", "context.OpenContext", "context.ListThreads",
    "context.PutArtifact", "context.DeleteArtifact", "context.ExportData", "dispatcher.StartRun", "dispatcher.CancelRun",
    "dispatcher.ExecuteTool", "events.Subscribe", "events.ListThreadEvents", "events.ExportEvents",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy, and how it is opened: one half of it, or both."""

    table: str
    name: str
    shown: str | None
    checked: str | None

    def said(self, shown: str | None, checked: str | None) -> str:
        """SQL that makes it say this."""
        parts = [f"USING ({shown})"] if shown else []
        parts += [f"WITH CHECK ({checked})"] if checked else []
        return f"ALTER POLICY {self.name} ON {self.table} {' '.join(parts)}"

    @contextlib.asynccontextmanager
    async def opened(self, admin: postgres.Transaction, *, shown: bool, checked: bool) -> AsyncIterator[None]:
        """For the time of the block it lets everything through."""
        # what says nothing of new rows asks of them what it asks of all
        before = self.said(self.shown if shown else None, (self.checked or self.shown) if checked else None)
        await admin.execute(self.said("true" if shown else None, "true" if checked else None))
        try:
            yield
        finally:
            await admin.execute(before)


async def _openings(admin: postgres.Transaction) -> list[tuple[Policy, bool, bool]]:
    """Each policy with each half of it that means anything; to change a row, it is found and looked at again."""
    found = []
    for row in await admin.fetch(_POLICIES, [f"netra_{service}" for service in prepare.SERVICES]):
        policy, command = Policy(row["name"], row["policy"], row["shown"], row["checked"]), row["command"]
        if command in ("*", "r", "d") and row["reads"]:
            found.append((policy, True, False))
        if command in ("*", "a") and row["makes"]:
            found.append((policy, False, True))
        if command == "w":
            found.append((policy, True, True))
    return found


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[own.Own]:
    """A system whose walls are taken down."""
    with own.running(tmp_path_factory.mktemp("walls") / "netra") as system:
        yield system


@pytest.fixture
async def there(mine: own.Own) -> AsyncIterator[world.World]:
    """Its people, who have what they have."""
    async with world.around(mine) as found:
        await settle.everybody(found, "A", "B", "C")
        yield found


@pytest.mark.timeout(300)  # a system is started, and each policy is tried
async def test_each_wall_that_is_opened_is_found(mine: own.Own, there: world.World) -> None:
    whole = Findings()
    judge = Judge(whole, [there[name] for name in "ABC"])
    async with postgres.connection(mine.database_url) as admin:
        for statement in _MORE:
            await admin.execute(statement, there["A"].user_id)
        assert await tables.probe(there, mine, judge) > 200
        assert whole.ok, (whole.off, whole.controls_failed)
        openings, missed = await _openings(admin), []
        for policy, shown, checked in openings:
            found = Findings()
            async with policy.opened(admin, shown=shown, checked=checked):
                await tables.probe(there, mine, Judge(found, [there[name] for name in "ABC"]), frozenset({policy.table}))
            if not found.leaks:
                missed.append((policy.table, policy.name, shown, checked))
        assert missed == []
        assert len(openings) > 50
        # all are closed again
        again = Findings()
        await tables.probe(there, mine, Judge(again, [there[name] for name in "ABC"]))
        assert again.ok, (again.off, again.controls_failed)


async def test_a_table_of_users_without_a_wall_is_a_leak(mine: own.Own, there: world.World) -> None:
    found = Findings()
    async with postgres.connection(mine.database_url) as admin:
        await admin.execute("CREATE TABLE context.forgotten (grantee_id uuid)")
        try:
            await tables.probe(there, mine, Judge(found, [there["A"], there["B"]]), frozenset({"context.forgotten"}))
        finally:
            await admin.execute("DROP TABLE context.forgotten")
    assert found.leaks == ["context.forgotten has grantee_id and no wall"]


@pytest.mark.timeout(300)
async def test_statements_keep_users_apart_when_no_wall_does(mine: own.Own, there: world.World) -> None:
    found, chance = Findings(), random.Random(7)
    judge = Judge(found, [there[name] for name in "ABC"])
    known, _, _ = await proof.coverage(there)
    reading = {name: one for name, one in known.items() if isinstance(one[0], Rpc) and one[1].reads and one[1].by == USER}
    inside = reading | {name: known[name] for name in SAMPLE}
    async with postgres.connection(mine.database_url) as admin, contextlib.AsyncExitStack() as stack:
        policies = {policy.table + policy.name: policy for policy, _, _ in await _openings(admin)}
        for policy in policies.values():
            await stack.enter_async_context(policy.opened(admin, shown=policy.shown is not None, checked=policy.checked is not None))
        await proof.controls(there, judge, inside)
        await proof.asked(probes.Prober(there, judge, chance, values=2), inside)
    assert "\n".join(found.leaks + found.differences + found.controls_failed) == ""
    assert found.probes > 300
