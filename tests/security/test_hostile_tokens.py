"""A hostile token of each kind of attack, over every way into the running system; `make prove-tokens` sends the whole table."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest

from tests.fixtures.forge import Forge, Key, claims_of
from tests.fixtures.stack import System
from tests.fixtures.users import NewUser
from tests.prove import hostile, ways


@pytest.fixture(scope="module")
def keys(system: System) -> tuple[Key, Key]:
    """Those of auth and context; a process of their own reads each."""
    return Key.of(system, "auth"), Key.of(system, "context")


@pytest.fixture
async def forge(keys: tuple[Key, Key], new_user: NewUser) -> Forge:
    return Forge(*keys, claims_of(new_user(tier="internal").token))


@pytest.fixture
async def into(system: System, forge: Forge) -> AsyncIterator[ways.Ways]:
    async with contextlib.AsyncExitStack() as stack:
        yield ways.Ways(system, forge, stack)


def _sample(forge: Forge, typ: str) -> list[hostile.Case]:
    """One of each kind: enough to see that every way leads through the one verification."""
    found: dict[str, hostile.Case] = {}
    for case in hostile.table(forge):
        if case.typ == typ and not case.name.startswith(("a good", "on behalf")):
            found.setdefault(case.attack, case)
    return list(found.values())


@pytest.mark.parametrize("typ", hostile.TYPES)
async def test_no_way_leads_around_the_verification(forge: Forge, into: ways.Ways, typ: str) -> None:
    cases = _sample(forge, typ)
    assert len(cases) >= 10
    wrong = []
    for case in cases:
        for name, way in into.of(typ).items():
            outcome = await way(case.token)
            if outcome not in ways.REFUSED and outcome != ways.UNSENDABLE:
                wrong.append(f"{name}, {case.attack}, {case.name}: {outcome}")
    assert wrong == []


async def test_a_good_token_is_accepted_on_the_same_ways(forge: Forge, into: ways.Ways) -> None:
    for name, way in into.of(hostile.ACCESS).items():
        if name.endswith("logout"):
            continue  # it would end the session, and be the last
        assert await way(forge.token(hostile.ACCESS)) in ("OK", "200"), name


async def test_a_good_grant_is_accepted_where_grants_are(forge: Forge, into: ways.Ways) -> None:
    found = {name: await way(forge.token(hostile.GRANT, acc="own")) for name, way in into.of(hostile.GRANT).items()}
    assert {name: outcome for name, outcome in found.items() if name.startswith("in ")} == {
        "in dispatcher.ListRuns": "OK",
        "in dispatcher.GetRun": "NOT_FOUND",
        "in dispatcher.CancelRun": "NOT_FOUND",
        "in events.ListThreadEvents": "NOT_FOUND",
        "in events.FollowThread": "OK",
    }
    # it is no way to sign in
    assert {outcome for name, outcome in found.items() if not name.startswith("in ")} <= ways.REFUSED
