"""Private keys at rest."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from services.auth import keys


def test_sealed_keys_open_again() -> None:
    wrap, private_key = keys.Wrap("s" * 32), Ed25519PrivateKey.generate()
    sealed = wrap.seal("kid", private_key)
    assert private_key.private_bytes_raw() not in sealed
    assert wrap.open("kid", sealed).private_bytes_raw() == private_key.private_bytes_raw()


def test_sealing_twice_differs() -> None:
    wrap, private_key = keys.Wrap("s" * 32), Ed25519PrivateKey.generate()
    assert wrap.seal("kid", private_key) != wrap.seal("kid", private_key)


@pytest.mark.parametrize(
    ("secret", "kid", "cut"), [("t" * 32, "kid", 0), ("s" * 32, "other", 0), ("s" * 32, "kid", 1), ("s" * 32, "kid", 60)]
)
def test_another_secret_another_kid_or_damage_is_told(secret: str, kid: str, cut: int) -> None:
    sealed = keys.Wrap("s" * 32).seal("kid", Ed25519PrivateKey.generate())
    with pytest.raises(keys.KeysUnreadable, match="JWT_SECRET_KEY"):
        keys.Wrap(secret).open(kid, sealed[: len(sealed) - cut])
