"""What can matter to nobody any more is deleted, and nothing else."""

from __future__ import annotations

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


async def test_the_sweep_takes_what_is_old_and_leaves_the_rest(accounts: Accounts) -> None:
    admin, old, new = await accounts.admin(), await accounts.services.user(), await accounts.services.user()
    for user in (old, new):
        await accounts.refresh(user.refresh_token)
        await accounts.stub.CreateResetToken(auth_pb2.CreateResetTokenRequest(user_id=user.user_id), metadata=admin)
    settings = AuthSettings(**accounts.services.settings("auth"))
    dsn = settings.postgres_dsn("netra_auth_system", "postgres_system")
    await accounts.later(old.user_id, 40 * 86400)
    crossing = await postgres.open_pool(dsn, "sweep", size=1)
    try:
        await store_system.SystemStore(crossing).sweep()
    finally:
        await crossing.close()
    async with accounts.database() as database:
        found = [dict(await database.row(_COUNTS, user.user_id) or {}) for user in (old, new)]
    entries = [each.pop("audit") for each in found]
    assert found[0] == {"sessions": 0, "refresh_tokens": 0, "known_devices": 0, "reset_tokens": 0}
    assert found[1] == {"sessions": 1, "refresh_tokens": 2, "known_devices": 2, "reset_tokens": 1}
    # the record of access outlives what it tells of
    assert entries[0] == entries[1] > 0
    await accounts.refresh((await accounts.login(new.email, new.password)).refresh_token)
