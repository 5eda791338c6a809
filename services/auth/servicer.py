"""The part of AuthService about sign-in, tokens and sessions: proto in, domain call, proto out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from chassis import audit, identity, trust
from netra import errors
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from services.auth import (
    api_keys,
    callers,
    clients,
    exchange,
    feed,
    keys,
    messages,
    outside,
    resets,
    sessions,
    throttle,
    tokens,
    users,
)  # fmt: skip


class SignInServicer(auth_pb2_grpc.AuthServiceServicer):
    """Sign-in, tokens, sessions, keys."""

    _sessions: sessions.Sessions
    _resets: resets.Resets
    _users: users.Users
    _clients: clients.Clients
    _throttle: throttle.Throttle
    _api_keys: api_keys.ApiKeys
    _exchange: exchange.Exchange
    _outside: outside.Outside
    _tokens: tokens.Tokens
    _trust: trust.Trust
    _refusals: audit.Refusals
    _keys: keys.Keys
    _feed: feed.Feed

    async def IssueToken(self, request: auth_pb2.IssueTokenRequest, context: Any) -> auth_pb2.IssueTokenResponse:
        issued = await self._issued(request, callers.origin(request.client_address, context, request.device))
        return auth_pb2.IssueTokenResponse(tokens=messages.tokens(issued))

    async def _issued(self, request: auth_pb2.IssueTokenRequest, origin: callers.Origin) -> tokens.Issued:
        match request.WhichOneof("grant"):
            case "password":
                return await self._sessions.login(request.password.email, request.password.password, origin)
            case "client_credentials":
                return await self._for_service(request.client_credentials, origin)
            case "api_key":
                issued = await self._api_keys.sign_in(request.api_key.api_key, origin)
                self._note(issued, "api key", origin)
                return issued
            case "login_code":
                code = request.login_code
                return await self._outside.redeem(code.code, code.code_verifier or code.binding, origin)
            case "exchange":
                asked = request.exchange
                return await self._exchange.on_behalf(
                    asked.subject_token, asked.actor.client_id, asked.actor.client_secret, asked.scope, origin
                )  # fmt: skip
            case _:
                raise errors.InvalidPayload("grant must be set", field="grant")

    async def _for_service(self, grant: auth_pb2.ClientCredentialsGrant, origin: callers.Origin) -> tokens.Issued:
        await self._throttle.called("client", origin)
        if not self._clients.known(grant.client_id, grant.client_secret):
            await self._throttle.wrong(throttle.unguessable("client", origin, grant.client_id[:64]))
            raise errors.Unauthenticated("The client id or its secret is wrong.")
        await self._throttle.succeeded("client", grant.client_id)
        issued = self._tokens.for_service(grant.client_id)
        self._refusals.issued(f"service:{grant.client_id}", f"client credentials; {_from(origin)}")
        return issued

    def _note(self, issued: tokens.Issued, how: str, origin: callers.Origin) -> None:
        actor = f"user:{issued.user_id}"
        self._refusals.issued(actor, f"session {issued.session_id}; {how}; {_from(origin)}", user_id=issued.user_id)

    async def RefreshToken(self, request: auth_pb2.RefreshTokenRequest, context: Any) -> auth_pb2.RefreshTokenResponse:
        origin = callers.origin(request.client_address, context)
        issued = await self._sessions.refresh(request.refresh_token, origin)
        self._note(issued, "refresh", origin)
        return auth_pb2.RefreshTokenResponse(tokens=messages.tokens(issued))

    async def RevokeToken(self, request: auth_pb2.RevokeTokenRequest, context: Any) -> auth_pb2.RevokeTokenResponse:
        caller = identity.current().user
        await self._sessions.end(caller, caller.session_id)
        return auth_pb2.RevokeTokenResponse(session_id=caller.session_id)

    async def VerifyToken(self, request: auth_pb2.VerifyTokenRequest, context: Any) -> auth_pb2.VerifyTokenResponse:
        principal = await self._tokens.inspect(request.access_token)
        if principal is None:
            return auth_pb2.VerifyTokenResponse(valid=False)
        expires_at = Timestamp(seconds=int(principal.expires_at))
        return auth_pb2.VerifyTokenResponse(valid=True, principal=messages.principal(principal), expires_at=expires_at)

    async def GetPermissions(self, request: auth_pb2.GetPermissionsRequest, context: Any) -> auth_pb2.GetPermissionsResponse:
        caller = identity.current().user
        allowed = caller.narrowed(self._trust.permissions(caller.roles, caller.tier))
        email = await self._users.email_of(caller.user_id)
        return auth_pb2.GetPermissionsResponse(principal=messages.principal(caller), email=email, permissions=sorted(allowed))

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

    async def ListSessions(self, request: auth_pb2.ListSessionsRequest, context: Any) -> auth_pb2.ListSessionsResponse:
        caller = identity.current().user
        found = await self._sessions.listed(caller)
        return auth_pb2.ListSessionsResponse(sessions=[messages.session(each, caller.session_id) for each in found])

    async def EndSessions(self, request: auth_pb2.EndSessionsRequest, context: Any) -> auth_pb2.EndSessionsResponse:
        caller = identity.current().user
        match request.WhichOneof("which"):
            case "session_id":
                ended = await self._sessions.end(caller, request.session_id)
            case "all" if request.all:
                ended = await self._sessions.end_all(caller, but_this=False)
            case "others" if request.others:
                ended = await self._sessions.end_all(caller, but_this=True)
            case _:
                raise errors.InvalidPayload("which must say the sessions: session_id, all = true or others = true", field="which")
        return auth_pb2.EndSessionsResponse(ended=ended)

    async def ChangePassword(self, request: auth_pb2.ChangePasswordRequest, context: Any) -> auth_pb2.ChangePasswordResponse:
        ended = await self._resets.change(
            identity.current().user, request.current_password, request.new_password, cancel_runs=request.cancel_runs
        )  # fmt: skip
        return auth_pb2.ChangePasswordResponse(sessions_ended=ended)

    async def ResetPassword(self, request: auth_pb2.ResetPasswordRequest, context: Any) -> auth_pb2.ResetPasswordResponse:
        origin = callers.origin(request.client_address, context)
        await self._resets.reset(request.reset_token, request.new_password, origin, self._users)
        return auth_pb2.ResetPasswordResponse()


def _from(origin: callers.Origin) -> str:
    return f"from {origin.address or 'an unknown address'}"
