"""A thread is followed by the client: every event once, through every end of a stream, with bounded positions."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import AsyncGenerator, Mapping
from typing import Any

import pytest

from netra import errors, ids, threads


class _Gateway:
    """Runs of a thread; each stream breaks after a while."""

    def __init__(self, runs: dict[str, int]) -> None:
        self.runs = runs
        self.patience_s = 5.0
        self.asked: list[dict[str, Any]] = []
        self.breaks: list[errors.NetraError | None] = []
        self.shared = True

    @property
    def api(self) -> _Gateway:
        return self

    async def grant_token(self, thread_id: str) -> str:
        if not self.shared:
            raise errors.NotFound
        return f"grant of {thread_id}"

    async def stream(self, method: str, request: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        self.asked.append(dict(request))
        seen = {one["run_id"]: int(one["seq"]) for one in request["positions"]}
        left = [
            (run_id, seq)
            for run_id, last in sorted(self.runs.items())
            if run_id in seen or run_id > request["after_run_id"]
            for seq in range(seen.get(run_id, 0) + 1, last + 1)
        ]
        until = random.randrange(1, 8) if self.breaks else len(left)
        yield {"events": [_event(*one) for one in left[:until]], "truncated": [], "ended": "", "caught_up": until >= len(left)}
        if until < len(left) and (problem := self.breaks.pop()) is not None:
            raise problem


def _event(run_id: str, seq: int, kind: str = "agent_completed") -> dict[str, Any]:
    frame = json.dumps({"run_id": run_id, "seq": seq}).encode()
    return {"run_id": run_id, "seq": str(seq), "type": kind, "frame": base64.b64encode(frame).decode()}


async def test_every_event_comes_once_through_every_end_of_a_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_PAUSE_S", 0.0)
    monkeypatch.setattr(threads, "_MOST", 5)
    gateway = _Gateway({ids.uuid7(): 1 + number % 3 for number in range(40)})
    gateway.breaks = [None, errors.Unavailable(), errors.Unauthenticated()] * 30
    found = [event async for event in threads.follow(gateway, "t", live=False)]
    assert [(event["run_id"], event["seq"]) for event in found] == [
        (run_id, seq) for run_id, last in sorted(gateway.runs.items()) for seq in range(1, last + 1)
    ]
    assert len(gateway.asked) > 5
    assert max(len(request["positions"]) for request in gateway.asked) == 5
    assert {request["grant_token"] for request in gateway.asked} == {"grant of t"}


async def test_what_is_gone_is_told_where_it_was() -> None:
    place, run_id = threads.Place(), ids.uuid7()
    answer = {"truncated": [{"run_id": run_id, "seq": "3"}], "events": [_event(run_id, 3), _event(run_id, 4)]}
    assert place.take(answer) == [{"type": "history_truncated", "run_id": run_id, "seq": 3}, {"run_id": run_id, "seq": 4}]
    assert place.request("g") == {"grant_token": "g", "positions": [{"run_id": run_id, "seq": 4}], "after_run_id": ""}


async def test_a_run_that_goes_on_keeps_its_place_however_old_it_is_and_many_came_after_it() -> None:
    place, (old, *runs) = threads.Place(), sorted(ids.uuid7() for _ in range(threads._MOST + 100))
    place.take({"truncated": [], "events": [_event(old, 1, "agent_started")]})
    for run_id in runs:
        place.take({"truncated": [], "events": [_event(run_id, 1, "agent_completed")]})
    request = place.request("g")
    assert {"run_id": old, "seq": 1} in request["positions"]
    assert len(request["positions"]) == threads._MOST
    assert request["after_run_id"] == runs[99]
    place.take({"truncated": [], "events": [_event(old, 2)]})
    assert old in {one["run_id"] for one in place.request("g")["positions"]}


async def test_no_more_is_told_than_a_frame_has_room_for() -> None:
    place, runs = threads.Place(), sorted(ids.uuid7() for _ in range(threads._ROOM + 50))
    for run_id in runs:
        place.take({"truncated": [], "events": [_event(run_id, 1, "agent_started")]})
    request = place.request("g")
    assert [one["run_id"] for one in request["positions"]] == runs[50:]
    assert request["after_run_id"] == runs[49]


async def test_it_pauses_after_a_stream_that_answered_nothing_and_gives_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    paused: list[float] = []

    class _Draining(_Gateway):
        async def stream(self, method: str, request: Mapping[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
            if len(self.asked) < 3:
                self.asked.append(dict(request))
                return
            async for answer in super().stream(method, request):
                yield answer

    async def sleep(pause_s: float) -> None:
        paused.append(pause_s)

    monkeypatch.setattr("netra.threads.asyncio.sleep", sleep)
    gateway = _Draining({ids.uuid7(): 2})
    assert len([event async for event in threads.follow(gateway, "t", live=False)]) == 2
    assert paused == [threads._PAUSE_S] * 3
    silent = _Draining({})
    silent.patience_s = 0.0
    with pytest.raises(errors.Unavailable):
        await anext(threads.follow(silent, "t"))


async def test_the_time_that_whoever_reads_takes_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    class _Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

    clock = _Clock()
    monkeypatch.setattr(threads, "time", clock)
    monkeypatch.setattr(threads, "_PAUSE_S", 0.0)
    gateway, found = _Gateway({ids.uuid7(): 40}), 0
    gateway.breaks = [errors.Unavailable()] * 100
    async for _ in threads.follow(gateway, "t", live=False):
        found += 1
        clock.now += 100 * gateway.patience_s
    assert found == 40
    assert len(gateway.asked) > 5


async def test_it_ends_with_the_grant_and_when_nobody_is_signed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_PAUSE_S", 0.0)
    gateway = _Gateway({ids.uuid7(): 9})
    gateway.breaks, gateway.shared = [], False
    with pytest.raises(errors.NotFound):
        await anext(threads.follow(gateway, "t"))

    class _SignedOut(_Gateway):
        async def grant_token(self, thread_id: str) -> str:
            raise errors.Unauthenticated

    with pytest.raises(errors.Unauthenticated):
        await anext(threads.follow(_SignedOut({}), "t"))

    class _Away(_Gateway):
        async def grant_token(self, thread_id: str) -> str:
            raise errors.Unavailable

    away = _Away({})
    away.patience_s = 0.0
    with pytest.raises(errors.Unavailable):
        await anext(threads.follow(away, "t"))
