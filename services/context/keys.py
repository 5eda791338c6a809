"""The Ed25519 key that contexts are signed with: made once for all replicas, stored wrapped, published to auth."""

from __future__ import annotations

from dataclasses import dataclass, field

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis.wrapping import KeysUnreadable, Wrap
from netra import ids
from services.context.store_system import SystemStore, WrappedKey


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key and its name."""

    kid: str
    private: Ed25519PrivateKey = field(repr=False)

    @property
    def public(self) -> bytes:
        """The verification key, 32 bytes."""
        return self.private.public_key().public_bytes_raw()


async def current(store: SystemStore, wrap: Wrap) -> SigningKey:
    """The key all replicas sign with, made by whichever of them comes first. Raises `KeysUnreadable`."""
    stored = await store.current_key()
    if stored is None:
        kid = ids.uuid7()
        await store.offer_key(WrappedKey(kid, wrap.seal(kid, Ed25519PrivateKey.generate())))
        stored = await store.current_key()
    if stored is None:
        raise KeysUnreadable("context.signing_keys has no current key, and none could be stored")
    return SigningKey(stored.kid, wrap.open(stored.kid, stored.sealed))
