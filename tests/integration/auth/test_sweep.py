"""What can matter to nobody any more is deleted, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from chassis import postgres
from netra.auth.v1 import auth_pb2
from services.auth import store_system
from services.auth.settings import AuthSettings
from tests.fixtures.accounts import Accounts

_COUNTS = """
SELECT (SELECT count(*) FROM auth.sessions WHERE user_id = $1) AS sessions,
       (SELECT count(*) FROM auth.refresh_tokens WHERE user_id = $1) AS refresh_tokens,
       (SELECT count(*) FROM auth.known_devices WHERE user_id = $1) AS known_devices,
       (SELECT count(*) FROM auth.reset_tokens WHERE user_id = $1) AS reset_tokens,
       (SELECT count(*) FROM auth.audit WHERE user_id = $1) AS audit
"""


@pytest.fixture
async def system(accounts: Accounts) -> AsyncIterator[store_system.SystemStore]:
    """The statements that cross users."""
    settings = AuthSettings(**accounts.services.settings("auth"))
    crossing = await postgres.open_pool(settings.postgres_dsn("netra_auth_system", "postgres_system"), "sweep", size=1)
    yield store_system.SystemStore(crossing)
    await crossing.close()


async def _until(holds: Callable[[], Any]) -> None:
    async with asyncio.timeout(20):
        while True:
            if await holds():
                return
            await asyncio.sleep(0.02)


async def test_the_sweep_takes_what_is_old_and_leaves_the_rest(accounts: Accounts, system: store_system.SystemStore) -> None:
    admin, old, new = await accounts.admin(), await accounts.services.user(), await accounts.services.user()
    for user in (old, new):
        await accounts.refresh(user.refresh_token)
        await accounts.stub.CreateResetToken(auth_pb2.CreateResetTokenRequest(user_id=user.user_id), metadata=admin)
    await accounts.later(old.user_id, 40 * 86400)
    await system.sweep()
    async with accounts.database() as database:
        found = [dict(await database.row(_COUNTS, user.user_id) or {}) for user in (old, new)]
    entries = [each.pop("audit") for each in found]
    assert found[0] == {"sessions": 0, "refresh_tokens": 0, "known_devices": 0, "reset_tokens": 0}
    assert found[1] == {"sessions": 1, "refresh_tokens": 2, "known_devices": 2, "reset_tokens": 1}
    # the record of access outlives what it tells of
    assert entries[0] == entries[1] > 0
    await accounts.refresh((await accounts.login(new.email, new.password)).refresh_token)


async def _attempts(accounts: Accounts, count: int, ends_in: str) -> None:
    """Sign-ins elsewhere that nobody came back from."""
    async with accounts.database() as database:
        await database.execute(
            "INSERT INTO auth.oidc_attempts (state_digest, binding_digest, provider, nonce, code_verifier, callback_uri, expires_at)"
            " SELECT sha256(random()::text::bytea), sha256('b'), 'p', 'n', 'v', 'c', now() + $2::text::interval"
            " FROM generate_series(1, $1)",
            count, ends_in,
        )  # fmt: skip


_ATTEMPTS = "SELECT count(*) FROM auth.oidc_attempts"


async def test_verifiers_of_sign_ins_elsewhere_go_with_them(accounts: Accounts, system: store_system.SystemStore) -> None:
    await _attempts(accounts, 3, "-1 second")
    await _attempts(accounts, 2, "1 minute")
    await system.sweep()
    assert await accounts.value(_ATTEMPTS) == 2


async def test_much_is_deleted_little_by_little(
    accounts: Accounts, system: store_system.SystemStore, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(store_system, "_SWEPT_AT_ONCE", 10)
    await _attempts(accounts, 35, "-1 second")
    # a transaction that took them all at once would fail here
    async with accounts.database() as database:
        await database.execute(
            "CREATE FUNCTION auth.few() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " IF (SELECT count(*) FROM old_rows) > 10 THEN RAISE 'too many at once'; END IF; RETURN NULL; END $$"
        )
        await database.execute(
            "CREATE TRIGGER few AFTER DELETE ON auth.oidc_attempts REFERENCING OLD TABLE AS old_rows"
            " FOR EACH STATEMENT EXECUTE FUNCTION auth.few()"
        )
    await system.sweep()
    assert await accounts.value(_ATTEMPTS) == 0


async def test_what_was_ended_early_goes_a_month_after_that_and_keys_with_it(
    accounts: Accounts, system: store_system.SystemStore
) -> None:  # fmt: skip
    users = [await accounts.services.user() for _ in range(2)]
    for user in users:
        request = auth_pb2.CreateApiKeyRequest(name="program", scopes=["runs:read"])
        key = (await accounts.stub.CreateApiKey(request, metadata=user.bearer)).key
        await accounts.stub.RevokeApiKey(auth_pb2.RevokeApiKeyRequest(key_id=key.key_id), metadata=user.bearer)
    async with accounts.database() as database:
        for user, days in zip(users, (31, 29), strict=True):
            query = "UPDATE auth.sessions SET ended_at = now() - make_interval(days => $2) WHERE user_id = $1 AND ended_at IS NOT NULL"
            await database.execute(query, user.user_id, days)
    await system.sweep()
    counts = "SELECT count(k.key_id), count(*) FROM auth.sessions AS s LEFT JOIN auth.api_keys AS k USING (session_id) WHERE s.user_id = $1"
    async with accounts.database() as database:
        found = [tuple((await database.row(counts, user.user_id) or {}).values()) for user in users]
    # of the first only the session that lives
    assert found == [(0, 1), (1, 2)]


_STUCK = "SELECT max(query_start) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE 'DELETE FROM auth.oidc_attempts%'"


async def test_it_begins_with_the_process_and_nobody_waits_for_it(accounts: Accounts) -> None:
    user, alone = await accounts.services.user(), f"{accounts.services.common['valkey_namespace']}x"
    await _attempts(accounts, 1, "-1 second")
    async with accounts.database() as holder, accounts.replica(valkey_namespace=alone) as other:
        assert (await other.verified(user.token)).valid
        await _until(lambda: _none_left(accounts))
        await _attempts(accounts, 1, "-1 second")
        await holder.execute("BEGIN")
        # nobody can delete it for as long as somebody else has it
        await holder.execute("SELECT state_digest FROM auth.oidc_attempts FOR UPDATE")
        async with accounts.replica(valkey_namespace=alone) as stuck:
            await _until(lambda: accounts.value(_STUCK))
            since = await accounts.value(_STUCK)
            await accounts.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)
            await _until(lambda: _withdrawn(stuck, user.token))
            assert await accounts.value(_STUCK) == since


async def _none_left(accounts: Accounts) -> bool:
    return not await accounts.value(_ATTEMPTS)


async def _withdrawn(accounts: Accounts, token: str) -> bool:
    return not (await accounts.verified(token)).valid
