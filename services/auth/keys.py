"""Signing keys: current, next, retired; the published key set."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis import log, wrapping
from netra import errors
from netra.auth.v1 import auth_pb2

_log = log.get(__name__)
ISSUER = "auth"
_KID = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")
_STATE = {"next": auth_pb2.Key.STATE_NEXT, "current": auth_pb2.Key.STATE_CURRENT, "retired": auth_pb2.Key.STATE_RETIRED}


@dataclass(frozen=True, slots=True)
class Signer:
    """The key that signs now."""

    kid: str
    private_key: Ed25519PrivateKey


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A key of auth; the private part is wrapped, and gone once the key is retired."""

    kid: str
    state: str
    public_key: bytes
    wrapped: bytes | None
    age: timedelta


@dataclass(frozen=True, slots=True)
class PublishedKey:
    """A verification key of another service."""

    issuer: str
    kid: str
    public_key: bytes


class Kept(Protocol):
    """Where keys are kept."""

    async def signing_keys(self) -> list[SigningKey]:
        """Own keys: next, current, and those retired so lately that their tokens may still live."""
        ...

    async def add_first_keys(self, current: SigningKey, following: SigningKey) -> None:
        """Add two keys unless there are keys."""
        ...

    async def rotate_keys(self, current_kid: str, following: SigningKey) -> bool:
        """Retire the current key, activate the next, add a new next. False when it is not current."""
        ...

    async def published_keys(self) -> list[PublishedKey]:
        """The keys of other services."""
        ...

    async def publish_key(self, issuer: str, kid: str, public_key: bytes) -> bool:
        """Add a key of another service. False when the id stands for another key."""
        ...


class Keys:
    """The keys of this installation. Every replica of auth reads the same rows; the database decides who rotates."""

    def __init__(self, rows: Kept, wrap: wrapping.Wrap, rotation: timedelta) -> None:
        self._rows, self._wrap, self._rotation = rows, wrap, rotation
        self._opened: dict[str, Ed25519PrivateKey] = {}
        self._current: SigningKey | None = None

    @property
    def signer(self) -> Signer:
        """The key that signs now. Raises `Unavailable` before keys were loaded."""
        if self._current is None:
            raise errors.Unavailable("The signing keys are not loaded yet. Try again.")
        return Signer(self._current.kid, self._opened[self._current.kid])

    async def prepare(self) -> None:
        """Make the first two keys if there are none, and load. Raises `KeysUnreadable`."""
        await self._rows.add_first_keys(self._fresh("current"), self._fresh("next"))
        await self.load()

    async def load(self) -> list[auth_pb2.Key]:
        """Everything published, as it is now in the database. Raises `KeysUnreadable`."""
        signing = await self._rows.signing_keys()
        self._opened = {key.kid: self._private(key) for key in signing if key.wrapped is not None}
        self._current = next(key for key in signing if key.state == "current")
        own = [auth_pb2.Key(kid=key.kid, public_key=key.public_key, state=_STATE[key.state], issuer=ISSUER) for key in signing]
        others = [
            auth_pb2.Key(kid=key.kid, public_key=key.public_key, state=auth_pb2.Key.STATE_CURRENT, issuer=key.issuer)
            for key in await self._rows.published_keys()
        ]
        return own + others

    async def rotate_if_due(self) -> bool:
        """Rotate when the current key has signed for long enough."""
        if self._current is None or self._current.age < self._rotation:
            return False
        return await self.rotate()

    async def rotate(self) -> bool:
        """The next key becomes current, the current one retires, a new next one is made. False when another replica was first."""
        if self._current is None:
            return False
        rotated = await self._rows.rotate_keys(self._current.kid, self._fresh("next"))
        if rotated:
            _log.info("signing keys rotated", retired=self._current.kid)
        return rotated

    async def publish(self, issuer: str, kid: str, public_key: bytes) -> None:
        """Publish the key of another service. Raises `AlreadyExists` when the id stands for another key."""
        if not 1 <= len(kid) <= 64 or not _KID.issuperset(kid):
            raise errors.InvalidPayload("kid must be 1 to 64 characters out of A-Z a-z 0-9 . _ -", field="kid")
        if len(public_key) != 32:
            raise errors.InvalidPayload("public_key must be the 32 bytes of an Ed25519 key", field="public_key")
        if not await self._rows.publish_key(issuer, kid, public_key):
            raise errors.AlreadyExists("Another key was published under this kid.", field="kid")

    def _fresh(self, state: str) -> SigningKey:
        private_key = Ed25519PrivateKey.generate()
        public_key = private_key.public_key().public_bytes_raw()
        kid = hashlib.sha256(public_key).hexdigest()[:32]
        return SigningKey(kid, state, public_key, self._wrap.seal(kid, private_key), timedelta())

    def _private(self, key: SigningKey) -> Ed25519PrivateKey:
        opened = self._opened.get(key.kid)
        return opened if opened is not None else self._wrap.open(key.kid, key.wrapped or b"")
