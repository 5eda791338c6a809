"""The Ed25519 key that contexts are signed with: made once for all replicas, stored wrapped, published to auth."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis.wrapping import KeysUnreadable, Wrap
from netra import ids


@dataclass(frozen=True, slots=True)
class WrappedKey:
    """A signing key as stored: name, and nonce plus ciphertext."""

    kid: str
    sealed: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key and its name."""

    kid: str
    private: Ed25519PrivateKey = field(repr=False)

    @property
    def public(self) -> bytes:
        """The verification key, 32 bytes."""
        return self.private.public_key().public_bytes_raw()


class Kept(Protocol):
    """Where the signing key is kept."""

    async def current_key(self) -> WrappedKey | None:
        """The key that signs now, if one was made."""
        ...

    async def offer_key(self, key: WrappedKey) -> None:
        """Make this the current key, unless there is one: of replicas that start together one wins."""
        ...


async def current(kept: Kept, wrap: Wrap) -> SigningKey:
    """The key all replicas sign with, made by whichever of them comes first. Raises `KeysUnreadable`."""
    stored = await kept.current_key()
    if stored is None:
        kid = ids.uuid7()
        await kept.offer_key(WrappedKey(kid, wrap.seal(kid, Ed25519PrivateKey.generate())))
        stored = await kept.current_key()
    if stored is None:
        raise KeysUnreadable("context.signing_keys has no current key, and none could be stored")
    return SigningKey(stored.kid, wrap.open(stored.kid, stored.sealed))
