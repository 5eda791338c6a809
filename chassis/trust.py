"""Whom a process trusts: published keys, the permissions of roles and tiers, what was revoked."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import grpc
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from google.protobuf.message import DecodeError

from chassis import log, rules
from netra import errors
from netra.auth.v1 import auth_pb2

if TYPE_CHECKING:
    from netra.auth.v1 import auth_pb2_grpc

_log = log.get(__name__)
# revoked sessions are forgotten after the longest lifetime of a token, one hour, and a margin
_REVOCATION_KEPT_S = 2 * 3600.0
# Clocks differ. A token that is a little older than the revocation of its user is refused for its session, which ended as well.
_SKEW_S = 5.0
_SAVED_EVERY_S = 1.0
# so many at a time are written for a restart: nothing else runs meanwhile
_PER_WRITE = 1_000


class Subject(Protocol):
    """Of whom it may be asked whether they are still believed."""

    @property
    def user_id(self) -> str:
        """The user."""
        ...

    @property
    def session_id(self) -> str:
        """The session."""
        ...

    @property
    def issued_at(self) -> float:
        """When the token that names them was made."""
        ...


class Trust:
    """What is known about keys, policy and revocations. Everything in it was published by auth."""

    def __init__(self, state_dir: Path | None = None, stale_s: float = 60.0) -> None:
        self._state = state_dir / "trust.bin" if state_dir is not None else None
        self._keys: dict[tuple[str, str], Ed25519PublicKey] = {}
        self._published: list[auth_pb2.Key] = []
        self._rules = rules.Rules(auth_pb2.Policy())
        self._revoked: dict[str, auth_pb2.Revocation] = {}
        # in the order in which they came, which is about that of their times
        self._forgotten_next: deque[auth_pb2.Revocation] = deque()
        self._listeners: list[Callable[[auth_pb2.Revocation], None]] = []
        self._rights_listeners: list[Callable[[auth_pb2.Revocation], None]] = []
        self._stale_s = stale_s
        self._heard_at = -math.inf
        self._changed = asyncio.Condition()
        self._unsaved = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether keys and policy are known."""
        return bool(self._keys) and bool(self._rules)

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

    @property
    def rules(self) -> rules.Rules:
        """The policy in force: another object after each change of it."""
        return self._rules

    def permissions(self, roles: Iterable[str], tier: str) -> frozenset[str]:
        """What the roles allow in the tier; nothing for unknown ones."""
        return self._rules.permissions(roles, tier)

    def limits(self, tier: str) -> auth_pb2.TierLimits:
        """What users of the tier are entitled to; nothing at all in an unknown one."""
        return self._rules.limits(tier)

    def tool_rule(self, name: str) -> auth_pb2.ToolRule | None:
        """What the policy says about who may call this, beside its own permission."""
        return self._rules.tool(name)

    def has_feature(self, tier: str, feature: str) -> bool:
        """Whether users of the tier have a feature."""
        return tier in self._rules.tiers_with(feature)

    def require_feature(self, tier: str, feature: str) -> None:
        """Raises `PermissionDenied` naming the tiers that have the feature."""
        having = self._rules.tiers_with(feature)
        if tier not in having:
            who = f"it comes with {', '.join(sorted(having))}" if having else "no tier has it"
            message = f"The feature {feature} is not part of the tier {tier}: {who}."
            raise errors.PermissionDenied(message, feature=feature, tiers=",".join(sorted(having)))

    @property
    def policy_version(self) -> int:
        """The version of the policy in force here; 0 before one is known."""
        return int(self._rules.policy.version)

    def revoked(self, subject: Subject) -> bool:
        """Whether the session has been ended, or all tokens of the user that were made before some time."""
        return self.revocation(subject) is not None

    def revocation(self, subject: Subject) -> auth_pb2.Revocation | None:
        """Why the subject is not believed any more; one for reasons of security before another."""
        session, user = self._revoked.get(_session(subject.session_id)), self._revoked.get(_user(subject.user_id))
        if user is not None and subject.issued_at >= _time(user) - _SKEW_S:
            user = None
        return user if session is None or (user is not None and user.security) else session

    def on_revocation(self, listener: Callable[[auth_pb2.Revocation], None]) -> None:
        """Call `listener` for each revocation from now on."""
        self._listeners.append(listener)

    def on_rights(self, listener: Callable[[auth_pb2.Revocation], None]) -> None:
        """Call `listener` for each user whose roles or tier were changed, from now on."""
        self._rights_listeners.append(listener)

    @property
    def fresh(self) -> bool:
        """Whether auth was heard of lately, so that nothing can have been withdrawn long ago and not be known here."""
        return time.monotonic() - self._heard_at < self._stale_s

    async def awaited_fresh(self) -> None:
        """Returns when auth was heard of lately."""
        if not self.fresh:
            async with self._changed:
                await self._changed.wait_for(lambda: self.fresh)

    async def apply(self, update: auth_pb2.WatchTrustResponse) -> None:
        """Take over a snapshot or a change that came from auth just now. An empty one says that nothing changed.

        It is believed before anything is waited for: a caller who is cancelled has not lost it.
        """
        self._heard_at = time.monotonic()
        self._take(update)
        if update.ByteSize():
            self._unsaved.set()
        await self._wake()

    async def _wake(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _take(self, update: auth_pb2.WatchTrustResponse) -> None:
        if update.keys:
            self._take_keys(update.keys)
        if update.HasField("policy"):
            self._rules = rules.Rules(update.policy)
        self._forget()
        for revocation in update.revocations:
            self._take_revocation(revocation)

    def _take_keys(self, keys: Iterable[auth_pb2.Key]) -> None:
        self._published = list(keys)
        self._keys = {(key.issuer, key.kid): Ed25519PublicKey.from_public_bytes(key.public_key) for key in self._published}

    def _take_revocation(self, revocation: auth_pb2.Revocation) -> None:
        known = self._revoked.get(_name(revocation))
        if known is None or _time(known) < _time(revocation):
            self._revoked[_name(revocation)] = revocation
            self._forgotten_next.append(revocation)
            for listener in self._rights_listeners if revocation.HasField("rights") else self._listeners:
                listener(revocation)

    def _forget(self) -> None:
        horizon = time.time() - _REVOCATION_KEPT_S
        while self._forgotten_next and _time(self._forgotten_next[0]) <= horizon:
            old = self._forgotten_next.popleft()
            # a user may have been withdrawn again since
            if self._revoked.get(_name(old)) is old:
                del self._revoked[_name(old)]

    async def keep(self) -> None:
        """Save what is trusted for a restart, for ever: whenever it changed, at most once a second, and once more at the end."""
        try:
            while True:
                await self._unsaved.wait()
                await self._save()
                await asyncio.sleep(_SAVED_EVERY_S)
        finally:
            if self._unsaved.is_set():
                await self._save()

    async def _save(self) -> None:
        self._unsaved.clear()
        if self._state is None:
            return
        head = auth_pb2.WatchTrustResponse(keys=self._published, policy=self._rules.policy)
        # a thread of its own has it, however many there are: calls go on meanwhile
        writing = asyncio.get_running_loop().run_in_executor(None, _write, self._state, head, list(self._revoked.values()))
        try:
            await asyncio.shield(writing)
        except asyncio.CancelledError:
            # two must not write at a time
            await writing
            raise

    async def restore(self) -> None:
        """Take over the snapshot of an earlier process, so that an outage of auth does not stop a restart."""
        if self._state is None or not self._state.exists():
            return
        try:
            self._take(auth_pb2.WatchTrustResponse.FromString(self._state.read_bytes()))
        except (OSError, DecodeError):
            _log.warning("what an earlier process trusted cannot be read; waiting for auth", file=str(self._state))
        await self._wake()


def _write(state: Path, head: auth_pb2.WatchTrustResponse, revocations: Sequence[auth_pb2.Revocation]) -> None:
    """Replace the file as a whole. Messages one after another are one message with the entries of all."""
    draft = state.with_suffix(".new")
    try:
        state.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file:
            file.write(head.SerializeToString())
            for start in range(0, len(revocations), _PER_WRITE):
                part = auth_pb2.WatchTrustResponse(revocations=revocations[start : start + _PER_WRITE])
                file.write(part.SerializeToString())
        draft.replace(state)
    except OSError as error:
        _log.warning("what is trusted could not be kept for a restart", reason=error.strerror)


def _name(revocation: auth_pb2.Revocation) -> str:
    if revocation.HasField("rights"):
        # withdraws nothing, and must not stand in the place of what does
        return f"rights {revocation.user_id}"
    return _session(revocation.session_id) if revocation.session_id else _user(revocation.user_id)


def _session(session_id: str) -> str:
    return f"session {session_id}"


def _user(user_id: str) -> str:
    return f"user {user_id}"


def _time(revocation: auth_pb2.Revocation) -> float:
    return revocation.revoked_at.ToNanoseconds() / 1e9


async def follow(
    trust: Trust, stub: auth_pb2_grpc.AuthServiceAsyncStub, authorized: Callable[[], Awaitable[tuple[tuple[str, str], ...]]]
) -> None:
    """Keep `trust` equal to what auth says, for ever; through every outage of auth, and through a restart."""
    await trust.restore()
    async with asyncio.TaskGroup() as group:
        group.create_task(trust.keep())
        group.create_task(_follow(trust, stub, authorized))


async def _follow(
    trust: Trust, stub: auth_pb2_grpc.AuthServiceAsyncStub, authorized: Callable[[], Awaitable[tuple[tuple[str, str], ...]]]
) -> None:
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
