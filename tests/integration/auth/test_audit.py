"""The record of access over a real database: chained, without gaps, and whoever changes it is found out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import asyncpg
import pytest

from chassis import audit as audit_
from chassis import identity, postgres
from netra import errors, ids
from services.auth import audit, servicer_policy, store_audit
from standalone import prepare
from tests.fixtures.stack import Standalone

READER = audit.Reader(ids.UserId.new(), "user:somebody")


@dataclass(frozen=True, slots=True)
class Kept:
    """The record, and the way of each role to its tables."""

    record: audit.Record
    dsn: Callable[[str, str], str]

    async def as_role(self, role: str, query: str) -> None:
        """Run a statement as a role of the database."""
        folder, file = {"netra_owner": ("postgres", "owner"), "netra_auth": ("auth", "postgres")}.get(role, ("auth", "postgres_system"))
        async with postgres.connection(self.dsn(role, f"{folder}/{file}")) as connection:
            await connection.execute(query)


@pytest.fixture
async def kept(stores: Standalone, database: str) -> AsyncIterator[Kept]:
    """The record of an empty database."""

    def dsn(role: str, secret: str) -> str:
        return prepare.dsn(stores.postgres_admin_url, role, (stores.secrets / secret).read_text().strip(), database)

    pool = await postgres.open_pool(dsn("netra_auth_system", "auth/postgres_system"), "tests")
    yield Kept(audit.Record(store_audit.AuditStore(pool)), dsn)
    await pool.close()


def told(**more: str) -> audit.Told:
    """Something to record."""
    given = {
        "tenant_id": "",
        "user_id": "",
        "actor": "anonymous",
        "action": "deny",
        "outcome": "refused",
        "detail": "",
        "correlation_id": "",
    }
    return audit.Told(**{**given, **more})


async def _filled(kept: Kept, entries: int = 10) -> None:
    await kept.record.append("context", [told(detail=f"number {number} — ü") for number in range(1, entries + 1)])


async def test_entries_are_chained_without_gaps_however_many_write_at_once(kept: Kept) -> None:
    await asyncio.gather(*(_filled(kept, 7) for _ in range(20)))
    found = [entry async for part in kept.record.export(0, READER) for entry in part]
    assert [entry.position for entry in found] == list(range(1, 142))
    # here as anybody can do it with an export
    before = audit.GENESIS
    for entry in found:
        assert entry.hash == audit.entry_hash(before, entry)
        before = entry.hash
    verdict = await kept.record.verify(READER)
    assert (verdict.verified, verdict.broken_at, verdict.last, verdict.complete) == (141, 0, audit.Link(141, before), True)


async def test_an_empty_record_fits(kept: Kept) -> None:
    verdict = await kept.record.verify(READER)
    assert (verdict.verified, verdict.broken_at, verdict.last, verdict.complete) == (0, 0, audit.START, True)


@pytest.mark.parametrize(
    ("change", "broken_at", "verified"),
    [
        ("UPDATE auth.audit SET detail = 'nothing happened' WHERE position = 4", 4, 3),
        ("UPDATE auth.audit SET outcome = 'ok' WHERE position = 10", 10, 9),
        ("UPDATE auth.audit SET at = at - interval '1 microsecond' WHERE position = 1", 1, 0),
        ("UPDATE auth.audit SET user_id = gen_random_uuid() WHERE position = 7", 7, 6),
        ("UPDATE auth.audit SET hash = sha256('x') WHERE position = 5", 5, 4),
        ("DELETE FROM auth.audit WHERE position = 6", 6, 5),
        ("DELETE FROM auth.audit WHERE position = 1", 1, 0),
        ("DELETE FROM auth.audit WHERE position > 8", 9, 8),
        ("DELETE FROM auth.audit", 1, 0),
        ("DELETE FROM auth.audit WHERE position = 10; UPDATE auth.audit_head SET position = 9", 9, 9),
        ("INSERT INTO auth.audit (position, actor, action, outcome, hash) VALUES (11, 'auth', 'login', 'ok', sha256('x'))", 11, 10),
        (
            "UPDATE auth.audit SET position = 99 WHERE position = 2; UPDATE auth.audit SET position = 2 WHERE position = 3;"
            " UPDATE auth.audit SET position = 3 WHERE position = 99",
            2,
            1,
        ),
        # whoever computes the hash of the changed entry anew is betrayed by the next one
        (
            "UPDATE auth.audit AS a SET detail = 'forged', hash = auth.audit_hash((SELECT hash FROM auth.audit WHERE position = 3),"
            " a.position, a.at, a.tenant_id, a.user_id, a.actor, a.action, a.outcome, 'forged', a.correlation_id) WHERE position = 4",
            5,
            4,
        ),
    ],
)
async def test_what_the_owner_of_the_tables_changes_is_found_with_its_position(
    kept: Kept, change: str, broken_at: int, verified: int
) -> None:
    await _filled(kept)
    await kept.as_role("netra_owner", change)
    verdict = await kept.record.verify(READER)
    assert (verdict.verified, verdict.broken_at) == (verified, broken_at)


class TestVerifyFromAKeptPlace:
    """Somebody kept a position and its hash elsewhere."""

    async def test_what_follows_is_chained_to_it(self, kept: Kept) -> None:
        await _filled(kept)
        first = await kept.record.verify(READER)
        await _filled(kept)
        second = await kept.record.verify(READER, first.last)
        # the ten, and that it was verified before
        assert (second.verified, second.broken_at, second.complete) == (11, 0, True)

    async def test_part_by_part(self, kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(audit, "_VERIFIED_AT_ONCE", 4)
        await _filled(kept)
        last = audit.START
        parts: list[audit.Verdict] = []
        while not parts or not (parts[-1].complete or parts[-1].broken_at):
            parts.append(await kept.record.verify(READER, last))
            last = parts[-1].last
        # each verification is an entry too: ten, and the two before the last
        assert [part.verified for part in parts] == [4, 4, 4]
        assert not any(part.broken_at for part in parts)

    async def test_a_record_written_anew_is_found(self, kept: Kept) -> None:
        await _filled(kept)
        old = await kept.record.verify(READER)
        await kept.as_role("netra_owner", "DELETE FROM auth.audit; UPDATE auth.audit_head SET position = 0, hash = sha256('netra audit')")
        await _filled(kept, 10)
        assert not (await kept.record.verify(READER)).broken_at
        assert (await kept.record.verify(READER, old.last)).broken_at == 11

    async def test_a_record_cut_short_is_found(self, kept: Kept) -> None:
        await _filled(kept)
        await kept.record.verify(READER)
        old = await kept.record.verify(READER)
        await kept.as_role(
            "netra_owner",
            "DELETE FROM auth.audit WHERE position > 10;"
            " UPDATE auth.audit_head SET position = 10, hash = (SELECT hash FROM auth.audit WHERE position = 10)",
        )
        assert (await kept.record.verify(READER, old.last)).broken_at == old.last.position

    @pytest.mark.parametrize("place", [audit.Link(-1, audit.GENESIS), audit.Link(0, b"x" * 32), audit.Link(3, b""), audit.Link(3, b"x")])
    async def test_what_is_no_place_is_refused(self, kept: Kept, place: audit.Link) -> None:
        with pytest.raises(errors.InvalidPayload):
            await kept.record.verify(READER, place)


@pytest.mark.parametrize("role", ["netra_auth", "netra_auth_system"])
@pytest.mark.parametrize(
    "change",
    [
        "UPDATE auth.audit SET detail = ''",
        "DELETE FROM auth.audit",
        "TRUNCATE auth.audit",
        "INSERT INTO auth.audit (position, actor, action, outcome, hash) VALUES (99, 'auth', 'login', 'ok', sha256('x'))",
        "UPDATE auth.audit_head SET position = 0",
    ],
)
async def test_no_role_of_the_service_can_change_it(kept: Kept, role: str, change: str) -> None:
    await _filled(kept, 3)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await kept.as_role(role, change)
    assert (await kept.record.verify(READER)).verified == 3


class TestAppend:
    """What services may tell."""

    async def test_who_told_it_is_in_the_entry(self, kept: Kept) -> None:
        user = ids.UserId.new()
        given = [
            told(),
            told(actor=f"user:{user}", user_id=user, detail="GetRun"),
            told(actor=""),
            told(actor=f"service:events for user:{user}"),
        ]
        await kept.record.append("context", given)
        found = [entry.told async for part in kept.record.export(1, READER) for entry in part]
        assert [(entry.actor, entry.detail) for entry in found[:4]] == [
            ("anonymous", "context"), (f"user:{user}", "context: GetRun"), ("service:context", "context"),
            (f"service:events for user:{user}", "context"),
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("wrong", "field"),
        [
            ({"actor": "auth"}, "actor"), ({"actor": "netra"}, "actor"), ({"actor": "user:1"}, "actor"),
            ({"actor": "service:x\ny"}, "actor"), ({"action": ""}, "action"), ({"action": "a\nb"}, "action"),
            ({"outcome": "x" * 65}, "outcome"), ({"detail": "x" * 2001}, "detail"), ({"detail": "\0"}, "detail"),
            ({"user_id": "somebody"}, ""), ({"tenant_id": "' OR 1=1"}, ""),
        ],
    )  # fmt: skip
    async def test_what_does_not_fit_is_refused_as_a_whole(self, kept: Kept, wrong: dict[str, str], field: str) -> None:
        with pytest.raises(errors.InvalidPayload) as refused:
            await kept.record.append("context", [told(), told(**wrong)])
        assert field in refused.value.message
        assert (await kept.record.verify(READER)).verified == 0

    async def test_at_most_so_many_at_once(self, kept: Kept) -> None:
        with pytest.raises(errors.TooLarge):
            await _filled(kept, 501)
        await _filled(kept, 500)
        assert (await kept.record.verify(READER)).verified == 500

    async def test_a_record_that_somebody_added_to_by_hand_stops_no_process(self, kept: Kept) -> None:
        await _filled(kept, 3)
        await kept.as_role(
            "netra_owner",
            "INSERT INTO auth.audit (position, actor, action, outcome, hash) VALUES (4, 'auth', 'login', 'ok', sha256('x'))",
        )
        refusals = audit_.Refusals(servicer_policy.told_to(kept.record))
        refusals.note("Runs/Start", errors.PermissionDenied(), identity.Caller())
        await refusals.flush()
        # it is lost, and counted
        refusals.note("Runs/Start", errors.PermissionDenied(), identity.Caller())
        await kept.as_role("netra_owner", "DELETE FROM auth.audit WHERE position = 4")
        await refusals.flush()
        found = [entry.told.detail async for part in kept.record.export(4, READER) for entry in part]
        assert found[:2] == ["auth: 1 entries are not in the record", "auth: Runs/Start: permission_denied"]


async def test_a_user_of_another_tenant_is_looked_for_as_one_that_there_is_not(kept: Kept) -> None:
    mine, theirs, user, nobody = (str(ids.UserId.new()) for _ in range(4))
    for tenant, who, many in ((theirs, user, 500), (mine, str(ids.UserId.new()), 150)):
        line = f"auth.append_audit('{tenant}', '{who}', 'user:x', 'deny', 'refused', '', '')"
        await kept.as_role("netra_auth_system", f"SELECT {line} FROM generate_series(1, {many})")  # noqa: S608 - of ids
    await kept.as_role("netra_owner", "ANALYZE auth.audit")
    asked = f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF, BUFFERS OFF) {store_audit._FIND}"
    found = []
    async with postgres.connection(kept.dsn("netra_auth_system", "auth/postgres_system")) as connection:
        for who in (user, nobody):
            rows = await connection.fetch(asked, mine, who, "", "", None, None, 0, 51)
            found.append("\n".join(row[0] for row in rows).replace(who, "who"))
    assert found[0] == found[1]
    assert "Removed by Filter" not in found[0]
