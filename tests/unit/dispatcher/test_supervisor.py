"""When a run begins at once, and when the queue is looked at: never for nothing, and always when there may be something."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest

from chassis import lifecycle
from netra import errors, ids
from netra.context import UserExecutionContext
from services.dispatcher import admission, engine, runs, settings, supervisor

_USER: Any = SimpleNamespace(user_id=ids.UserId(ids.uuid7()), tier="free")


def _order() -> runs.Order:
    run_id = ids.RunId.new()
    context = UserExecutionContext.from_request(
        user_id=_USER.user_id, tenant_id=ids.uuid7(), session_id=ids.uuid7(), thread_id=ids.uuid7(), run_id=run_id, request_id="r",
        roles=("user",), tier="free",
    )  # fmt: skip
    return runs.Order(run_id, "agent", "swift", "What now?", b"{}", 60, ids.uuid7(), context.to_proto().SerializeToString(), "token", "")


class Around:
    """All that is around a supervisor: what it is told by the test, and what was asked of it."""

    can_record = True

    def __init__(self) -> None:
        # of looks: how many slots each was for, and what they come to; the last one again and again
        self.looks: list[int] = []
        self.found: list[runs.Claims] = []
        # of starts: whether each was to begin at once, and what holds them up
        self.at_once: list[bool] = []
        self.accepting = asyncio.Event()
        self.accepting.set()
        self.refused: Exception | None = None
        self.begins = True
        # of runs: who executes, and what ends all of them, with or without an end
        self.executing: list[str] = []
        self.over, self.put_away = asyncio.Event(), False
        self.told: list[tuple[str, str]] = []
        self.heard: dict[str, asyncio.Queue[str]] = {"wake": asyncio.Queue(), "cancel": asyncio.Queue()}
        self.disowned: list[tuple[str, Sequence[str]]] = []

    async def claim(self, _owner: str, _lease_s: float, _agents: object, most: int, *_: object, **_more: object) -> runs.Claims:
        """One look."""
        self.looks.append(most)
        await asyncio.sleep(0)
        return self.found.pop(0) if self.found else runs.Claims()

    async def accept(
        self, _user: object, wanted: admission.Wanted, *, owner: str = "", lease_s: float = 0
    ) -> tuple[runs.Added, runs.Order]:
        """Store a run."""
        self.at_once.append(bool(owner))
        await self.accepting.wait()
        if self.refused is not None:
            raise self.refused
        begins, order = bool(owner) and self.begins, _order()
        run = runs.Run(
            order.run_id, _USER.user_id, ids.ThreadId.new(), wanted.request_id, order.message_id, b"", "agent", "swift",
            runs.RunState.RUNNING if begins else runs.RunState.QUEUED, "c", datetime.now(UTC),
        )  # fmt: skip
        return runs.Added(run, leased_at=time.monotonic() if begins else 0.0), order

    async def run(self, mine: engine.Running) -> None:
        """Execute a run."""
        assert mine.leased_until > time.monotonic()
        self.executing.append(mine.claim.order.run_id)
        await self.over.wait()
        mine.over = not self.put_away

    async def publish(self, topic: str, message: str) -> None:
        """Tell all processes, this one as well."""
        self.told.append((topic, message))
        self.heard[topic].put_nowait(message)

    async def listen(self, topic: str) -> AsyncIterator[str]:
        """What processes told."""
        while True:
            yield await self.heard[topic].get()

    async def disown(self, _owner: str, _user_id: str, request_id: str, kept: Sequence[str]) -> None:
        """Whatever a request has begun is let go of."""
        self.disowned.append((request_id, kept))

    def get(self, *_: object) -> Any:
        """The agent."""
        return SimpleNamespace(name="swift", version="1.0.0")

    def versions(self) -> list[tuple[str, str]]:
        """The agents."""
        return [("swift", "1.0.0")]

    def concurrent(self) -> dict[str, int]:
        """The caps."""
        return {"free": 100}

    async def queued(self, *_: object) -> int:
        """How many wait in all."""
        return 0

    async def old_tokens(self, *_: object) -> list[Any]:
        """None."""
        return []

    open_contexts = old_tokens

    async def nothing(self, *_: object, **_more: object) -> Any:
        """Neither known nor withdrawn."""
        return None

    known = seen = release = close = nothing

    def revocation(self, *_: object) -> None:
        """Nobody was withdrawn."""

    check_inputs = require_agent = revocation

    async def renew(self, _owner: str, _lease_s: float, run_ids: Sequence[str]) -> dict[str, runs.Held]:
        """All leases are kept."""
        return {run_id: runs.Held(1) for run_id in run_ids}


class Process:
    """A supervisor in what is around it."""

    def __init__(self, **limits: Any) -> None:
        self.around = Around()
        there: Any = self.around
        given = settings.DispatcherSettings(**{"poll_s": 3600, "drain_s": 0.05, **limits})
        self.supervisor = supervisor.Supervisor(there, there, there, there, there, there, there, there, there, given)

    async def start(self, request_id: str = "") -> runs.Run:
        """One run of the user's."""
        wanted = admission.Wanted("agent", "swift", request_id or ids.uuid7(), "What now?", b"{}", "", "", 60)
        run, _ = await self.supervisor.start(_USER, wanted)
        return run

    async def quiet(self) -> int:
        """How often the queue was looked at, once nothing more happens by itself."""
        for _ in range(100):
            await asyncio.sleep(0)
        return len(self.around.looks)


async def until(condition: Callable[[], bool]) -> None:
    """Returns when it is so."""
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - whatever the test waits for
            await asyncio.sleep(0)


@contextlib.asynccontextmanager
async def _running(**limits: Any) -> AsyncIterator[Process]:
    process, tasks = Process(**limits), lifecycle.Tasks()
    tasks.spawn(process.supervisor.run(), name="supervisor")
    try:
        yield process
    finally:
        await tasks.close()
        await process.supervisor.close()


async def _claimed(process: Process, *, more: bool = False, waits: bool = False) -> str:
    """Another process tells of a run, and it is claimed here."""
    order = _order()
    process.around.found.append(runs.Claims([runs.Claim(order, 1, cancelled="", expired=False)], more=more, waits=waits))
    process.around.heard["wake"].put_nowait("another process")
    await until(lambda: order.run_id in process.around.executing)
    return order.run_id


async def test_a_run_begins_at_once_without_a_look_or_a_word_to_others() -> None:
    async with _running() as process:
        assert await process.quiet() == 1
        run = await process.start()
        await until(lambda: process.around.executing == [run.run_id])
        assert (await process.quiet(), process.around.told, process.around.at_once) == (1, [], [True])


async def test_nothing_begins_at_once_before_the_queue_was_looked_at() -> None:
    process = Process()
    await process.start()
    assert process.around.at_once == [False]
    await process.supervisor.close()


async def test_a_run_that_has_to_wait_is_looked_for_once_and_others_are_told() -> None:
    async with _running() as process:
        await process.quiet()
        process.around.begins = False
        await process.start()
        assert await process.quiet() == 2
        assert process.around.told == [("wake", process.supervisor.owner)]
        process.around.heard["wake"].put_nowait("another process")
        assert await process.quiet() == 3


@pytest.mark.parametrize("waits", [True, False])
async def test_the_end_of_a_run_is_followed_by_a_look_if_something_waits(waits: bool) -> None:
    async with _running() as process:
        await process.quiet()
        await _claimed(process, waits=waits)
        looks = await process.quiet()
        process.around.over.set()
        assert await process.quiet() == looks + waits


async def test_a_run_that_was_put_away_may_be_awake_already() -> None:
    async with _running() as process:
        await process.quiet()
        await process.start()
        looks, process.around.put_away = await process.quiet(), True
        process.around.over.set()
        assert await process.quiet() == looks + 1


async def test_what_a_look_has_left_begins_before_anything_else() -> None:
    async with _running() as process:
        await process.quiet()
        order = _order()
        process.around.found = [
            runs.Claims([runs.Claim(_order(), 1, cancelled="", expired=False)], more=True, waits=True),
            runs.Claims([runs.Claim(order, 1, cancelled="", expired=False)], more=True, waits=True),
            runs.Claims(more=True, waits=True),
        ]
        process.around.heard["wake"].put_nowait("another process")
        await until(lambda: order.run_id in process.around.executing)
        assert await process.quiet() == 4
        await process.start()
        assert process.around.at_once == [False]
        # the look for that one has found that nothing is left
        await process.quiet()
        await process.start()
        assert process.around.at_once == [False, True]


async def test_slots_are_taken_by_what_is_being_accepted() -> None:
    async with _running(slots=3) as process, asyncio.TaskGroup() as group:
        await process.quiet()
        await _claimed(process)
        process.around.accepting.clear()
        for _ in range(3):
            group.create_task(process.start())
        await process.quiet()
        assert process.around.at_once == [True, True, False]
        process.around.accepting.set()
        await until(lambda: len(process.around.executing) == 3)
        # the third waits for one of them to end
        looks = await process.quiet()
        process.around.over.set()
        assert await process.quiet() > looks


async def test_a_look_leaves_out_the_slots_of_what_is_being_accepted() -> None:
    async with _running(slots=3) as process, asyncio.TaskGroup() as group:
        await process.quiet()
        process.around.accepting.clear()
        group.create_task(process.start())
        await process.quiet()
        process.around.heard["wake"].put_nowait("another process")
        await process.quiet()
        process.around.accepting.set()
        assert process.around.looks == [3, 2]


async def test_a_slot_that_was_not_needed_after_all_is_looked_for() -> None:
    async with _running(slots=1) as process:
        await process.quiet()
        process.around.accepting.clear()
        process.around.refused = errors.NotFound("There is no such thread.", field="thread_id")
        async with asyncio.TaskGroup() as group:
            starting = group.create_task(_refused(process))
            await process.quiet()
            process.around.heard["wake"].put_nowait("another process")
            # no slot to look for
            assert await process.quiet() == 1
            process.around.accepting.set()
        assert isinstance(starting.result(), errors.NotFound)
        assert (await process.quiet(), process.around.disowned) == (2, [])


async def _refused(process: Process) -> Exception:
    with pytest.raises(errors.NetraError) as refused:
        await process.start()
    return refused.value


@pytest.mark.parametrize("gone", ["caller", "database"])
async def test_what_may_have_begun_for_nobody_is_let_go_of(gone: str) -> None:
    async with _running() as process:
        await process.quiet()
        mine = await process.start()
        process.around.accepting.clear()
        process.around.refused = errors.Unavailable("Nobody knows.")
        looks, tasks = await process.quiet(), lifecycle.Tasks(on_failure=lambda _: None)
        starting = tasks.spawn(process.start("lost"), name="start")
        await process.quiet()
        if gone == "caller":
            starting.cancel()
        process.around.accepting.set()
        await asyncio.wait({starting})
        assert await process.quiet() == looks + 1
        assert process.around.disowned == [("lost", [mine.run_id])]


async def test_nothing_begins_in_a_process_that_cannot_record() -> None:
    async with _running() as process:
        await process.quiet()
        process.around.can_record = False
        await process.start()
        assert process.around.at_once == [False]
