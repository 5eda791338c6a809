"""An API key is exchanged once, kept while its token is good, and asked for again when that was withdrawn."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.timestamp_pb2 import Timestamp

from chassis import identity, trust
from gateway import api_keys
from netra import errors, ids
from netra.auth.v1 import auth_pb2

_KEY = Ed25519PrivateKey.generate()
_NAK = "nak_abcdefgh_" + "x" * 43


class _Auth:
    """Issues tokens for one key, as long as it lives."""

    def __init__(self) -> None:
        self.asked: list[auth_pb2.IssueTokenRequest] = []
        self.gone = False
        self.session_id = ids.uuid7()
        self.lifetime_s = 600

    async def IssueToken(self, request: auth_pb2.IssueTokenRequest, metadata: Any) -> auth_pb2.IssueTokenResponse:
        self.asked.append(request)
        await asyncio.sleep(0)
        if self.gone or request.api_key.api_key != _NAK:
            raise errors.Unauthenticated("The key is not known.")
        claims = {
            "sub": ids.uuid7(), "sid": self.session_id, "tid": ids.uuid7(), "roles": ["user"], "tier": "free", "ver": 1,
            "scope": ["runs:read"],
        }  # fmt: skip
        token = identity.sign(_KEY, "k1", identity.ACCESS, claims, self.lifetime_s)
        return auth_pb2.IssueTokenResponse(tokens=auth_pb2.Tokens(access_token=token))


async def _nothing() -> tuple[tuple[str, str], ...]:
    return ()


async def _made(auth: _Auth) -> tuple[api_keys.ApiKeys, trust.Trust]:
    known = trust.Trust()
    published = auth_pb2.Key(kid="k1", public_key=_KEY.public_key().public_bytes_raw(), issuer="auth")
    await known.apply(auth_pb2.WatchTrustResponse(keys=[published]))
    return api_keys.ApiKeys(auth, _nothing, identity.Verifier(known)), known  # type: ignore[arg-type]


async def test_many_requests_at_once_ask_once() -> None:
    auth = _Auth()
    keys, _ = await _made(auth)
    found = await asyncio.gather(*(keys.principal(_NAK, "198.51.100.1") for _ in range(20)))
    assert len(auth.asked) == 1
    assert auth.asked[0].client_address == "198.51.100.1"
    assert {who.session_id for who in found} == {auth.session_id}
    assert found[0].scope == frozenset({"runs:read"})


async def test_a_token_near_its_end_is_not_used_again() -> None:
    auth = _Auth()
    auth.lifetime_s = 59
    keys, _ = await _made(auth)
    for expected in (1, 2):
        await keys.principal(_NAK, "")
        assert len(auth.asked) == expected


async def test_a_key_that_was_revoked_ends_at_once() -> None:
    auth = _Auth()
    keys, known = await _made(auth)
    await keys.principal(_NAK, "")
    auth.gone = True
    await keys.principal(_NAK, "")
    revoked_at = Timestamp(seconds=int(time.time()))
    await known.apply(auth_pb2.WatchTrustResponse(revocations=[auth_pb2.Revocation(session_id=auth.session_id, revoked_at=revoked_at)]))
    with pytest.raises(errors.Unauthenticated):
        await keys.principal(_NAK, "")
    assert len(auth.asked) == 2


@pytest.mark.parametrize("text", ["nak_", _NAK + "x", _NAK[:-1] + "\n", _NAK[:-1] + "é", _NAK.upper(), "nak_abc_" + "x" * 48])
async def test_what_does_not_look_like_a_key_is_not_asked_about(text: str) -> None:
    auth = _Auth()
    keys, _ = await _made(auth)
    with pytest.raises(errors.Unauthenticated):
        await keys.principal(text, "")
    assert auth.asked == []
