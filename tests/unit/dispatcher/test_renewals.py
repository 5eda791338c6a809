"""Tokens of runs that wait are renewed, whatever stands before them in the queue."""

from __future__ import annotations

from typing import Any

import pytest

from netra import errors, ids
from services.dispatcher import renewals


class Tokens:
    """Rows whose tokens are old, oldest first, and the service that renews those that are alive."""

    def __init__(self, dead: int, alive: int) -> None:
        self.old = [(ids.RunId.new(), 1, f"dead {number}") for number in range(dead)]
        self.old += [(ids.RunId.new(), 1, f"alive {number}") for number in range(alive)]
        self.fresh: list[str] = []
        self.away = False

    async def old_tokens(self, most: int, passed_over: int) -> list[tuple[ids.RunId, int, str]]:
        """Some of them."""
        return self.old[passed_over : passed_over + most]

    async def token_renewed(self, run_id: ids.RunId, _epoch: int, token: str) -> None:
        """That one is fresh again."""
        self.old = [one for one in self.old if one[0] != run_id]
        self.fresh.append(token)

    async def renew(self, token: str) -> str:
        """A fresh one."""
        if self.away:
            raise errors.Unavailable
        if token.startswith("dead"):
            raise errors.FailedPrecondition("It is closed.")
        return f"fresh {token}"


def _renewals(tokens: Tokens) -> renewals.Renewals:
    context: Any = tokens
    return renewals.Renewals(context, tokens, list, 60.0)


async def test_those_that_cannot_be_renewed_hold_up_no_other() -> None:
    tokens = Tokens(dead=250, alive=350)
    await _renewals(tokens).look()
    assert tokens.fresh == [f"fresh alive {number}" for number in range(350)]
    assert len(tokens.old) == 250
    # they are looked at again, and nobody waits for that
    await _renewals(tokens).look()
    assert len(tokens.fresh) == 350


async def test_while_context_is_away_nothing_is_asked_of_it_a_thousand_times() -> None:
    tokens = Tokens(dead=0, alive=3)
    tokens.away = True
    with pytest.raises(errors.Unavailable):
        await _renewals(tokens).look()
    tokens.away = False
    await _renewals(tokens).look()
    assert len(tokens.fresh) == 3
