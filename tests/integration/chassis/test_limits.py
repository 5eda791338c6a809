"""Rate limits over a Valkey of our own, which is killed, stopped and brought back."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis

from chassis import limits, settings, valkey
from netra import errors, ids
from standalone import processes
from tests.fixtures.own_valkey import Server
from tests.fixtures.stack import Standalone


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A Valkey for this test."""
    one = Server(tmp_path)
    await one.start()
    yield one
    one.kill()


@pytest.fixture
async def both(server: Server) -> AsyncIterator[list[limits.Limits]]:
    """Two processes' worth of limits over the same Valkey; patient, because the machine of the tests may be busy."""
    made = [limits.Limits(server.url, "gateway", "ns", patience_s=5.0) for _ in range(2)]
    yield made
    await asyncio.gather(*(one.close() for one in made))


async def _given(one: limits.Limits, times: int, per_minute: float = 1, burst: int | None = 10, key: str = "k") -> int:
    """How many of so many calls at the same time are let through."""
    answers = await asyncio.gather(*(one.take("calls", key, per_minute, burst) for _ in range(times)), return_exceptions=True)
    refused = [answer for answer in answers if answer is not None]
    assert all(isinstance(answer, errors.RateLimited) for answer in refused), refused
    return times - len(refused)


async def _shared_again(one: limits.Limits) -> None:
    async with asyncio.timeout(20):
        while one.local:
            await asyncio.sleep(0.05)
            with contextlib.suppress(errors.RateLimited):
                await one.check("calls", "another", 1)


async def test_processes_that_ask_at_once_are_given_exactly_the_burst_between_them(both: list[limits.Limits]) -> None:
    first, second = both
    given = await asyncio.gather(_given(first, 60), _given(second, 60))
    assert sum(given) == 10
    assert not first.local
    assert not second.local


async def test_a_refusal_says_when_to_come_back_and_then_it_is_true(both: list[limits.Limits]) -> None:
    first, second = both
    assert await _given(first, 5, per_minute=240, burst=5) == 5
    with pytest.raises(errors.RateLimited) as refused:
        await second.take("calls", "k", 240, 5)
    wait_ms = refused.value.retry_after_ms
    assert wait_ms is not None
    assert 0 < wait_ms <= 250
    assert refused.value.details == {"limit": "240", "kind": "calls"}
    # the time itself is what is tested here
    await asyncio.sleep(wait_ms / 1000)
    await second.take("calls", "k", 240, 5)


async def test_keys_and_kinds_are_counted_apart(both: list[limits.Limits]) -> None:
    first, _ = both
    assert [await _given(first, 20, key=key) for key in ("a", "b", "long" * 100)] == [10, 10, 10]
    await first.take("others", "a", 1, 10, cost=10)


async def test_a_check_counts_nothing_and_what_is_given_back_is_there_again(both: list[limits.Limits]) -> None:
    first, second = both
    for _ in range(20):
        await first.check("calls", "k", 1, 1)
    await first.take("calls", "k", 1, 1)
    with pytest.raises(errors.RateLimited):
        await second.check("calls", "k", 1, 1)
    await first.give_back("calls", "k", 1, 1)
    await second.take("calls", "k", 1, 1)
    # nobody gets more than the burst by giving back what they never took
    await first.give_back("calls", "other", 1, 1)
    assert await _given(first, 5, 1, 1, key="other") == 1


@pytest.mark.parametrize(("per_minute", "burst", "cost"), [(0, None, 1), (-1, None, 1), (10, None, 11), (10, 2, 3)])
async def test_what_can_never_be_given_is_no_matter_of_time(
    both: list[limits.Limits], per_minute: float, burst: int | None, cost: int
) -> None:
    with pytest.raises(errors.QuotaExceeded) as refused:
        await both[0].take("calls", "k", per_minute, burst, cost)
    assert refused.value.retry_after_ms is None
    # the positive control
    await both[0].take("calls", "k", 10, burst, 1)


async def test_a_fast_rate_costs_few_round_trips_and_is_kept_all_the_same(both: list[limits.Limits], server: Server) -> None:
    first, second = both
    for _ in range(1000):
        await first.take("calls", "fast", 60_000, burst=2_000)
    async with redis.Redis.from_url(server.url) as admin:
        assert (await admin.info("commandstats"))["cmdstat_evalsha"]["calls"] < 50
    # a thousand a second come back, so twice what is left cannot be given
    assert await _given(second, 5_000, 60_000, 2_000, key="fast") < 5_000


async def test_a_killed_valkey_leaves_the_limits_in_force_at_once_and_comes_back(both: list[limits.Limits], server: Server) -> None:
    first, second = both
    assert await _given(first, 6) == 6
    assert await _given(second, 1) == 1
    server.kill()
    began = time.monotonic()
    # what this process knew counts on: 7 of 10 were given when it asked last, or 6
    assert await _given(first, 60) == 4
    assert await _given(second, 60) == 3
    assert time.monotonic() - began < 1.0
    assert first.local
    assert second.local
    await server.start()
    await asyncio.gather(_shared_again(first), _shared_again(second))
    # the new server knows nothing; the processes do
    assert await _given(first, 60) == 0
    assert await _given(second, 60) == 0
    assert await _given(first, 60, key="fresh") + await _given(second, 60, key="fresh") == 10


async def test_a_valkey_that_hangs_delays_a_call_by_no_more_than_its_patience(server: Server) -> None:
    one = limits.Limits(server.url, "gateway", patience_s=0.25)
    await _given(one, 4)
    server.tell(signal.SIGSTOP)
    began = time.monotonic()
    assert await _given(one, 60) <= 10
    assert one.local
    waited = time.monotonic() - began
    began = time.monotonic()
    assert await _given(one, 60, key="second") == 10
    server.tell(signal.SIGCONT)
    assert waited < 1.5
    assert time.monotonic() - began < 1.0
    await _shared_again(one)
    await one.close()


@pytest.mark.parametrize("breaks", [redis.ConnectionError, TimeoutError, None])
async def test_who_is_told_to_stop_while_it_counts_stops(
    both: list[limits.Limits], monkeypatch: pytest.MonkeyPatch, breaks: type[Exception] | None
) -> None:
    one, counts = both[0], asyncio.Event()

    async def broken(*_: object) -> tuple[int, int, int]:
        # as its client may: an error of the connection that it gives up for that, or nothing at all where its write had just ended
        counts.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if breaks is not None:
                raise breaks from None
        return 0, 0, 0

    monkeypatch.setattr(one, "_run", broken)
    async with asyncio.TaskGroup() as group:
        asked = group.create_task(one.take("calls", "k", 1))
        await counts.wait()
        asked.cancel()
    assert asked.cancelled()
    assert not one.local


async def test_who_waits_for_a_connection_that_another_gives_up_is_not_told_to_stop(server: Server) -> None:
    client = valkey.connect(server.url, 60.0)
    pool = client.connection_pool
    connection = await pool.get_connection()  # type: ignore[no-untyped-call]
    server.tell(signal.SIGSTOP)
    # more than the system takes for a server that does not read: it does not close now
    connection._writer.write(bytes(64 << 20))
    await pool.release(connection)

    async def give_up() -> None:
        with valkey.heeded():
            await pool.disconnect(inuse_connections=False)

    async with asyncio.TaskGroup() as group:
        one, other = group.create_task(_failing(give_up())), group.create_task(give_up())
        for _ in range(5):
            await asyncio.sleep(0)
        other.cancel()
    assert isinstance(one.result(), redis.ConnectionError)
    assert other.cancelled()
    await valkey.close(client)


async def _failing(work: Coroutine[Any, Any, None]) -> Exception | None:
    """What it fails with."""
    try:
        await work
    except Exception as error:
        return error
    return None


async def test_a_connection_that_takes_its_leave_too_slowly_is_no_error(server: Server) -> None:
    client = valkey.connect(server.url, 0.05)
    connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
    server.tell(signal.SIGSTOP)
    # more than the system takes for a server that does not read
    connection._writer.write(bytes(64 << 20))
    await valkey.close(client)
    assert not connection.is_connected


async def test_a_connection_that_is_given_back_late_is_closed(server: Server) -> None:
    client = valkey.connect(server.url, 5.0)
    connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
    await valkey.close(client)
    # whoever had it was in the middle of something, and connects again
    await connection.connect()
    await client.connection_pool.release(connection)
    assert not connection.is_connected


async def test_a_valkey_that_was_never_there_is_no_reason_to_refuse_or_to_let_all_through(tmp_path: Path) -> None:
    one = limits.Limits(Server(tmp_path).url, "gateway")
    assert await _given(one, 60) == 10
    await one.close()


@pytest.mark.parametrize("service", ["auth", "dispatcher", "gateway"])
async def test_the_users_of_our_services_may_run_the_script(stores: Standalone, service: str) -> None:
    common = settings.ProcessSettings(valkey_url=processes.without_user(stores.valkey_admin_url), secrets_dir=stores.secrets / service)
    one = limits.Limits(common.valkey_dsn(service), service, ids.uuid7(), patience_s=5.0)
    assert await _given(one, 20) == 10
    assert not one.local
    await one.close()


@pytest.fixture
async def leases(server: Server) -> AsyncIterator[list[limits.Leases]]:
    """Two processes' worth of leases over the same Valkey."""
    made = [limits.Leases(server.url, "gateway", "ns", patience_s=5.0) for _ in range(2)]
    yield made
    await asyncio.gather(*(one.close() for one in made))


async def test_processes_share_a_few_places(leases: list[limits.Leases]) -> None:
    first, second = leases
    asked = [(leases[number % 2], f"h{number}") for number in range(20)]
    given = await asyncio.gather(*(one.take("k", holder, 3) for one, holder in asked))
    assert sum(answer is not None for answer in given) == 3
    held = [("k", holder) for (_, holder), answer in zip(asked, given, strict=True) if answer is not None]
    assert await second.take("k", held[0][1], 3) == []  # one that has a place has it
    assert await second.take("another", "h0", 3) == []
    await first.release(held[:1])
    assert await second.take("k", "new", 3) == []
    assert await second.take("k", "newer", 3) is None


async def test_a_group_has_one_place(leases: list[limits.Leases]) -> None:
    first, second = leases
    assert await first.take("k", "tab 1", 1, "tab ") == []
    assert await second.take("k", "tab 2", 1, "tab ") == ["tab 1"]
    assert await second.take("k", "other 3", 1, "other ") is None
    await first.release([("k", "tab 1")])
    assert await second.take("k", "other 3", 1, "other ") is None


async def test_a_later_one_of_a_group_keeps_its_place(leases: list[limits.Leases]) -> None:
    first, second = leases
    assert await first.take("k", "tab 2", 3, "tab ") == []
    with pytest.raises(limits.Superseded):
        await second.take("k", "tab 1", 3, "tab ")
    assert await second.take("k", "tab 3", 3, "tab ") == ["tab 2"]


async def test_thousands_are_renewed_in_no_time(leases: list[limits.Leases]) -> None:
    first, second = leases
    held = [(f"k{number}", f"tab {ids.uuid7()}") for number in range(5000)]
    began = time.process_time()
    await first.renew(held)
    # it shares its event loop with the sockets themselves
    assert time.process_time() - began < 0.5
    assert await second.take("k4999", "another", 1) is None


async def test_a_place_that_is_not_renewed_is_free_again(server: Server) -> None:
    brief = limits.Leases(server.url, "gateway", lasts_s=0.2, patience_s=5.0)
    assert await brief.take("k", "h1", 1) == []
    async with asyncio.timeout(10):
        # the time itself is what is tested here
        while True:
            if await brief.take("k", "h2", 1) is not None:
                break
            await asyncio.sleep(0.05)
    await brief.close()


async def test_what_valkey_forgot_is_known_again_after_a_renewal(server: Server, leases: list[limits.Leases]) -> None:
    first, second = leases
    held = [(f"k{number}", "h") for number in range(1200)]
    await first.renew(held)
    assert await second.take("k1199", "another", 1) is None
    raw = redis.Redis.from_url(server.url)
    await raw.flushall()
    await raw.aclose()
    await first.renew(held)
    assert await second.take("k0", "another", 1) is None


async def test_leases_of_a_valkey_that_is_away_are_unavailable_at_once(server: Server) -> None:
    one = limits.Leases(server.url, "gateway", patience_s=0.25)
    assert await one.take("k", "h", 1) == []
    server.kill()
    for _ in range(50):
        with pytest.raises(errors.Unavailable):
            await one.take("k", "h", 1)
    await server.start()
    async with asyncio.timeout(20):
        while True:
            with contextlib.suppress(errors.Unavailable):
                assert await one.take("k", "h", 1) == []
                break
            await asyncio.sleep(0.05)
    await one.close()
