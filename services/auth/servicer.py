"""AuthService: proto in, domain call, proto out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from chassis import identity
from netra import errors
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from services.auth import clients, feed, keys, permissions, sessions, tokens, users


class AuthServicer(auth_pb2_grpc.AuthServiceServicer):
    """Users, tokens, keys, policy."""

    def __init__(
        self,
        signed_in: sessions.Sessions,
        people: users.Users,
        services: clients.Clients,
        issue: tokens.Tokens,
        published: keys.Keys,
        told: feed.Feed,
    ) -> None:
        self._sessions, self._users, self._clients = signed_in, people, services
        self._tokens, self._keys, self._feed = issue, published, told

    async def IssueToken(self, request: auth_pb2.IssueTokenRequest, context: Any) -> auth_pb2.IssueTokenResponse:
        match request.WhichOneof("grant"):
            case "password":
                grant = request.password
                issued = await self._sessions.login(grant.email, grant.password, request.device)
            case "client_credentials":
                issued = self._for_service(request.client_credentials)
            case _:
                raise errors.InvalidPayload("grant must be set", field="grant")
        return auth_pb2.IssueTokenResponse(tokens=_tokens(issued))

    def _for_service(self, grant: auth_pb2.ClientCredentialsGrant) -> tokens.Issued:
        if not self._clients.known(grant.client_id, grant.client_secret):
            raise errors.Unauthenticated("The client id or its secret is wrong.")
        return self._tokens.for_service(grant.client_id)

    async def RefreshToken(self, request: auth_pb2.RefreshTokenRequest, context: Any) -> auth_pb2.RefreshTokenResponse:
        return auth_pb2.RefreshTokenResponse(tokens=_tokens(await self._sessions.refresh(request.refresh_token)))

    async def RevokeToken(self, request: auth_pb2.RevokeTokenRequest, context: Any) -> auth_pb2.RevokeTokenResponse:
        caller = identity.current().user
        await self._sessions.end(caller)
        return auth_pb2.RevokeTokenResponse(session_id=caller.session_id)

    async def VerifyToken(self, request: auth_pb2.VerifyTokenRequest, context: Any) -> auth_pb2.VerifyTokenResponse:
        principal = await self._tokens.inspect(request.access_token)
        if principal is None:
            return auth_pb2.VerifyTokenResponse(valid=False)
        expires_at = Timestamp(seconds=int(principal.expires_at))
        return auth_pb2.VerifyTokenResponse(valid=True, principal=_principal(principal), expires_at=expires_at)

    async def GetPermissions(self, request: auth_pb2.GetPermissionsRequest, context: Any) -> auth_pb2.GetPermissionsResponse:
        caller = identity.current().user
        allowed = permissions.of(caller.roles, caller.tier)
        email = await self._users.email_of(caller.user_id)
        return auth_pb2.GetPermissionsResponse(principal=_principal(caller), email=email, permissions=sorted(allowed))

    async def GetKeys(self, request: auth_pb2.GetKeysRequest, context: Any) -> auth_pb2.GetKeysResponse:
        return auth_pb2.GetKeysResponse(keys=self._feed.keys())

    async def PublishKey(self, request: auth_pb2.PublishKeyRequest, context: Any) -> auth_pb2.PublishKeyResponse:
        await self._keys.publish(identity.current().service, request.kid, request.public_key)
        await self._feed.refresh()
        return auth_pb2.PublishKeyResponse()

    async def WatchTrust(self, request: auth_pb2.WatchTrustRequest, context: Any) -> AsyncIterator[auth_pb2.WatchTrustResponse]:
        with self._feed.watch() as watcher:
            async for update in watcher.updates():
                yield update

    async def CreateUser(self, request: auth_pb2.CreateUserRequest, context: Any) -> auth_pb2.CreateUserResponse:
        caller = identity.current().user
        user = users.wanted(request.email, request.password, request.roles, request.tier)
        user_id = await self._users.create(user, caller.tenant_id, f"user:{caller.user_id}")
        return auth_pb2.CreateUserResponse(user_id=user_id)


def _tokens(issued: tokens.Issued) -> auth_pb2.Tokens:
    return auth_pb2.Tokens(
        access_token=issued.access_token, refresh_token=issued.refresh_token,
        expires_in=Duration(seconds=issued.expires_in_s), user_id=issued.user_id,
    )  # fmt: skip


def _principal(principal: identity.Principal) -> auth_pb2.Principal:
    return auth_pb2.Principal(
        user_id=principal.user_id, tenant_id=principal.tenant_id, session_id=principal.session_id,
        roles=principal.roles, tier=principal.tier,
    )  # fmt: skip
