"""The Ed25519 key that contexts are signed with: made once for all replicas, stored wrapped, published to auth."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from netra import ids
from services.context.store_system import SystemStore, WrappedKey

_PURPOSE = b"netra context signing keys v1"
_NONCE_BYTES = 12


class WrongSecret(ValueError):
    """The stored signing key cannot be unwrapped."""


@dataclass(frozen=True, slots=True)
class SigningKey:
    """A private key and its name."""

    kid: str
    private: Ed25519PrivateKey = field(repr=False)

    @property
    def public(self) -> bytes:
        """The verification key, 32 bytes."""
        return self.private.public_key().public_bytes_raw()


def wrap(key: SigningKey, secret: bytes) -> WrappedKey:
    """The key in the form in which it may be stored."""
    nonce = os.urandom(_NONCE_BYTES)
    sealed = _cipher(secret).encrypt(nonce, key.private.private_bytes_raw(), key.kid.encode())
    return WrappedKey(key.kid, nonce + sealed)


def unwrap(stored: WrappedKey, secret: bytes) -> SigningKey:
    """The key again. Raises `WrongSecret`."""
    nonce, sealed = stored.sealed[:_NONCE_BYTES], stored.sealed[_NONCE_BYTES:]
    try:
        raw = _cipher(secret).decrypt(nonce, sealed, stored.kid.encode())
    except InvalidTag:
        raise WrongSecret(
            "the signing key in context.signing_keys was wrapped with another secret: give the context service the JWT_SECRET_KEY,"
            " or the secret file `signing`, that it was first started with"
        ) from None
    return SigningKey(stored.kid, Ed25519PrivateKey.from_private_bytes(raw))


async def current(store: SystemStore, secret: bytes) -> SigningKey:
    """The key all replicas sign with, made by whichever of them comes first. Raises `WrongSecret`."""
    stored = await store.current_key()
    if stored is None:
        fresh = SigningKey(ids.uuid7(), Ed25519PrivateKey.generate())
        await store.offer_key(wrap(fresh, secret))
        stored = await store.current_key()
    if stored is None:
        raise WrongSecret("context.signing_keys has no current key, and none could be stored")
    return unwrap(stored, secret)


def _cipher(secret: bytes) -> AESGCM:
    return AESGCM(HKDF(hashes.SHA256(), 32, salt=None, info=_PURPOSE).derive(secret))
