"""API keys at the edge: each is exchanged for an access token, which is kept while it is good."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
import weakref
from collections import OrderedDict

from chassis import channel, identity, status
from netra import errors
from netra.auth.v1 import auth_pb2, auth_pb2_grpc

PREFIX = "nak_"
_FORM = re.compile(r"nak_[A-Za-z0-9_\-]{8}_[A-Za-z0-9_\-]{43}", re.ASCII)
_RENEW_S = 60.0
_MOST = 10_000


class ApiKeys:
    """The keys that were used here lately, by digest."""

    def __init__(self, auth: auth_pb2_grpc.AuthServiceAsyncStub, credentials: channel.Authorize, verifier: identity.Verifier) -> None:
        self._auth, self._credentials, self._verifier = auth, credentials, verifier
        self._tokens: OrderedDict[bytes, str] = OrderedDict()
        self._asking: weakref.WeakValueDictionary[bytes, asyncio.Lock] = weakref.WeakValueDictionary()

    async def principal(self, key: str, address: str) -> identity.Principal:
        """The user of a key, narrowed to its scope. Raises `Unauthenticated`, `RateLimited`, `Unavailable`."""
        if not _FORM.fullmatch(key):
            raise errors.Unauthenticated("This is not an API key.")
        digest = hashlib.sha256(key.encode()).digest()
        if (known := await self._known(digest)) is not None:
            return known
        # many requests begin with the same key at once: one of them asks
        lock = self._asking.setdefault(digest, asyncio.Lock())
        async with lock:
            return await self._known(digest) or await self._exchanged(key, digest, address)

    async def _known(self, digest: bytes) -> identity.Principal | None:
        token = self._tokens.get(digest)
        if token is None:
            return None
        try:
            found = await self._verifier.principal(token)
        except errors.Unauthenticated:
            # ended or withdrawn: auth says whether the key is too
            found = None
        if found is None or found.expires_at - time.time() < _RENEW_S:
            self._tokens.pop(digest, None)
            return None
        return found

    async def _exchanged(self, key: str, digest: bytes, address: str) -> identity.Principal:
        wanted = auth_pb2.IssueTokenRequest(api_key=auth_pb2.ApiKeyGrant(api_key=key), client_address=address)
        with status.translated():
            answer = await self._auth.IssueToken(wanted, metadata=await self._credentials())
        found = await self._verifier.principal(answer.tokens.access_token)
        self._tokens[digest] = found.token
        while len(self._tokens) > _MOST:
            self._tokens.popitem(last=False)
        return found
