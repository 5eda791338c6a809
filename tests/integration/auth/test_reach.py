"""Administrators make, change and stop users who may no more than they do themselves; the rest is out of their reach."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable
from typing import Any

import grpc
import pytest

from chassis import status
from netra.auth.v1 import auth_pb2
from services.auth import permissions
from tests.fixtures.accounts import Accounts
from tests.fixtures.policies import Administrator, without
from tests.fixtures.storage import Services
from tests.fixtures.users import User


@pytest.fixture
async def admin(services: Services) -> Administrator:
    """Auth alone, and its administrator."""
    await services.auth()
    return await Administrator(services).signed_in()


async def code(call: Awaitable[Any]) -> str:
    """How a call ends."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return status.from_rpc(error).code
    return "OK"


def wanted(role: str, tier: str) -> auth_pb2.CreateUserRequest:
    """A user to be made."""
    email = f"{secrets.token_hex(6)}@netra.example"
    return auth_pb2.CreateUserRequest(email=email, password="a good password", roles=[role], tier=tier)


@pytest.mark.parametrize(
    ("role", "tier", "made"),
    [
        ("user", "free", "OK"), ("user", "business", "OK"), ("readonly", "mid", "OK"), ("admin", "business", "OK"),
        ("user", "enterprise", "PERMISSION_DENIED"), ("user", "internal", "PERMISSION_DENIED"), ("admin", "internal", "PERMISSION_DENIED"),
    ],
)  # fmt: skip
async def test_nobody_makes_whoever_may_more(admin: Administrator, services: Services, role: str, tier: str, made: str) -> None:
    business = await services.user("admin", "business")
    assert await code(admin.stub.CreateUser(wanted(role, tier), metadata=business.bearer)) == made
    # the positive control
    assert await code(admin.stub.CreateUser(wanted(role, tier), metadata=admin.bearer)) == "OK"


async def everything(admin: Administrator, whose: User, caller: User) -> set[str]:
    """How what administrators do to users ends, one after the other."""
    stub, bearer, user_id = admin.stub, caller.bearer, whose.user_id
    return {
        await code(stub.CreateResetToken(auth_pb2.CreateResetTokenRequest(user_id=user_id), metadata=bearer)),
        await code(stub.UpdateUser(auth_pb2.UpdateUserRequest(user_id=user_id, tier="free"), metadata=bearer)),
        await code(stub.EnableUser(auth_pb2.EnableUserRequest(user_id=user_id), metadata=bearer)),
        await code(stub.DisableUser(auth_pb2.DisableUserRequest(user_id=user_id), metadata=bearer)),
    }


@pytest.mark.parametrize(("role", "tier"), [("admin", "internal"), ("user", "enterprise")])
async def test_whoever_may_more_is_out_of_reach(admin: Administrator, services: Services, role: str, tier: str) -> None:
    business, above, below = await services.user("admin", "business"), await services.user(role, tier), await services.user("user", "early")
    assert await everything(admin, above, business) == {"PERMISSION_DENIED"}
    assert await everything(admin, below, business) == {"OK"}


async def test_nobody_lifts_themselves_or_others_above_themselves(admin: Administrator, services: Services) -> None:
    business, other = await services.user("admin", "business"), await services.user("user", "business")
    for whose in (business, other):
        for more in ({"tier": "internal"}, {"tier": "enterprise"}, {"tier": "internal", "roles": ["admin"]}):
            request = auth_pb2.UpdateUserRequest(user_id=whose.user_id, **more)
            assert await code(admin.stub.UpdateUser(request, metadata=business.bearer)) == "PERMISSION_DENIED"
    request = auth_pb2.UpdateUserRequest(user_id=other.user_id, roles=["admin"])
    assert await code(admin.stub.UpdateUser(request, metadata=business.bearer)) == "OK"


async def test_the_policy_in_force_says_who_may_more(admin: Administrator, services: Services) -> None:
    business = await services.user("admin", "business")
    await admin.change_everywhere(without("admin", "business", "runs:write"))
    assert await code(admin.stub.CreateUser(wanted("user", "business"), metadata=business.bearer)) == "PERMISSION_DENIED"
    assert await code(admin.stub.CreateUser(wanted("readonly", "business"), metadata=business.bearer)) == "OK"


async def test_a_program_reaches_no_further_than_its_key(accounts: Accounts) -> None:
    admin = await Administrator(accounts.services).signed_in()
    boss, other = await accounts.services.user("admin", "internal"), await accounts.services.user("user", "free")
    narrow = _with(boss, await accounts.program(boss, "users:write"))
    for role, tier in (("admin", "internal"), ("user", "free"), ("readonly", "free")):
        assert await code(admin.stub.CreateUser(wanted(role, tier), metadata=narrow.bearer)) == "PERMISSION_DENIED"
    assert await everything(admin, other, narrow) == {"PERMISSION_DENIED"}
    wide = _with(boss, await accounts.program(boss, "users:write", *permissions.OF_ROLE["readonly"]))
    assert await code(admin.stub.CreateUser(wanted("readonly", "internal"), metadata=wide.bearer)) == "OK"
    assert await code(admin.stub.CreateUser(wanted("user", "free"), metadata=wide.bearer)) == "PERMISSION_DENIED"


async def test_what_acts_for_an_administrator_makes_and_changes_nobody(accounts: Accounts) -> None:
    admin = await Administrator(accounts.services).signed_in()
    boss, other = await accounts.services.user("admin", "internal"), await accounts.services.user("user", "free")
    acting = _with(boss, await accounts.on_behalf(boss, *permissions.ALL))
    assert await code(admin.stub.CreateUser(wanted("readonly", "free"), metadata=acting.bearer)) == "PERMISSION_DENIED"
    assert await everything(admin, other, acting) == {"PERMISSION_DENIED"}
    # looking is no change
    assert await code(admin.stub.GetUser(auth_pb2.GetUserRequest(user_id=other.user_id), metadata=acting.bearer)) == "OK"


@pytest.mark.parametrize("less", [{"tier": "business"}, {"roles": ["user"]}, {"roles": ["admin"], "tier": "enterprise"}])
async def test_nobody_takes_from_themselves_what_they_could_not_give_back(
    admin: Administrator, services: Services, less: dict[str, Any]
) -> None:
    boss = await services.user("admin", "internal")
    request = auth_pb2.UpdateUserRequest(user_id=boss.user_id, **less)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await admin.stub.UpdateUser(request, metadata=boss.bearer)
    found = status.from_rpc(caught.value)
    assert (found.code, found.details["field"]) == ("FAILED_PRECONDITION", next(reversed(less)))
    assert "another administrator" in found.message
    assert await code(admin.stub.UpdateUser(request, metadata=admin.bearer)) == "OK"


def _with(user: User, tokens: auth_pb2.Tokens) -> User:
    return User(user.user_id, user.email, user.password, tokens.access_token, "")
