"""Only failures cost, and who was here before has a budget that strangers cannot use up."""

from __future__ import annotations

import contextlib
from collections import Counter

import pytest

from netra import errors
from services.auth import callers, throttle

HOME, AWAY = callers.Origin("192.0.2.1", "laptop"), callers.Origin("198.51.100.7", "laptop")


class Counts:
    """Stands for the counts of all replicas: budgets that never fill up again."""

    def __init__(self) -> None:
        self.used: Counter[tuple[str, str]] = Counter()

    async def take(self, kind: str, key: str, per_minute: float, burst: int | None = None, cost: int = 1) -> None:
        assert burst is not None
        if self.used[kind, key] + cost > burst:
            raise errors.RateLimited(retry_after_ms=700, kind=kind)
        self.used[kind, key] += cost

    async def give_back(self, kind: str, key: str, per_minute: float, burst: int | None = None, cost: int = 1) -> None:
        self.used[kind, key] -= cost


@pytest.fixture
def counts() -> Counts:
    return Counts()


async def _fails(slowed: throttle.Throttle, budgets: list[throttle.Budget]) -> bool:
    """Whether the attempt was let in; it fails then."""
    try:
        async with slowed.guess(budgets) as attempt:
            attempt.failed()
            raise errors.Unauthenticated
    except errors.Unauthenticated:
        return True
    except errors.RateLimited:
        return False


async def test_a_thousand_guesses_of_a_stranger_leave_the_owner_where_they_were_before(counts: Counts) -> None:
    slowed = throttle.Throttle(counts)
    let_in = [await _fails(slowed, throttle.sign_in("ann", AWAY, "")) for _ in range(1000)]
    assert sum(let_in) == 10
    for known in ("device", "address"):
        async with slowed.guess(throttle.sign_in("ann", HOME, known)):
            pass


async def test_guesses_from_many_places_share_one_budget_for_the_account(counts: Counts) -> None:
    slowed = throttle.Throttle(counts)
    places = [callers.Origin(f"203.0.113.{number % 250}", "") for number in range(1000)]
    assert sum([await _fails(slowed, throttle.sign_in("ann", place, "")) for place in places]) == 50
    # nobody else pays for that
    assert await _fails(slowed, throttle.sign_in("ben", AWAY, ""))


async def test_one_place_that_tries_many_accounts_runs_out(counts: Counts) -> None:
    slowed = throttle.Throttle(counts)
    assert sum([await _fails(slowed, throttle.sign_in(f"user{number}", AWAY, "")) for number in range(1000)]) == 100


async def test_where_the_owner_signed_in_guesses_are_limited_as_well(counts: Counts) -> None:
    slowed = throttle.Throttle(counts)
    assert sum([await _fails(slowed, throttle.sign_in("ann", HOME, "device")) for _ in range(100)]) == 20


async def test_success_and_faults_of_the_platform_cost_nothing(counts: Counts) -> None:
    slowed, budgets = throttle.Throttle(counts), throttle.sign_in("ann", AWAY, "")
    for _ in range(100):
        async with slowed.guess(budgets):
            pass
        with pytest.raises(errors.Unavailable):
            async with slowed.guess(budgets):
                raise errors.Unavailable
    assert not +counts.used


async def test_what_one_budget_gave_is_given_back_when_the_next_refuses(counts: Counts) -> None:
    slowed, budgets = throttle.Throttle(counts), throttle.sign_in("ann", AWAY, "")
    counts.used[budgets[1].kind, budgets[1].counted[1]] = budgets[1].burst
    assert not await _fails(slowed, budgets)
    assert counts.used[budgets[0].kind, budgets[0].counted[1]] == 0


async def test_a_refusal_says_when_to_come_back_and_not_what_ran_out(counts: Counts) -> None:
    slowed, budgets = throttle.Throttle(counts), throttle.password_check("ann")
    while await _fails(slowed, budgets):
        pass
    with pytest.raises(errors.RateLimited) as caught:
        async with slowed.guess(budgets):
            pass
    assert (caught.value.retry_after_ms, caught.value.details) == (700, {})


async def test_many_at_a_time_pay_in_advance(counts: Counts) -> None:
    slowed, budgets = throttle.Throttle(counts), throttle.password_check("ann")
    async with slowed.guess(budgets), slowed.guess(budgets), slowed.guess(budgets), slowed.guess(budgets), slowed.guess(budgets):
        with pytest.raises(errors.RateLimited):
            async with slowed.guess(budgets):
                pass


async def test_a_random_secret_costs_when_it_is_wrong(counts: Counts) -> None:
    slowed, budgets = throttle.Throttle(counts), throttle.unguessable("refresh", AWAY)
    for _ in range(60):
        await slowed.wrong(budgets)
    with pytest.raises(errors.RateLimited):
        await slowed.wrong(budgets)
    await slowed.wrong(throttle.unguessable("refresh", HOME))


async def test_every_call_costs_its_place_and_every_success_its_account(counts: Counts) -> None:
    slowed = throttle.Throttle(counts, throttle.Rates(per_address=3, per_account=2))
    for _ in range(3):
        await slowed.called("login", AWAY)
    for _ in range(2):
        await slowed.succeeded("sign_in", "ann")
    with pytest.raises(errors.RateLimited):
        await slowed.called("login", AWAY)
    with pytest.raises(errors.RateLimited):
        await slowed.succeeded("sign_in", "ann")
    await slowed.called("login", HOME)
    await slowed.called("refresh", AWAY)
    await slowed.succeeded("sign_in", "ben")


async def test_what_ran_out_is_told_once(counts: Counts) -> None:
    slowed, told = throttle.Throttle(counts), list[str]()

    async def note(spent: throttle.Budget) -> None:
        told.append(spent.kind)

    for _ in range(12):
        with contextlib.suppress(errors.RateLimited):
            async with slowed.guess(throttle.sign_in("ann", AWAY, ""), note) as attempt:
                attempt.failed()
    assert told == ["login_stranger"] * 2
    # a pool of hashes that is full is another matter
    with pytest.raises(errors.RateLimited):
        async with slowed.guess(throttle.sign_in("ben", AWAY, ""), note):
            raise errors.RateLimited
    assert len(told) == 2


async def test_a_flood_is_noted_once_for_the_place_and_for_what_ran_out(counts: Counts) -> None:
    slowed = throttle.Throttle(counts)
    stranger, account, address = throttle.sign_in("ann", AWAY, "")
    assert [await slowed.worth_noting(AWAY, address) for _ in range(3)] == [True, False, False]
    # from one place, whatever the name; for one name, whatever the place
    assert await slowed.worth_noting(AWAY, stranger)
    assert not await slowed.worth_noting(AWAY, throttle.sign_in("ben", AWAY, "")[0])
    assert await slowed.worth_noting(AWAY, account)
    assert not await slowed.worth_noting(HOME, account)


def test_names_and_addresses_are_not_in_the_keys() -> None:
    budgets = throttle.sign_in("ann@netra.example", HOME, "")
    assert all("ann" not in budget.counted[1] and "192" not in budget.counted[1] for budget in budgets)
