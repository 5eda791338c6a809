"""Private keys at rest."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis import wrapping


def test_sealed_keys_open_again() -> None:
    wrap, private_key = wrapping.Wrap("s" * 32, "auth.signing_keys"), Ed25519PrivateKey.generate()
    sealed = wrap.seal("kid", private_key)
    assert private_key.private_bytes_raw() not in sealed
    assert wrap.open("kid", sealed).private_bytes_raw() == private_key.private_bytes_raw()


def test_sealing_twice_differs() -> None:
    wrap, private_key = wrapping.Wrap("s" * 32, "auth.signing_keys"), Ed25519PrivateKey.generate()
    assert wrap.seal("kid", private_key) != wrap.seal("kid", private_key)


@pytest.mark.parametrize(
    ("secret", "kid", "cut"), [("t" * 32, "kid", 0), ("s" * 32, "other", 0), ("s" * 32, "kid", 1), ("s" * 32, "kid", 60)]
)
def test_another_secret_another_kid_or_damage_is_told(secret: str, kid: str, cut: int) -> None:
    sealed = wrapping.Wrap("s" * 32, "auth.signing_keys").seal("kid", Ed25519PrivateKey.generate())
    with pytest.raises(wrapping.KeysUnreadable, match="JWT_SECRET_KEY"):
        wrapping.Wrap(secret, "auth.signing_keys").open(kid, sealed[: len(sealed) - cut])


def test_the_key_of_one_table_is_not_that_of_another() -> None:
    sealed = wrapping.Wrap("s" * 32, "auth.signing_keys").seal("kid", Ed25519PrivateKey.generate())
    with pytest.raises(wrapping.KeysUnreadable, match=r"context\.signing_keys"):
        wrapping.Wrap("s" * 32, "context.signing_keys").open("kid", sealed)
