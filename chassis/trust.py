"""Whom a process trusts: published keys, the permissions of roles and tiers, what was revoked."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf.message import DecodeError

from chassis import log
from netra import errors
from netra.auth.v1 import auth_pb2

if TYPE_CHECKING:
    from netra.auth.v1 import auth_pb2_grpc

_log = log.get(__name__)
# revoked sessions are forgotten after the longest lifetime of a token, one hour, and a margin
_REVOCATION_KEPT_S = 2 * 3600.0


class Trust:
    """What is known about keys, policy and revocations. Everything in it was published by auth."""

    def __init__(self, state_dir: Path | None = None) -> None:
        self._state = state_dir / "trust.bin" if state_dir is not None else None
        self._keys: dict[tuple[str, str], Ed25519PublicKey] = {}
        self._published: list[auth_pb2.Key] = []
        self._policy = auth_pb2.Policy()
        self._grants: dict[tuple[str, str], frozenset[str]] = {}
        self._revoked: dict[str, float] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._changed = asyncio.Condition()

    @property
    def ready(self) -> bool:
        """Whether keys and policy are known."""
        return bool(self._keys) and bool(self._grants)

    def key(self, issuer: str, kid: str) -> Ed25519PublicKey | None:
        """The verification key of an issuer, if published."""
        return self._keys.get((issuer, kid))

    async def awaited(self) -> None:
        """Returns when keys and policy are known."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.ready)

    async def awaited_key(self, issuer: str, kid: str, patience_s: float = 2.0) -> Ed25519PublicKey | None:
        """The key, waiting a little for one that was published a moment ago."""
        if (found := self.key(issuer, kid)) is not None:
            return found
        try:
            async with asyncio.timeout(patience_s), self._changed:
                await self._changed.wait_for(lambda: (issuer, kid) in self._keys)
        except TimeoutError:
            return None
        return self.key(issuer, kid)

    def permissions(self, roles: Iterable[str], tier: str) -> frozenset[str]:
        """What the roles allow in the tier; nothing for unknown ones."""
        granted = (self._grants.get((role, tier), frozenset()) for role in roles)
        return frozenset().union(*granted)

    def revoked(self, session_id: str) -> bool:
        """Whether the session has been ended."""
        return session_id in self._revoked

    def on_revocation(self, listener: Callable[[str], None]) -> None:
        """Call `listener(session_id)` for each revocation from now on."""
        self._listeners.append(listener)

    async def apply(self, update: auth_pb2.WatchTrustResponse) -> None:
        """Take over a snapshot or a change."""
        if update.keys:
            self._take_keys(update.keys)
        if update.HasField("policy"):
            self._policy = update.policy
            self._grants = {(grant.role, grant.tier): frozenset(grant.permissions) for grant in update.policy.grants}
        self._take_revocations(update.revocations)
        if update.keys or update.HasField("policy") or update.revocations:
            self._save()
        async with self._changed:
            self._changed.notify_all()

    def _take_keys(self, keys: Iterable[auth_pb2.Key]) -> None:
        self._published = list(keys)
        self._keys = {(key.issuer, key.kid): Ed25519PublicKey.from_public_bytes(key.public_key) for key in self._published}

    def _take_revocations(self, revocations: Iterable[auth_pb2.Revocation]) -> None:
        horizon = time.time() - _REVOCATION_KEPT_S
        self._revoked = {session: at for session, at in self._revoked.items() if at > horizon}
        for revocation in revocations:
            if revocation.session_id not in self._revoked:
                self._revoked[revocation.session_id] = revocation.revoked_at.ToNanoseconds() / 1e9
                for listener in self._listeners:
                    listener(revocation.session_id)

    def _save(self) -> None:
        if self._state is None:
            return
        snapshot = auth_pb2.WatchTrustResponse(keys=self._published, policy=self._policy)
        for session_id, revoked_at in self._revoked.items():
            revocation = snapshot.revocations.add(session_id=session_id)
            revocation.revoked_at.FromNanoseconds(int(revoked_at * 1e9))
        draft = self._state.with_suffix(".new")
        try:
            self._state.parent.mkdir(parents=True, exist_ok=True)
            draft.write_bytes(snapshot.SerializeToString())
            draft.replace(self._state)
        except OSError as error:
            _log.warning("what is trusted could not be kept for a restart", reason=error.strerror)

    async def restore(self) -> None:
        """Take over the snapshot of an earlier process, so that an outage of auth does not stop a restart."""
        if self._state is None or not self._state.exists():
            return
        try:
            await self.apply(auth_pb2.WatchTrustResponse.FromString(self._state.read_bytes()))
        except (OSError, DecodeError):
            _log.warning("what an earlier process trusted cannot be read; waiting for auth", file=str(self._state))


async def follow(
    trust: Trust, stub: auth_pb2_grpc.AuthServiceAsyncStub, authorized: Callable[[], Awaitable[tuple[tuple[str, str], ...]]]
) -> None:
    """Keep `trust` equal to what auth says, for ever; through every outage of auth."""
    await trust.restore()
    delay = 0.1
    while True:
        try:
            async for update in stub.WatchTrust(auth_pb2.WatchTrustRequest(), metadata=await authorized()):
                await trust.apply(update)
                delay = 0.1
        except (grpc.aio.AioRpcError, errors.NetraError) as error:
            code = error.code if isinstance(error, errors.NetraError) else error.code().name
            _log.warning("auth is not reachable; going on with what is known", status=code)
        await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        delay = min(delay * 2, 2.0)
