"""Valkey killed under the running system: limits hold at once, and are shared again when it is back."""

from __future__ import annotations

import asyncio

from tests.fixtures import web
from tests.fixtures.stack import System, gateway_url
from tests.fixtures.users import NewUser


async def test_limits_hold_while_valkey_is_away_and_after(system: System, new_user: NewUser) -> None:
    free, fresh = new_user(tier="free"), new_user(tier="free")
    async with web.client(base_url=gateway_url(system), timeout=20) as http:

        async def codes(token: str, times: int) -> list[int]:
            headers = {"Authorization": f"Bearer {token}"}
            return [(await http.get("/v1/threads", headers=headers)).status_code for _ in range(times)]

        # used up before: what this gateway counted still counts
        assert 429 in await codes(free.token, 200)
        await asyncio.to_thread(system.kill, "valkey")
        during = await codes(free.token, 5), await codes(fresh.token, 200)
        await asyncio.to_thread(system.restarted, "valkey")
        after = await codes(fresh.token, 10)
    assert 429 in during[0]
    assert 429 in during[1]
    assert set(during[1]) == {200, 429}
    # the new server has forgotten everything; the gateway has not
    assert 429 in after
