"""The signing key of contexts: wrapped, bound to its name, one for all replicas."""

import dataclasses

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.context import keys
from services.context.store_system import SystemStore, WrappedKey

SECRET = b"0123456789abcdef0123456789abcdef"


class OneRow(SystemStore):
    """What the table does with its unique index: the first offer stays."""

    def __init__(self) -> None:
        self.row: WrappedKey | None = None

    async def current_key(self) -> WrappedKey | None:
        return self.row

    async def offer_key(self, key: WrappedKey) -> None:
        self.row = self.row or key


def test_wrap_and_unwrap() -> None:
    key = keys.SigningKey("k1", Ed25519PrivateKey.generate())
    sealed = keys.wrap(key, SECRET)
    assert key.private.private_bytes_raw() not in sealed.sealed
    assert keys.unwrap(sealed, SECRET).public == key.public


def test_another_secret_another_name_or_a_changed_byte_is_refused() -> None:
    sealed = keys.wrap(keys.SigningKey("k1", Ed25519PrivateKey.generate()), SECRET)
    changed = sealed.sealed[:-1] + bytes([sealed.sealed[-1] ^ 1])
    for stored, secret in (
        (sealed, SECRET[::-1]),
        (dataclasses.replace(sealed, kid="k2"), SECRET),
        (dataclasses.replace(sealed, sealed=changed), SECRET),
    ):
        with pytest.raises(keys.WrongSecret, match="JWT_SECRET_KEY"):
            keys.unwrap(stored, secret)


async def test_replicas_share_the_first_key() -> None:
    table = OneRow()
    first, second = await keys.current(table, SECRET), await keys.current(table, SECRET)
    assert (first.kid, first.public) == (second.kid, second.public)


async def test_the_loser_of_a_race_takes_the_winners_key() -> None:
    class Late(OneRow):
        async def offer_key(self, key: WrappedKey) -> None:
            self.row = winner

    winner = keys.wrap(keys.SigningKey("winner", Ed25519PrivateKey.generate()), SECRET)
    assert (await keys.current(Late(), SECRET)).kid == "winner"


def test_keys_are_not_printed() -> None:
    key = keys.SigningKey("k1", Ed25519PrivateKey.generate())
    assert "Ed25519" not in repr(key)
    assert "sealed" not in repr(keys.wrap(key, SECRET))
