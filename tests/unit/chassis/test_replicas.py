"""Which replica a key belongs to: the same everywhere, and as little moved as can be when one goes."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import pytest

from chassis import replicas
from netra import errors

TARGETS = ("10.0.0.1:7004", "10.0.0.2:7004", "10.0.0.3:7004", "10.0.0.4:7004")
KEYS = [f"user {number}" for number in range(2000)]


class Clock:
    """Stands still."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def of(*targets: str, clock: Clock | None = None) -> replicas.Replicas:
    """Replicas on these targets."""
    return replicas.Replicas(",".join(targets), clock or Clock())


def test_the_order_of_a_key_does_not_depend_on_how_replicas_are_given() -> None:
    one, other = of(*TARGETS), of(*reversed(TARGETS))
    assert all(one.ranked(key) == other.ranked(key) for key in KEYS)
    # the same in every process, of every version: two dispatchers must agree
    assert one.ranked("user 1") == ["10.0.0.1:7004", "10.0.0.2:7004", "10.0.0.4:7004", "10.0.0.3:7004"]


def test_keys_are_spread() -> None:
    here = of(*TARGETS)
    shares = [sum(here.first(key) == target for key in KEYS) for target in TARGETS]
    assert min(shares) > 400


def test_one_that_goes_takes_only_its_own_keys_with_it() -> None:
    before, after = of(*TARGETS), of(*TARGETS[1:])
    moved = [key for key in KEYS if before.first(key) != after.first(key)]
    assert moved == [key for key in KEYS if before.first(key) == TARGETS[0]]
    assert all(after.first(key) == before.ranked(key)[1] for key in moved)


def test_one_that_is_away_comes_last_for_longer_each_time_until_it_is_heard_of() -> None:
    clock = Clock()
    here = of("a:1", "b:1", clock=clock)
    first, other = here.ranked("key")
    for away_s in (1, 2, 4, 8, 8):
        here.away(first)
        assert here.ranked("key") == [other, first]
        clock.now += away_s - 0.01
        assert here.first("key") == other
        clock.now += 0.02
        assert here.first("key") == first
    here.heard(first)
    here.away(first)
    clock.now += 1.01
    assert here.first("key") == first


def test_when_all_are_away_the_order_is_as_before() -> None:
    here = of("a:1", "b:1")
    before = here.ranked("key")
    assert here.reachable
    here.away("a:1")
    assert here.reachable
    here.away("b:1")
    assert (here.reachable, here.ranked("key")) == (False, before)


@pytest.mark.parametrize("wrong", ["", " , ", "host", "host:port", "http://host:1", "a:1 b:2", "dns:host"])
def test_what_is_no_target_is_named(wrong: str) -> None:
    with pytest.raises(ValueError, match="host:port"):
        replicas.Replicas(wrong)


async def test_a_name_stands_for_all_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [["10.0.0.2", "10.0.0.1", "fd00::1"], OSError("no answer"), ["10.0.0.1"]]

    async def lookup(_self: object, host: str, port: int, **_more: object) -> list[Any]:
        assert (host, port) == ("events", 7004)
        found = answers.pop(0)
        if isinstance(found, OSError):
            raise found
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(asyncio.get_running_loop().__class__, "getaddrinfo", lookup)
    here = of("dns:events:7004", "fixed:1")
    assert list(here.targets) == ["fixed:1", "events:7004"]
    await here._resolve()
    assert list(here.targets) == ["fixed:1", "10.0.0.1:7004", "10.0.0.2:7004", "[fd00::1]:7004"]
    here.away("10.0.0.2:7004")
    await here._resolve()
    assert len(here.targets) == 4
    await here._resolve()
    assert list(here.targets) == ["fixed:1", "10.0.0.1:7004"]
    assert here.reachable


async def test_without_names_there_is_nothing_to_follow() -> None:
    await asyncio.wait_for(of("a:1").follow(), 1)


async def test_the_next_one_is_asked_when_the_first_does_not_answer() -> None:
    here = of("a:1", "b:1", "c:1")
    ranked, asked = here.ranked("key"), []

    async def call(stub: str) -> str:
        asked.append(stub)
        if stub != ranked[2]:
            raise errors.Unavailable if stub == ranked[0] else errors.DeadlineExceeded
        return f"from {stub}"

    each = replicas.Each(here, str)
    assert await each.ask("key", call) == f"from {ranked[2]}"
    assert asked == ranked
    assert await each.ask("key", call) == f"from {ranked[2]}"
    assert asked == [*ranked, ranked[2]]


async def test_one_that_was_away_is_asked_by_one_caller_until_it_answers() -> None:
    clock = Clock()
    here = of("a:1", "b:1", clock=clock)
    first, second = here.ranked("key")
    here.away(first)
    clock.now += 1.5
    back, asked = asyncio.Event(), list[str]()

    async def call(stub: str) -> str:
        asked.append(stub)
        if stub == first:
            await back.wait()
        return stub

    each = replicas.Each(here, str)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        probe = group.create_task(each.ask("key", call))
        await asyncio.sleep(0)
        assert [await each.ask("key", call) for _ in range(3)] == [second] * 3
        back.set()
        assert await probe == first
    assert await each.ask("key", call) == first
    assert asked == [first, second, second, second, first]


async def test_an_answer_that_is_no_is_an_answer() -> None:
    here = of("a:1", "b:1")
    asked = []

    async def call(stub: str) -> None:
        asked.append(stub)
        raise errors.Fenced

    with pytest.raises(errors.Fenced):
        await replicas.Each(here, str).ask("key", call)
    assert asked == [here.first("key")]


async def test_when_nobody_answers_that_is_said() -> None:
    here = of("a:1", "b:1")

    async def call(_stub: str) -> None:
        raise errors.Unavailable("gone")

    with pytest.raises(errors.Unavailable, match="gone"):
        await replicas.Each(here, str).ask("key", call)
    assert not here.reachable


def test_a_stub_is_made_once() -> None:
    made = []

    def make(target: str) -> str:
        made.append(target)
        return target

    each = replicas.Each(of("a:1"), make)
    assert (each.of("a:1"), each.of("a:1"), made) == ("a:1", "a:1", ["a:1"])


def test_the_stub_of_a_replica_that_is_gone_is_let_go() -> None:
    here, made = of("a:1", "b:1"), []

    def make(target: str) -> str:
        made.append(target)
        return target

    each = replicas.Each(here, make)
    each.of("a:1")
    each.of("b:1")
    here.targets = ("b:1",)
    each.of("b:1")
    assert list(each._stubs) == ["b:1"]
    here.targets = ("a:1", "b:1")
    each.of("a:1")
    assert made == ["a:1", "b:1", "a:1"]


def test_targets_have_their_turns_and_those_that_are_away_come_last() -> None:
    now = [0.0]
    known = replicas.Replicas("a:1,b:1,c:1", clock=lambda: now[0])
    assert [known.in_turn()[0] for _ in range(4)] == ["a:1", "b:1", "c:1", "a:1"]
    known.away("b:1")
    assert [known.in_turn() for _ in range(3)] == [["c:1", "a:1", "b:1"], ["c:1", "a:1", "b:1"], ["a:1", "c:1", "b:1"]]
    now[0] = 2.0
    assert "b:1" in {known.in_turn()[0] for _ in range(3)}
