"""A database of the release before is carried on: its sessions live, and its record of access becomes a chain."""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from chassis import migrations, postgres
from netra import ids
from standalone import prepare
from tests.fixtures.stack import ROOT, Standalone

_AUTH = ROOT / "services" / "auth" / "migrations"
_ENTRIES = "INSERT INTO auth.audit (user_id, actor, action, outcome, detail) VALUES ($1, 'auth', 'login', 'ok', $2)"


@pytest.fixture
async def empty(stores: Standalone) -> AsyncIterator[str]:
    """A database without any schema."""
    name = f"test_{secrets.token_hex(6)}"
    async with postgres.connection(stores.postgres_admin_url) as admin:
        await admin.execute(f"CREATE DATABASE {name}")
        await admin.execute(f"GRANT CONNECT, CREATE ON DATABASE {name} TO {prepare.OWNER}")
    yield name
    async with postgres.connection(stores.postgres_admin_url) as admin:
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def test_rows_of_the_first_migration_survive_those_that_follow(stores: Standalone, empty: str, tmp_path: Path) -> None:
    password = (stores.secrets / "postgres" / "owner").read_text().strip()
    owner = prepare.dsn(stores.postgres_admin_url, prepare.OWNER, password, empty)
    shutil.copy(_AUTH / "0001_users.sql", tmp_path)
    await migrations.apply(owner, "auth", tmp_path)
    user, tenant, session = ids.uuid7(), ids.uuid7(), ids.uuid7()
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, empty)) as admin:
        await admin.execute(
            "INSERT INTO auth.users (user_id, tenant_id, email, roles, tier) VALUES ($1, $2, 'a@x.example', '{user}', 'free')", user, tenant
        )
        await admin.execute(
            "INSERT INTO auth.sessions (session_id, user_id, expires_at) VALUES ($1, $2, now() + interval '1 hour')", session, user
        )
        await admin.execute("INSERT INTO auth.revocations (session_id) VALUES ($1)", session)
        for number in range(4):
            await admin.execute(_ENTRIES, user if number % 2 else None, f"entry {number}")
        # as a transaction that was rolled back leaves it
        await admin.execute("DELETE FROM auth.audit WHERE audit_id = 2")
        assert await migrations.apply(owner, "auth", _AUTH) == ["auth/0002_identity", "auth/0003_rights", "auth/0004_audit"]
        assert await admin.value("SELECT idle_until <= expires_at AND idle_until > now() FROM auth.sessions") is True
        assert await admin.value("SELECT security FROM auth.revocations WHERE session_id = $1", session) is False
        rows = await admin.fetch(
            "SELECT position, (extract(epoch FROM at) * 1000000)::bigint AS at, tenant_id, user_id, actor, action, outcome, detail, hash"
            " FROM auth.audit ORDER BY position"
        )
        head = await admin.row("SELECT position, hash FROM auth.audit_head")
    assert [(row["position"], row["detail"]) for row in rows] == [(1, "entry 0"), (2, "entry 2"), (3, "entry 3")]
    assert [str(row["tenant_id"]) if row["tenant_id"] else "" for row in rows] == ["", "", tenant]
    chained = hashlib.sha256(b"netra audit").digest()
    for row in rows:
        fields = (
            row["position"],
            row["at"],
            row["tenant_id"],
            row["user_id"],
            row["actor"],
            row["action"],
            row["outcome"],
            row["detail"],
            "",
        )
        texts = ["" if field is None else str(field) for field in fields]
        chained = hashlib.sha256(chained + b"".join(len(text.encode()).to_bytes(4, "big") + text.encode() for text in texts)).digest()
        assert row["hash"] == chained
    assert head is not None
    assert (head["position"], head["hash"]) == (3, chained)
