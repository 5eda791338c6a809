"""Examples of what administrators ask auth: about users of their tenant, the policy, the record of access."""

from __future__ import annotations

import secrets
from typing import Any

from netra.auth.v1 import auth_pb2
from tests.prove.isolation.example import ADMIN, OPERATOR, rpcs
from tests.prove.isolation.people import Party
from tests.prove.isolation.world import World


# the contract: an address is one user's, in whichever tenant
@rpcs("auth.CreateUser", ADMIN, told="email")
async def _(world: World, who: Party) -> Any:
    return auth_pb2.CreateUserRequest(email=f"{secrets.token_hex(8)}@netra.example", roles=["user"], tier="free")


@rpcs("auth.GetUser", ADMIN, shows="user_id email", reads="user_id")
async def _(world: World, who: Party) -> Any:
    return auth_pb2.GetUserRequest(user_id=who.things["user_id"])


@rpcs("auth.ListUsers", ADMIN, shows="user_id email")
async def _(world: World, who: Party) -> Any:
    return auth_pb2.ListUsersRequest(page_size=200, email_contains=who.things["email"])


@rpcs("auth.UpdateUser", ADMIN)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.UpdateUserRequest(user_id=await world.recruit(who), tier="early")


@rpcs("auth.DisableUser", ADMIN)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.DisableUserRequest(user_id=await world.recruit(who), reason="over")


@rpcs("auth.EnableUser", ADMIN)
async def _(world: World, who: Party) -> Any:
    user_id = await world.recruit(who)
    if who.boss is None:
        await world.auth.DisableUser(auth_pb2.DisableUserRequest(user_id=user_id, reason="for a while"), metadata=who.bearer)
    return auth_pb2.EnableUserRequest(user_id=user_id)


@rpcs("auth.CreateResetToken", ADMIN)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.CreateResetTokenRequest(user_id=await world.recruit(who))


@rpcs("auth.GetPolicy", ADMIN)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.GetPolicyRequest()


async def _policy(world: World) -> auth_pb2.Policy:
    return (await world.auth.GetPolicy(auth_pb2.GetPolicyRequest(), metadata=world["operator"].bearer, timeout=20)).policy


@rpcs("auth.UpdatePolicy", OPERATOR)
async def _(world: World, who: Party) -> Any:
    policy = await _policy(world)
    return auth_pb2.UpdatePolicyRequest(policy=policy, expected_version=policy.version, comment=who.canary)


@rpcs("auth.ListPolicyVersions", ADMIN)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.ListPolicyVersionsRequest(page_size=5)


@rpcs("auth.RevertPolicy", OPERATOR)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.RevertPolicyRequest(version=(await _policy(world)).version, comment=who.canary)


# what an administrator has tried is in the record of their own tenant, under the id that they named
@rpcs("auth.QueryAudit", ADMIN, shows="user_id", reads="user_id", echoes=True, told="*")
async def _(world: World, who: Party) -> Any:
    return auth_pb2.QueryAuditRequest(user_id=who.things["user_id"], page_size=200)


@rpcs("auth.ExportAudit", OPERATOR)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.ExportAuditRequest(from_position=1)


@rpcs("auth.VerifyAudit", OPERATOR)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.VerifyAuditRequest()
