"""Appends over real streams: to the replica of their user, and to the next when that one falls silent, breaks or refuses."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from chassis import lifecycle, replicas
from netra import errors
from netra.events.v1 import events_pb2, events_pb2_grpc
from services.dispatcher import appender, upstreams

SILENCE_S = 0.4


class Replica(events_pb2_grpc.EventsServiceServicer):
    """One replica of events, which answers, or says nothing, or refuses."""

    def __init__(self) -> None:
        self.server = grpc.aio.server()
        self.target = ""
        self.silent = False
        self.silent_to: set[str] = set()
        self.refuses: list[str] = []
        self.takes_more = False
        # how many appends came with each message
        self.messages: list[int] = []
        self.seen: Counter[str] = Counter()
        self.tokens: list[str] = []
        self.streams = 0
        self.came = asyncio.Condition()

    async def Append(self, requests: AsyncIterator[events_pb2.AppendRequest], context: Any) -> AsyncIterator[events_pb2.AppendResponse]:
        """Answer appends."""
        self.streams += 1
        async for message in requests:
            together = message.more or [message]
            self.messages.append(len(together))
            answers = []
            for request in together:
                self.seen[request.run_id] += 1
                self.tokens.append(request.open.context_token or request.context_token)
                if not (self.silent or request.run_id in self.silent_to):
                    code = self.refuses.pop() if self.refuses else ""
                    answers.append(
                        events_pb2.AppendResponse(
                            append_id=request.append_id, last_cursor=0 if code else 7, error_code=code, error_message="no",
                            takes_more=self.takes_more,
                        )
                    )  # fmt: skip
            async with self.came:
                self.came.notify_all()
            if answers:
                yield answers[0] if len(answers) == 1 else events_pb2.AppendResponse(more=answers, takes_more=self.takes_more)

    async def arrived(self, run_id: str) -> None:
        """Returns when an append of a run has come."""
        async with asyncio.timeout(10), self.came:
            await self.came.wait_for(lambda: self.seen[run_id] > 0)

    async def start(self, port: int = 0) -> None:
        """Listen."""
        events_pb2_grpc.add_EventsServiceServicer_to_server(self, self.server)
        self.target = f"127.0.0.1:{self.server.add_insecure_port(f'127.0.0.1:{port}')}"
        await self.server.start()


class World:
    """Some replicas and what appends to them."""

    def __init__(self, *there: Replica) -> None:
        self.there = {replica.target: replica for replica in there}
        self.channels: list[grpc.aio.Channel] = []
        self.known = replicas.Replicas(",".join(self.there))
        self.appends = appender.Appender(upstreams.Records(self.known, self._connect), SILENCE_S)

    def _connect(self, target: str) -> grpc.aio.Channel:
        self.channels.append(grpc.aio.insecure_channel(target, options=[("grpc.max_reconnect_backoff_ms", 100)]))
        return self.channels[-1]

    def ranked(self, user_id: str) -> list[Replica]:
        """The replicas in the order they have for a user."""
        return [self.there[target] for target in self.known.ranked(user_id)]

    def append(self, run_id: str, user_id: str = "user") -> asyncio.Future[None]:
        """One append."""
        return self.appends.append(events_pb2.AppendRequest(run_id=run_id, first_seq=1), user_id)


@contextlib.asynccontextmanager
async def world(replicas_: int) -> AsyncIterator[World]:
    """For the time of the block."""
    there = [Replica() for _ in range(replicas_)]  # type: ignore[abstract]
    for replica in there:
        await replica.start()
    here, tasks = World(*there), lifecycle.Tasks()
    tasks.spawn(here.appends.run(), "append streams")
    try:
        yield here
    finally:
        await tasks.close()
        for channel in here.channels:
            await channel.close()
        for replica in there:
            await replica.server.stop(None)


async def within(work: asyncio.Future[None]) -> None:
    """Wait, not for ever."""
    await asyncio.wait_for(work, 10)


async def test_users_keep_to_their_replica_over_one_stream_each() -> None:
    async with world(3) as here:
        users = [f"user {number}" for number in range(30)]
        await asyncio.gather(*(within(here.append(f"{user} {turn}", user)) for turn in range(3) for user in users))
        for user in users:
            assert [replica.seen[f"{user} 0"] for replica in here.ranked(user)] == [1, 0, 0]
        assert [replica.streams for replica in here.there.values()] == [1, 1, 1]
        assert here.appends.health() == appender.Health(True, 0, 0, 0.0)


@pytest.mark.parametrize("takes_more", [True, False])
async def test_what_waits_goes_together_to_a_replica_that_takes_that(takes_more: bool) -> None:
    async with world(1) as here:
        (replica,) = here.there.values()
        replica.takes_more = takes_more
        # what it takes is in its first answer
        await within(here.append("first"))
        await asyncio.gather(*(within(here.append(f"run {number}")) for number in range(100)))
        assert replica.messages == ([1, 64, 36] if takes_more else [1] * 101)
        large = events_pb2.NewEvent(data=b"x" * 150_000)
        requests = [events_pb2.AppendRequest(run_id=f"large {number}", events=[large]) for number in range(3)]
        await asyncio.gather(*(within(here.appends.append(request, "user")) for request in requests))
        assert replica.messages[-3:] == [1, 1, 1]
        assert {*replica.seen.values()} == {1}
        assert not any(request.more for request in requests)


async def test_of_those_that_go_together_each_has_its_own_answer() -> None:
    async with world(2) as here:
        first, other = here.ranked("user")
        first.takes_more = True
        await within(here.append("first"))
        first.refuses, first.silent_to = ["FENCED"], {"unheard"}
        refused, unheard, good = (here.append(run_id) for run_id in ("refused", "unheard", "good"))
        await within(good)
        with pytest.raises(errors.Fenced):
            await within(refused)
        await within(unheard)
        assert first.messages[:2] == [1, 3]
        assert (first.seen["unheard"], other.seen["unheard"], other.seen["good"]) == (1, 1, 0)


async def test_no_stream_is_opened_that_nobody_needs() -> None:
    async with world(2) as here:
        await within(here.append("run"))
        assert sorted(replica.streams for replica in here.there.values()) == [0, 1]


async def test_one_that_says_nothing_is_given_up_and_the_next_gets_everything() -> None:
    async with world(2) as here:
        first, other = here.ranked("user")
        first.silent = True
        waiting = [here.append(f"run {number}") for number in range(20)]
        await first.arrived("run 19")
        health = here.appends.health()
        assert (health.waiting, health.waiting_bytes > 0) == (20, True)
        await asyncio.gather(*map(within, waiting))
        assert all(other.seen[f"run {number}"] == 1 for number in range(20))
        # it is not asked again at once
        await within(here.append("after"))
        assert (first.seen["after"], other.seen["after"]) == (0, 1)
        assert here.appends.reachable


async def test_one_that_answers_others_keeps_its_stream() -> None:
    async with world(2) as here:
        first, other = here.ranked("user")
        first.silent_to = {"stuck"}
        stuck = here.append("stuck")
        for turn in range(1000):
            await within(here.append(f"run {turn}"))
            if stuck.done():
                break
            await asyncio.sleep(0.005)
        await within(stuck)
        assert (first.seen["stuck"], other.seen["stuck"]) == (1, 1)
        assert (first.streams, other.streams) == (1, 1)
        assert other.seen.total() == 1


async def test_one_that_goes_loses_nothing() -> None:
    async with world(2) as here:
        first, other = here.ranked("user")
        first.silent = True
        waiting = [here.append(f"run {number}") for number in range(10)]
        await first.arrived("run 9")
        await first.server.stop(None)
        await asyncio.gather(*map(within, waiting))
        assert other.seen.total() == 10


async def test_the_only_one_is_waited_for() -> None:
    async with world(1) as here:
        (only,) = here.there.values()
        await within(here.append("before"))
        await only.server.stop(None)
        waiting = here.append("meanwhile")
        async with asyncio.timeout(10):
            while here.appends.health().unanswered_s < 0.3:  # noqa: ASYNC110 - time itself is waited for
                await asyncio.sleep(0.005)
        assert (waiting.done(), here.appends.reachable) == (False, False)
        again = Replica()  # type: ignore[abstract]
        await again.start(int(only.target.rpartition(":")[2]))
        await within(waiting)
        assert (again.seen["meanwhile"], here.appends.reachable) == (1, True)
        await again.server.stop(None)


async def test_what_cannot_be_committed_just_now_comes_again_and_then_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appender, "_RESEND_S", 0.02)
    async with world(2) as here:
        first, other = here.ranked("user")
        first.refuses = [errors.Unavailable.code] * 3
        await within(here.append("run"))
        assert (first.seen["run"], other.seen["run"]) == (3, 1)


async def test_a_refusal_is_an_answer() -> None:
    async with world(2) as here:
        first, other = here.ranked("user")
        first.refuses = [errors.Fenced.code]
        with pytest.raises(errors.Fenced, match="no"):
            await within(here.append("run"))
        assert (other.streams, here.appends.health().waiting) == (0, 0)


async def test_what_would_break_the_stream_is_refused_here() -> None:
    async with world(1) as here:
        step = events_pb2.Step(key="1", result=b"x" * (2 * 1024 * 1024))
        with pytest.raises(errors.TooLarge):
            await within(here.appends.append(events_pb2.AppendRequest(run_id="run", steps=[step]), "user"))
        await within(here.append("run"))


async def test_what_is_shown_needs_no_answer_and_opens_no_stream() -> None:
    async with world(1) as here:
        (only,) = here.there.values()
        here.appends.show(events_pb2.AppendRequest(run_id="nobody"), "user")
        await within(here.append("run"))
        only.silent = True
        here.appends.show(events_pb2.AppendRequest(run_id="shown"), "user")
        await only.arrived("shown")
        assert (only.seen["nobody"], here.appends.health().waiting) == (0, 0)


async def test_a_run_is_opened_where_its_user_is_written() -> None:
    class Opening(Replica):
        async def OpenRun(self, request: events_pb2.OpenRunRequest, context: Any) -> events_pb2.OpenRunResponse:
            if self.silent:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            return events_pb2.OpenRunResponse(next_seq=int(self.target.rpartition(":")[2]))

    there = [Opening() for _ in range(2)]  # type: ignore[abstract]
    for replica in there:
        await replica.start()
    here = World(*there)
    records = upstreams.Records(here.known, here._connect)
    first, other = here.ranked("user")
    assert f":{(await records.open('run', 'user', 1, 'token', '')).next_seq}" in first.target
    first.silent = True
    assert f":{(await records.open('run', 'user', 1, 'token', '')).next_seq}" in other.target
    for channel in here.channels:
        await channel.close()
    for replica in there:
        await replica.server.stop(None)


async def test_a_replica_that_is_none_any_more_is_left_and_what_it_had_goes_elsewhere() -> None:
    async with world(3) as here:
        first, *others = here.ranked("user")
        await within(here.append("before"))
        first.silent = True
        waiting = here.append("run")
        await first.arrived("run")
        here.known.targets = tuple(replica.target for replica in others)
        await asyncio.wait_for(waiting, SILENCE_S * 0.9)
        assert (first.seen["run"], others[0].seen["run"]) == (1, 1)
        assert first.target not in here.appends._streams
        assert here.appends.reachable
        # and comes back as any other
        here.known.targets = (first.target, *here.known.targets)
        first.silent = False
        await within(here.append("after"))
        assert (first.seen["after"], first.streams) == (1, 2)


@pytest.mark.parametrize("opens", [True, False])
async def test_a_context_token_is_taken_when_it_is_sent(opens: bool) -> None:
    async with world(2) as here:
        first, other = here.ranked("user")
        first.silent = True
        tokens = iter(["old", "fresh"])
        request = events_pb2.AppendRequest(events=[events_pb2.NewEvent(type="x")])
        if opens:
            request.open.trace_id = "0" * 32
        await within(here.appends.append(request, "user", lambda: next(tokens)))
        assert (first.tokens, other.tokens) == (["old"], ["fresh"])
        assert request.open.trace_id == ("0" * 32 if opens else "")
        assert bool(request.context_token) is not opens
