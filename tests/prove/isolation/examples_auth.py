"""Examples of the auth service for users, for nobody known, and for services."""

from __future__ import annotations

import secrets
from typing import Any

from netra.auth.v1 import auth_pb2
from tests.prove import ways
from tests.prove.isolation.example import NOBODY, USER, rpcs
from tests.prove.isolation.people import Party
from tests.prove.isolation.world import World

PAGE = "https://app.netra.example/signed-in"


def _address() -> str:
    return ways.a_client()["X-Forwarded-For"]


@rpcs("auth.IssueToken", NOBODY)
async def _(world: World, who: Party) -> Any:
    # with the right credential anybody may say anything in the other fields
    grant = auth_pb2.PasswordGrant(email=who.email, password=who.user.password)
    return auth_pb2.IssueTokenRequest(password=grant, device=f"{who.canary}", client_address=_address())


@rpcs("auth.RefreshToken", NOBODY)
async def _(world: World, who: Party) -> Any:
    tokens = await world.signed_in(who.email, who.user.password)
    return auth_pb2.RefreshTokenRequest(refresh_token=tokens.refresh_token, client_address=_address())


@rpcs("auth.RevokeToken", USER, spare=True, signed_in=True)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.RevokeTokenRequest()


@rpcs("auth.VerifyToken", "context", works=lambda answer: answer.messages[0].valid)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.VerifyTokenRequest(access_token=who.token)


@rpcs("auth.GetPermissions", USER, shows="user_id tenant_id email")
async def _(world: World, who: Party) -> Any:
    return auth_pb2.GetPermissionsRequest()


@rpcs("auth.GetKeys", NOBODY)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.GetKeysRequest()


# whoever named a key first has named it, in no user's name
@rpcs("auth.PublishKey", "context", told="*")
async def _(world: World, who: Party) -> Any:
    return auth_pb2.PublishKeyRequest(kid=secrets.token_hex(8), public_key=secrets.token_bytes(32))


# the contract: a service finds out who is who, in the tenant that it names
@rpcs("auth.ResolveUser", "context", shows="user_id", legit=[("user_id", "user_id"), ("email", "email")])
async def _(world: World, who: Party) -> Any:
    return auth_pb2.ResolveUserRequest(tenant_id=who.things["tenant_id"], user_id=who.things["user_id"])


@rpcs("auth.WatchTrust", "context", tells="session_id user_id", until=lambda found: bool(found), live=True)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.WatchTrustRequest()


@rpcs("auth.ResetPassword", NOBODY)
async def _(world: World, who: Party) -> Any:
    admin = who.boss or who
    wanted = auth_pb2.CreateResetTokenRequest(user_id=await world.recruit(admin))
    token = (await world.auth.CreateResetToken(wanted, metadata=admin.bearer)).reset_token
    return auth_pb2.ResetPasswordRequest(reset_token=token, new_password=secrets.token_urlsafe(16), client_address=_address())


@rpcs("auth.ChangePassword", USER, spare=True, signed_in=True)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.ChangePasswordRequest(current_password=who.user.password, new_password=secrets.token_urlsafe(16))


@rpcs("auth.ListSessions", USER, long=True, shows="session_id")
async def _(world: World, who: Party) -> Any:
    return auth_pb2.ListSessionsRequest()


@rpcs("auth.EndSessions", USER, works=lambda answer: answer.messages[0].ended == 1)
async def _(world: World, who: Party) -> Any:
    token = (await world.signed_in(who.email, who.user.password)).access_token
    found = await world.auth.GetPermissions(auth_pb2.GetPermissionsRequest(), metadata=(("authorization", f"Bearer {token}"),))
    return auth_pb2.EndSessionsRequest(session_id=found.principal.session_id)


@rpcs("auth.CreateApiKey", USER, spare=True, signed_in=True)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.CreateApiKeyRequest(name=who.canary, scopes=["runs:read"])


@rpcs("auth.ListApiKeys", USER, shows="key_id prefix canary")
async def _(world: World, who: Party) -> Any:
    return auth_pb2.ListApiKeysRequest()


@rpcs("auth.RevokeApiKey", USER)
async def _(world: World, who: Party) -> Any:
    return auth_pb2.RevokeApiKeyRequest(key_id=(await world.key(who)).key.key_id)


def _callback(world: World) -> str:
    return f"http://127.0.0.1:{world.system.ports['gateway']}/auth/oidc/callback"


@rpcs("auth.StartOidc", "gateway")
async def _(world: World, who: Party) -> Any:
    return auth_pb2.StartOidcRequest(provider="corp", redirect_uri=PAGE, callback_uri=_callback(world))


@rpcs("auth.FinishOidc", "gateway", once=True)
async def _(world: World, who: Party) -> Any:
    started = await world.auth.StartOidc(
        auth_pb2.StartOidcRequest(provider="corp", callback_uri=_callback(world)), metadata=world.service("gateway"), timeout=20
    )
    back = await world.back(started.authorization_url)
    return auth_pb2.FinishOidcRequest(
        state=back["state"], code=back["code"], issuer=back.get("iss", ""), binding=started.binding, device=who.canary,
        client_address=_address(),
    )  # fmt: skip


# the contract: what services tell of users is kept, whoever they are
@rpcs("auth.AppendAudit", "gateway", legit=[("*", "*")])
async def _(world: World, who: Party) -> Any:
    entry = auth_pb2.AuditEntry(
        tenant_id=who.things["tenant_id"], user_id=who.things["user_id"], action="deny", outcome="refused", detail=who.canary,
        correlation_id=secrets.token_hex(16),
    )  # fmt: skip
    return auth_pb2.AppendAuditRequest(entries=[entry])
