"""The signing key of contexts: wrapped, bound to its name, one for all replicas."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis.wrapping import Wrap
from services.context import keys
from services.context.keys import WrappedKey

WRAP = Wrap("0123456789abcdef0123456789abcdef", "context.signing_keys")


class OneRow:
    """What the table does with its unique index: the first offer stays."""

    def __init__(self) -> None:
        self.row: WrappedKey | None = None

    async def current_key(self) -> WrappedKey | None:
        return self.row

    async def offer_key(self, key: WrappedKey) -> None:
        self.row = self.row or key


async def test_replicas_share_the_first_key() -> None:
    table = OneRow()
    first, second = await keys.current(table, WRAP), await keys.current(table, WRAP)
    assert (first.kid, first.public) == (second.kid, second.public)


async def test_the_loser_of_a_race_takes_the_winners_key() -> None:
    class Late(OneRow):
        async def offer_key(self, key: WrappedKey) -> None:
            self.row = winner

    winner = WrappedKey("winner", WRAP.seal("winner", Ed25519PrivateKey.generate()))
    assert (await keys.current(Late(), WRAP)).kid == "winner"


def test_keys_are_not_printed() -> None:
    key = keys.SigningKey("k1", Ed25519PrivateKey.generate())
    assert "Ed25519" not in repr(key)
    assert "sealed" not in repr(WrappedKey("k1", b"sealed"))
