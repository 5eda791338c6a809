"""A key is made while its user or session ends: whichever came first, no key outlives that."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import pytest

from chassis import channel, status
from netra.auth.v1 import auth_pb2
from tests.fixtures.accounts import Accounts
from tests.fixtures.users import User

_LIVE_KEYS = "SELECT count(*) FROM auth.api_keys JOIN auth.sessions AS s USING (session_id) WHERE s.user_id = $1 AND s.ended_at IS NULL"
End = Callable[[Accounts, User, channel.Metadata], Awaitable[Any]]


async def _disable(accounts: Accounts, user: User, admin: channel.Metadata) -> None:
    await accounts.stub.DisableUser(auth_pb2.DisableUserRequest(user_id=user.user_id), metadata=admin)


async def _end_all(accounts: Accounts, user: User, _: channel.Metadata) -> None:
    await accounts.stub.EndSessions(auth_pb2.EndSessionsRequest(all=True), metadata=user.bearer)


async def _log_out(accounts: Accounts, user: User, _: channel.Metadata) -> None:
    await accounts.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)


async def _change_password(accounts: Accounts, user: User, _: channel.Metadata) -> None:
    request = auth_pb2.ChangePasswordRequest(current_password=user.password, new_password="another good password")
    await accounts.stub.ChangePassword(request, metadata=user.bearer)


async def _outcome(call: Awaitable[Any]) -> Any:
    try:
        return await call or "OK"
    except grpc.aio.AioRpcError as error:
        return status.from_rpc(error).code


async def _both(accounts: Accounts, first: Awaitable[Any], second: Awaitable[Any]) -> tuple[Any, Any]:
    """How both end, of which the first has done all but commit when the second begins."""
    async with asyncio.TaskGroup() as group:
        async with accounts.locked():
            one = group.create_task(_outcome(first))
            await accounts.until_waiting(1)
            other = group.create_task(_outcome(second))
            await accounts.until_waiting(2)
    return one.result(), other.result()


@pytest.mark.parametrize("end", [_disable, _end_all, _change_password])
async def test_a_key_that_is_being_made_ends_with_all_others(accounts: Accounts, end: End) -> None:
    user, admin = await accounts.services.user(), await accounts.admin()
    made, ended = await _both(accounts, accounts.api_key(user, "runs:read"), end(accounts, user, admin))
    assert made.startswith("nak_")
    assert ended == "OK"
    assert await accounts.value(_LIVE_KEYS, user.user_id) == 0


@pytest.mark.parametrize("end", [_disable, _end_all, _log_out])
async def test_whoever_is_being_ended_makes_no_key_any_more(accounts: Accounts, end: End) -> None:
    user, admin = await accounts.services.user(), await accounts.admin()
    ended, made = await _both(accounts, end(accounts, user, admin), accounts.api_key(user, "runs:read"))
    assert (ended, made) == ("OK", "UNAUTHENTICATED")
    assert await accounts.value(_LIVE_KEYS, user.user_id) == 0
