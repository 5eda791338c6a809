"""What the proof of isolation makes of figures: of times, of rows that changed, of what was found in a table."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import pytest

from netra import ids
from tests.fixtures.stack import System
from tests.fixtures.users import User
from tests.prove.isolation import answers, people, proof, settle, shared, sharing, tables, timing, world
from tests.prove.isolation.judge import Findings, Judge
from tests.prove.isolation.timing import KINDS, Times, unlike


def _asked(chance: random.Random, pairs: int, busy_ms: float, oracle_ms: float) -> Times:
    """Answers of a machine that is mostly quick, and often not."""

    def took() -> float:
        return 2.5 + chance.expovariate(1 / 0.3) + (chance.expovariate(1 / busy_ms) if chance.random() < 0.5 else 0.0)

    return Times.of({kind: [took() + (0.0 if kind == "unknown" else oracle_ms) for _ in range(pairs)] for kind in KINDS})


@pytest.mark.parametrize("busy_ms", [0.1, 3.0, 10.0])
def test_chance_is_not_taken_for_a_difference_and_a_difference_not_for_chance(busy_ms: float) -> None:
    chance = random.Random(5)
    assert [one for one in range(50) if _asked(chance, 200, busy_ms, 0.0).tells] == []
    told = [_asked(chance, 800, busy_ms, timing.SEEN_MS).tells for _ in range(10)]
    assert told == [True] * 10
    quicker = [_asked(chance, 800, busy_ms, -timing.SEEN_MS).tells for _ in range(10)]
    assert quicker == [True] * 10


def test_what_nobody_could_see_is_not_told() -> None:
    times = _asked(random.Random(5), 800, 0.1, 0.1)
    assert (times.chance < 1e-4, times.tells) == (True, False)
    assert 0.05 < times.shift_ms < times.floor_ms == 0.15


def test_the_floor_is_what_the_same_differs_from_itself() -> None:
    # the machine treats one question in two ways: a difference of the same size says nothing
    spread = [2 + at / 1000 for at in range(50)]
    times = Times([one + 0.6 for one in spread], spread, [one + 0.1 for one in spread])
    assert (times.chance < 1e-4, times.tells) == (True, False)
    assert times.floor_ms == pytest.approx(1.2)


def test_a_machine_that_is_too_busy_to_see_anything_is_known() -> None:
    chance = random.Random(5)
    assert not _asked(chance, 200, 0.1, 0.0).blind
    assert _asked(chance, 40, 40.0, 0.0).blind
    assert Times([], [], []).tells


def test_the_test_of_ranks_says_what_the_tables_say() -> None:
    # of all orders of ten and ten the most uneven: z is 3.74
    assert unlike(range(10), range(10, 20)) == pytest.approx(1.83e-4, rel=0.01)
    assert unlike([1, 2, 3], [1, 2, 3]) == 1.0
    assert unlike([7] * 10, [7] * 10) == 1.0
    assert unlike([], [1.0]) == 1.0
    # the example of R's wilcox.test, exactly 0.2544
    first, second = [0.8, 0.83, 1.89, 1.04, 1.45, 1.38, 1.91, 1.64, 0.73, 1.46], [1.15, 0.88, 0.9, 0.74, 1.21]
    assert unlike(first, second) == pytest.approx(0.2544, abs=0.02)


def test_rows_that_change_are_told_as_far_as_they_may_not() -> None:
    before = {"auth.sessions": {"a", "b"}, "auth.revocations": {"r"}, "context.messages": {"m"}, "context.threads": {"t"}}
    same = {name: set(rows) for name, rows in before.items()}
    assert tables.changed(before, same, more=False) == []
    # one signs in again, and what was revoked is forgotten
    assert tables.changed(before, same | {"auth.sessions": {"a", "b", "c"}, "auth.revocations": set()}, more=False) == []
    ended = tables.changed(before, same | {"auth.sessions": {"a", "ended"}, "auth.revocations": {"r", "s"}}, more=False)
    assert ended == [
        "auth.sessions: 1 of 2 rows are gone or others, 0 are new",
        "auth.revocations: 0 of 1 rows are gone or others, 1 are new",
    ]
    # whose they are has acted meanwhile
    later = same | {"context.messages": {"m", "n"}, "context.threads": {"u"}}
    assert tables.changed(before, later, more=True) == []
    assert tables.changed(before, later | {"context.messages": {"n"}}, more=True) == [
        "context.messages: 1 of 1 rows are gone or others, 0 are new"
    ]


@pytest.fixture
async def there(system: System) -> AsyncIterator[world.World]:
    """The running system with A, B and C, who have what they have."""
    async with world.around(system) as found:
        await settle.everybody(found, "A", "B", "C")
        yield found


async def test_an_oracle_is_found_and_not_made_up(there: world.World) -> None:
    known, _, _ = await proof.coverage(there)
    way, example = known["dispatcher.GetRun"]
    # an hour is more than any machine is late
    found = await timing.measured(there, way, example, 48, oracle_ms=3_600_000)
    assert list(found) == ["B", "C"]
    assert timing.tells(found)


async def test_everybody_gets_of_a_shared_thread_what_is_theirs(there: world.World) -> None:
    found = Findings()
    judge = Judge(found, [there[name] for name in "ABC"])
    matrix = await sharing.probe(there, judge)
    assert (found.off, found.controls_failed) == ([], [])
    assert matrix.cases > 300


def _member(name: str) -> people.Party:
    user = User(ids.uuid7(), f"{name}@netra.example", "", "", "")
    things = people.Things({"user_id": user.user_id, "tenant_id": ids.uuid7(), "run_id": ids.uuid7()})
    return people.Party(user, "", name, people.canary("s"), things)


def _matrix(found: Findings) -> shared.Shared:
    """The people of a thread, of which nothing is asked."""
    all_ = {role: _member(role) for role in shared.ROLES}
    matrix = shared.Shared(world.World(None, None, {}, None), Judge(found, []), all_)  # type: ignore[arg-type]
    shared.put_up(matrix)
    return matrix


def _told(matrix: shared.Shared, whose: str, kind: str = "") -> answers.Answer:
    who = matrix.people[whose]
    return answers.Answer("OK", "", who.canary.encode() if not kind else b"", [], [{kind: who.things[kind]}] if kind else [])


def test_what_somebody_gets_of_a_thread_is_judged_by_who_they_are_to_it() -> None:
    found = Findings()
    matrix = _matrix(found)
    matrix.judged("x", shared.READER, "OK", _told(matrix, shared.OWNER), (shared.OWNER,))
    matrix.judged("x", shared.READER, "OK", _told(matrix, shared.WRITER, "run_id"))
    matrix.judged("x", shared.STRANGER, "NOT_FOUND", answers.Answer("NOT_FOUND", "There is no such thread."))
    assert (found.ok, found.controls) == (True, 3)


@pytest.mark.parametrize(
    ("role", "expected", "whose", "kind"),
    [
        # let in who is not
        (shared.STRANGER, "NOT_FOUND", shared.STRANGER, ""),
        (shared.READER, "PERMISSION_DENIED", shared.READER, ""),
        # let in, and shown what is not in the thread
        (shared.OWNER, "OK", shared.READER, ""),
        (shared.WRITER, "OK", shared.STRANGER, "run_id"),
        (shared.WITHDRAWN, "OK", shared.ELSEWHERE, ""),
    ],
)
def test_what_is_not_for_somebody_is_found(role: str, expected: str, whose: str, kind: str) -> None:
    found = Findings()
    matrix = _matrix(found)
    matrix.judged("x", role, expected, _told(matrix, whose, kind))
    assert len(found.leaks) == 1, found.leaks


def test_a_refusal_that_shows_something_is_found_and_an_answer_that_shows_nothing() -> None:
    found = Findings()
    matrix = _matrix(found)
    for whose in (shared.OWNER, shared.WRITER, shared.WITHDRAWN):
        refused = answers.Answer("NOT_FOUND", "", matrix.people[whose].canary.encode())
        matrix.judged("x", shared.STRANGER, "NOT_FOUND", refused)
    assert (len(found.leaks), found.controls_failed) == (3, [])
    matrix.judged("x", shared.READER, "OK", _told(matrix, shared.OWNER), (shared.OWNER, shared.WRITER))
    assert found.controls_failed == ["sharing: x as reader: OK , not OK without what writer wrote"]


def test_a_token_is_good_until_it_ends() -> None:
    matrix, now = _matrix(Findings()), datetime.now(UTC).timestamp()
    part = {at: base64.urlsafe_b64encode(json.dumps({"exp": now + at}).encode()).decode() for at in (60, -5, -60)}
    matrix.tokens = {shared.OWNER: f"a.{part[60]}.b", shared.WRITER: f"a.{part[-5]}.b", shared.READER: f"a.{part[-60]}.b"}
    accepted = [matrix.accepted(role) for role in (shared.OWNER, shared.WRITER, shared.READER, shared.STRANGER)]
    assert accepted == ["OK", "OK UNAUTHENTICATED", "UNAUTHENTICATED", "UNAUTHENTICATED"]
