"""Dispatchers are made by their factory, each for one context, share nothing, and leave nothing."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from netra import errors
from netra.tool import ToolContext, tool
from services.dispatcher.tools import dispatch, means
from tests.fixtures.dispatchers import House, house

GATES: dict[str, asyncio.Event] = {}


@tool(name="note.write", timeout_s=30)
async def write(context: ToolContext, text: str) -> list[str]:
    """Writes a note to the folder of the run, and tells which there are."""
    (context.workspace / text).write_text(context.context.user_id)
    return sorted(path.name for path in context.workspace.iterdir() if path.is_file())


@tool(name="wait.here", timeout_s=30)
async def wait(mark: str) -> str:
    """Waits until it is let go."""
    await GATES[mark].wait()
    return mark


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[House]:
    """A process with the tools above, where a user has two dispatchers at most."""
    async with house(tmp_path, [write, wait], rules=means.Rules(dispatchers_per_user=2)) as made:
        yield made


async def begun(place: House, count: int) -> None:
    """Returns when so many calls are under way."""
    async with asyncio.timeout(10):
        while place.dispatchers.running < count:  # noqa: ASYNC110 - nobody tells when a call is let in
            await asyncio.sleep(0)


@pytest.mark.real_services
class TestToolDispatcherFactoryIsolation:
    """The factory."""

    async def test_factory_creates_isolated_dispatchers_per_user(self, place: House) -> None:
        with pytest.raises(RuntimeError, match="made by its factory"):
            dispatch.UnifiedToolDispatcher()  # type: ignore[call-arg]
        one, other = place.person(), place.person()
        async with place.open(one) as mine, place.open(other) as theirs:
            assert mine is not theirs
            assert (await mine.execute("note.write", {"text": "a"})).unwrap() == ["a"]
            assert (await theirs.execute("note.write", {"text": "b"})).unwrap() == ["b"]
            # nobody is told of, or counts, what another did
            assert [len(who.heard.events) for who in (one, other)] == [2, 2]
            assert [each.metrics().tools_executed for each in (mine, theirs)] == [1, 1]
            assert [each.metrics().user_id for each in (mine, theirs)] == [one.context.user_id, other.context.user_id]
            assert mine.dispatcher_id != theirs.dispatcher_id

    async def test_request_scoped_dispatcher_context_manager(self, place: House) -> None:
        who = place.person()
        async with place.open(who) as tools:
            await tools.execute("note.write", {"text": "a"})
            folder = who.files.folder
            assert folder.exists()
            assert place.dispatchers.live_of(who.context.user_id) == 1
        assert not folder.exists()
        assert place.dispatchers.live_of(who.context.user_id) == 0
        with pytest.raises(errors.FailedPrecondition, match="closed"):
            await tools.execute("note.write", {"text": "b"})
        # whatever happens in the block
        with pytest.raises(ZeroDivisionError):
            async with place.open(who):
                raise ZeroDivisionError
        assert place.dispatchers.live == 0

    async def test_concurrent_dispatcher_creation_and_execution(self, place: House) -> None:
        people = [place.person() for _ in range(40)]

        async def one(number: int) -> list[str]:
            async with place.open(people[number]) as tools:
                both = await asyncio.gather(*(tools.execute("note.write", {"text": f"{number}-{name}"}) for name in "ab"))
                people[number].heard.pairs()
                assert tools.metrics().successful_executions == 2
                return sorted(both, key=lambda outcome: len(outcome.unwrap()))[-1].unwrap()  # type: ignore[no-any-return]

        found = await asyncio.gather(*(one(number) for number in range(40)))
        assert found == [[f"{number}-a", f"{number}-b"] for number in range(40)]
        assert place.dispatchers.live == 0

    async def test_dispatcher_factory_memory_management(self, place: House) -> None:
        left: list[weakref.ref[dispatch.UnifiedToolDispatcher]] = []
        folders = []
        for _ in range(50):
            who = place.person()
            async with place.open(who) as tools:
                await tools.execute("note.write", {"text": "a"})
                left.append(weakref.ref(tools))
                folders.append(who.files.folder)
        del tools
        gc.collect()
        assert [ref for ref in left if ref() is not None] == []
        assert not any(folder.exists() for folder in folders)
        # one that is closed with calls under way ends them, each with its pair
        GATES["never"] = asyncio.Event()
        who = place.person()
        async with asyncio.TaskGroup() as group:
            async with place.open(who) as tools:
                call = group.create_task(_stopped(tools))
                await begun(place, 1)
            assert place.dispatchers.running == 0
            await call
        who.heard.pairs()
        assert [event["status"] for event in who.heard.events if event["type"] == "tool_completed"] == ["cancelled"]
        assert (place.dispatchers.live, place.dispatchers.running) == (0, 0)

    async def test_user_dispatcher_limit_enforcement(self, place: House, tmp_path: Path) -> None:
        GATES["busy"] = asyncio.Event()
        first = place.person()
        user = first.context.user_id
        people = [first, *(place.person(of=user) for _ in range(3))]
        async with contextlib.AsyncExitStack() as stack, asyncio.TaskGroup() as group:
            busy, idle = [await stack.enter_async_context(place.open(who)) for who in people[:2]]
            call = group.create_task(busy.execute("wait.here", {"mark": "busy"}))
            await begun(place, 1)
            # the oldest is busy: the idle one gives way
            third = await stack.enter_async_context(place.open(people[2]))
            with pytest.raises(errors.FailedPrecondition):
                await idle.execute("note.write", {"text": "a"})
            other = group.create_task(third.execute("wait.here", {"mark": "busy"}))
            await begun(place, 2)
            with pytest.raises(errors.QuotaExceeded) as refused:
                await stack.enter_async_context(place.open(people[3]))
            assert (refused.value.details["limit"], refused.value.retry_after_ms) == ("2", 1000)
            # those of accepted runs are not counted, and what the tier gives counts for more
            await stack.enter_async_context(place.open(people[3], held=True))
            await stack.enter_async_context(place.open(place.person(of=user), most=3))
            # nobody else is concerned
            await stack.enter_async_context(place.open(place.person()))
            GATES["busy"].set()
            assert [(await one).status for one in (call, other)] == ["success", "success"]
        async with house(tmp_path / "other", [write], rules=means.Rules(dispatchers_per_user=1, when_full="reject")) as strict:
            who = strict.person()
            async with strict.open(who) as kept:
                with pytest.raises(errors.QuotaExceeded):
                    await strict.open(strict.person(of=who.context.user_id)).__aenter__()
                assert (await kept.execute("note.write", {"text": "a"})).status == "success"


async def _stopped(tools: dispatch.UnifiedToolDispatcher) -> None:
    with pytest.raises(asyncio.CancelledError):
        await tools.execute("wait.here", {"mark": "never"})
