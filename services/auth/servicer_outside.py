"""The RPCs of API keys and outside sign-in."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from chassis import identity
from netra import errors
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from services.auth import api_keys, callers, outside, tokens


class OutsideServicer(auth_pb2_grpc.AuthServiceServicer):
    """Keys for programs, and people whom others vouch for."""

    _api_keys: api_keys.ApiKeys
    _outside: outside.Outside

    async def CreateApiKey(self, request: auth_pb2.CreateApiKeyRequest, context: Any) -> auth_pb2.CreateApiKeyResponse:
        owner = callers.present()
        life = _life(request.lifetime) if request.HasField("lifetime") else None
        key, secret = await self._api_keys.create(owner, request.name, request.scopes, life)
        return auth_pb2.CreateApiKeyResponse(key=_key(key), api_key=secret)

    async def ListApiKeys(self, request: auth_pb2.ListApiKeysRequest, context: Any) -> auth_pb2.ListApiKeysResponse:
        return auth_pb2.ListApiKeysResponse(keys=[_key(key) for key in await self._api_keys.all(identity.current().user)])

    async def RevokeApiKey(self, request: auth_pb2.RevokeApiKeyRequest, context: Any) -> auth_pb2.RevokeApiKeyResponse:
        await self._api_keys.revoke(callers.present(), request.key_id)
        return auth_pb2.RevokeApiKeyResponse()

    async def StartOidc(self, request: auth_pb2.StartOidcRequest, context: Any) -> auth_pb2.StartOidcResponse:
        url, binding = await self._outside.start(
            request.provider, request.redirect_uri, request.callback_uri, request.code_challenge
        )  # fmt: skip
        return auth_pb2.StartOidcResponse(authorization_url=url, binding=binding)

    async def FinishOidc(self, request: auth_pb2.FinishOidcRequest, context: Any) -> auth_pb2.FinishOidcResponse:
        origin = callers.origin(request.client_address, context, request.device)
        answer = outside.Answer(request.state, request.code, request.issuer, request.error, request.binding, origin)
        finished = await self._outside.finish(answer)
        return auth_pb2.FinishOidcResponse(redirect_to=finished.redirect_to, tokens=as_tokens(finished.issued))


def _life(duration: Duration) -> timedelta:
    try:
        return duration.ToTimedelta()
    except (OverflowError, ValueError):
        raise errors.InvalidPayload("lifetime is out of range", field="lifetime") from None


def as_tokens(issued: tokens.Issued | None) -> auth_pb2.Tokens | None:
    """What was issued, as the protocol carries it."""
    if issued is None:
        return None
    return auth_pb2.Tokens(
        access_token=issued.access_token, refresh_token=issued.refresh_token, expires_in=Duration(seconds=issued.expires_in_s),
        user_id=issued.user_id, scope=issued.scope,
    )  # fmt: skip


def _key(key: api_keys.Key) -> auth_pb2.ApiKey:
    return auth_pb2.ApiKey(
        key_id=key.key_id, name=key.name, prefix=key.prefix, scopes=key.scopes, created_at=_stamp(key.created_at),
        expires_at=_stamp(key.expires_at), last_used_at=_stamp(key.last_used_at),
    )  # fmt: skip


def _stamp(moment: datetime | None) -> Timestamp | None:
    if moment is None:
        return None
    stamp = Timestamp()
    stamp.FromDatetime(moment)
    return stamp
