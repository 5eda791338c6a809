"""A record of the release before is carried on: its events lie in their classes, its days are known."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from chassis import migrations, postgres
from netra import ids
from services.events import frames, store
from standalone import prepare
from tests.fixtures.stack import ROOT, Standalone

_MIGRATIONS = ROOT / "services" / "events" / "migrations"
_EVENT = """
INSERT INTO events.events (retention, recorded_at, user_id, cursor, seq, event_id, type, frame)
VALUES ($1, timestamptz '2026-11-10 12:00:00+00' + interval '1 day' * $2, $3, $4, $4, $5, 'agent_thinking', $6)
"""


async def test_events_move_to_their_classes_and_are_read_as_before(stores: Standalone, tmp_path: Path) -> None:
    name, user = f"test_{secrets.token_hex(6)}", ids.uuid7()
    password = (stores.secrets / "postgres" / "owner").read_text().strip()
    shutil.copy(_MIGRATIONS / "0001_events.sql", tmp_path)
    async with postgres.connection(stores.postgres_admin_url) as admin:
        await admin.execute(f"CREATE DATABASE {name}")
        await admin.execute(f"GRANT CONNECT, CREATE ON DATABASE {name} TO {prepare.OWNER}")
        await admin.execute(f"GRANT CONNECT ON DATABASE {name} TO netra_events")
    try:
        owner = prepare.dsn(stores.postgres_admin_url, prepare.OWNER, password, name)
        await migrations.apply(owner, "events", tmp_path)
        async with postgres.connection(prepare.on_database(stores.postgres_admin_url, name)) as admin:
            await admin.execute("INSERT INTO events.cursors (user_id, last) VALUES ($1, 6)", user)
            for cursor, retention in enumerate(("free", "free", "internal", "unheard-of", "internal", "free"), 1):
                await admin.execute(_EVENT, retention, cursor // 2, user, cursor, ids.uuid7(), b"{}")
            newer = [
                "events/0002_retention",
                "events/0003_reopening",
                "events/0004_threads",
                "events/0005_opening",
                "events/0006_first_append",
                "events/0007_waits",
            ]
            assert await migrations.apply(owner, "events", _MIGRATIONS) == newer
            rows = await admin.fetch("SELECT tableoid::regclass::text AS part, cursor FROM events.events ORDER BY cursor")
            marks = await admin.fetch("SELECT day::text, retention, first_cursor FROM events.days ORDER BY first_cursor")
            last_at = await admin.value("SELECT last_at FROM events.cursors")
        await _read(stores, name, user)
    finally:
        async with postgres.connection(stores.postgres_admin_url) as admin:
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    assert [row["part"].removeprefix("events.") for row in rows] == [
        "events_free_rest", "events_free_rest", "events_internal_rest", "events_other_always", "events_internal_rest", "events_free_rest",
    ]  # fmt: skip
    assert [tuple(row.values()) for row in marks] == [
        ("2026-11-10", "free", 1), ("2026-11-11", "free", 2), ("2026-11-11", "internal", 3), ("2026-11-12", "unheard-of", 4),
        ("2026-11-12", "internal", 5), ("2026-11-13", "free", 6),
    ]  # fmt: skip
    assert frames.timestamp(last_at) == b"2026-11-13T12:00:00.000000Z"


async def _read(stores: Standalone, name: str, user: str) -> None:
    password = (stores.secrets / "events" / "postgres").read_text().strip()
    pool = await postgres.open_pool(prepare.dsn(stores.postgres_admin_url, "netra_events", password, name), "test", options=store.OPTIONS)
    try:
        page = await store.Record(pool).page(user, 0, limit=100, max_bytes=1024)
        assert [event.cursor for event in page.events] == [1, 2, 3, 4, 5, 6]
        assert await store.Record(pool).tenant_of(user) == ""
    finally:
        await pool.close()
