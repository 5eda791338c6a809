"""Warm worker processes: what a function is given and answers, whom a process serves, and that it ends when it has to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any

import pytest
import uvloop

from netra import errors
from services.dispatcher.tools.sandbox import frames, guardian, workers
from tests.fixtures import functions
from tests.fixtures.worker import ended

FUNCTIONS = "tests.fixtures.functions"
ROOT = Path(__file__).resolve().parents[3]
MIB = 1024 * 1024
# a dispatcher that is only there to be stopped and killed; it says how its call ended, and that it can call again
OWNER = f"""
import asyncio, pathlib, sys
import uvloop
from services.dispatcher.tools.sandbox import guardian, process, workers
backend, folder = sys.argv[1], pathlib.Path(sys.argv[2])
async def main():
    guard = guardian.Guardian(1.0)
    guardian.current.set(guard)
    pool = workers.Workers(2, guard)
    def call(name, **arguments):
        if backend == "process":
            return process.run("tests.fixtures.worker", arguments or {{"do": name}}, cwd=folder)
        return pool.run({FUNCTIONS!r}, name, arguments, user="ann", timeout_s=60, folder=folder)
    try:
        await call(backend == "process" and "hang" or "stuck")
    except Exception as error:
        print(error, flush=True)
    print(await call("echo", **{{"echo" if backend == "process" else "value": "again"}}), flush=True)
    await pool.close()
    await guard.close()
uvloop.run(main())
"""
# in a copy of the dispatcher by fork, gRPC's threads would crash: its handlers of forks run there, as this one would
FORKED = f"""
import os, pathlib, sys
import uvloop
from services.dispatcher.tools.sandbox import guardian, workers
os.register_at_fork(after_in_child=lambda: os._exit(77))
async def main():
    guard = guardian.Guardian(2)
    pool = workers.Workers(1, guard)
    print(await pool.run({FUNCTIONS!r}, "echo", {{"value": "whole"}}, user="ann", timeout_s=60, folder=pathlib.Path(sys.argv[1])))
    await pool.close()
    await guard.close()
uvloop.run(main())
"""


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def go(request: pytest.FixtureRequest) -> Any:
    """Runs a coroutine: services run on uvloop, and both loops hear of processes in ways of their own."""
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the pipe that a function announces itself in."""
    os.mkfifo(tmp_path / "ready")
    return tmp_path


class Pool:
    """Workers, and calls of the functions of the tests."""

    def __init__(self, folder: Path, places: int, **options: Any) -> None:
        self.guard = guardian.Guardian(5.0)
        self.workers = workers.Workers(places, self.guard, **options)
        self.folder = folder

    async def call(self, name: str, *, user: str = "ann", timeout_s: float = 60.0, **arguments: Any) -> Any:
        """What the function returns."""
        return await self.workers.run(FUNCTIONS, name, arguments, user=user, timeout_s=timeout_s, folder=self.folder)


@contextlib.asynccontextmanager
async def pool(folder: Path, places: int = 2, **options: Any) -> AsyncIterator[Pool]:
    """Workers for the time of the block, and no process of theirs after it."""
    made = Pool(folder, places, **options)
    try:
        yield made
    finally:
        await made.workers.close()
        await made.guard.close()
        assert mine("sandbox.worker") == mine("watch.py") == []


def mine(word: str) -> list[int]:
    """The processes that this one has started, with a word in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text(encoding="ascii").rpartition(")")[2].split()[1])
            if parent == os.getpid() and not ended(int(entry.name)) and word.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def state(pid: int) -> str:
    """The letter that the system has for what a process does."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]


async def pids(folder: Path) -> list[int]:
    """The processes of a call that hangs, once they run."""
    text = await asyncio.wait_for(asyncio.to_thread((folder / "ready").read_text), 20)
    return [int(pid) for pid in text.split()]


def handles(stack: contextlib.ExitStack, processes: list[int]) -> list[int]:
    """Something to wait for the end of each process with."""
    found = [os.pidfd_open(pid) for pid in processes]
    for handle in found:
        stack.callback(os.close, handle)
    return found


async def gone(handle: int) -> bool:
    """Whether a process ends."""
    watch = select.poll()
    watch.register(handle, select.POLLIN)
    return await asyncio.to_thread(watch.poll, 20_000) != []


async def caught(work: Awaitable[Any]) -> BaseException | None:
    """How it fails."""
    try:
        await work
    except (errors.NetraError, asyncio.CancelledError) as error:
        return error
    return None


async def test_a_function_works_in_the_folder_of_its_call(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRA_SECRETS_DIR", "/somewhere")
    async with pool(folder) as made:
        assert await made.call("echo", value={"words": ["é", 1, None]}) == {"words": ["é", 1, None]}
        found = await made.call("surroundings")
        assert found["folder"] == found["temporary"] == found["environment"]["HOME"] == str(folder)
        assert set(found["environment"]) <= {"PATH", "HOME", "TMPDIR", "LANG", "TZ", "PYTHONPATH", "LC_CTYPE"}
        assert (found["asked"], found["leader"]) == ("", True)
        # nothing but /dev/null, what it prints into, its channel twice, its own memory; no door of the guardian's
        assert [kind for kind in found["open"] if not kind.startswith("/")] == ["pipe", "pipe", "socket", "socket"]
        # it does not stay there: the folder can be removed
        assert [os.readlink(f"/proc/{pid}/cwd") for pid in mine("sandbox.worker")] == ["/", "/"]


async def test_a_process_serves_one_user_alone(folder: Path) -> None:
    async with pool(folder) as made:
        first = await made.call("remember", value="the token of ann")
        assert (await made.call("who"), await made.call("remembered")) == (first, "the token of ann")
        assert await made.call("remembered", user="bob") is None
        assert await made.call("who", user="bob") != first
        assert await made.call("who") == first


async def test_whose_process_is_idle_for_the_longest_time_gives_way(folder: Path) -> None:
    async with pool(folder) as made:
        ann, bob = [await made.call("remember", user=user, value=user) for user in ("ann", "bob")]
        with contextlib.ExitStack() as stack:
            handle = handles(stack, [ann])[0]
            await made.call("who", user="eve")
            assert await gone(handle)
        assert await made.call("who", user="bob") == bob
        assert await made.call("remembered") is None


async def test_a_user_who_comes_first_finds_a_process_ready(folder: Path) -> None:
    async with pool(folder, preload=[FUNCTIONS]) as made:
        await made.workers.start()
        for user in ("ann", "bob", "eve"):
            ready = mine("sandbox.worker")
            assert await made.call("who", user=user) in ready


async def test_users_who_come_at_once_find_a_process_ready_each(folder: Path) -> None:
    async with pool(folder, preload=[FUNCTIONS], spares=2) as made:
        await made.workers.start()
        # one after the other
        assert len(mine("sandbox.worker")) == 1
        ready = await so_many(2)
        assert {await call for call in asyncio.as_completed([made.call("who", user=user) for user in ("ann", "bob")])} == ready
        assert await so_many(4) > ready
        assert await made.call("who", user="ann") in ready


async def so_many(processes: int) -> set[int]:
    """The worker processes, when there are so many."""
    async with asyncio.timeout(20):
        while len(found := mine("sandbox.worker")) < processes:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    return set(found)


async def test_nothing_is_started_before_it_is_needed(folder: Path) -> None:
    async with pool(folder) as made:
        await made.workers.start()
        assert mine("sandbox.worker") == mine("watch.py") == []


async def test_an_error_tells_what_it_may(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with pool(folder) as made:
        pid = await made.call("who")
        with pytest.raises(errors.ToolFailed, match=r"^fails failed with ValueError\.$"):
            await made.call("fails", words="the words of ann")
        with pytest.raises(errors.InvalidPayload, match=r"Line 3: no number\.") as caught:
            await made.call("refuses")
        assert caught.value.details == {"field": "file", "line": "3"}
        for name, said in (
            ("leaves", "failed with SystemExit"),
            ("unwritable", "cannot be written as JSON"),
            ("missing", "failed with AttributeError"),
        ):
            with pytest.raises(errors.ToolFailed, match=said):
                await made.call(name)
        with pytest.raises(errors.ToolFailed, match=f"a result may have at most {frames.MAX_BYTES}"):
            await made.call("text", size=frames.MAX_BYTES)
        with pytest.raises(errors.InvalidPayload, match="arguments cannot be written"):
            await made.call("echo", value={1})
        # none of them costs the process
        assert await made.call("who") == pid
    written = capsys.readouterr()
    assert "functions.py" in written.out
    assert "the words of ann" not in written.out + written.err


async def test_a_process_that_dies_says_how(folder: Path) -> None:
    async with pool(folder) as made:
        for number, said in ((-signal.SIGSEGV, "was killed by SIGSEGV"), (7, "ended with exit code 7")):
            with pytest.raises(errors.ToolFailed, match=f"The worker process of breaks {said}"):
                await made.call("breaks", number=int(number))
        running = asyncio.get_running_loop().create_task(caught(made.call("hang")))
        leader, child = await pids(folder)
        os.kill(leader, signal.SIGKILL)
        assert "SIGKILL" in str(await running)
        assert ended(child)
        assert await made.call("echo", value=1) == 1


@pytest.mark.parametrize("function", ["hang", "stuck"])
def test_at_its_deadline_a_call_and_its_group_are_gone(folder: Path, go: Any, function: str) -> None:
    async def scenario() -> None:
        async with pool(folder) as made, asyncio.TaskGroup() as group:
            await made.call("who")
            running = group.create_task(caught(made.call(function, timeout_s=1.0)))
            both = await pids(folder)
            assert [ended(pid) for pid in both] == [False, False]
            error = await running
            assert [ended(pid) for pid in both] == [True, True]
            assert isinstance(error, errors.DeadlineExceeded)
            assert str(error) == f"{function} did not finish within 1 s."

    go(scenario())


def test_a_cancel_comes_back_when_the_whole_group_is_gone(folder: Path, go: Any) -> None:
    async def scenario() -> None:
        async with pool(folder) as made, asyncio.TaskGroup() as group:
            running = group.create_task(caught(made.call("stuck")))
            both = await pids(folder)
            running.cancel()
            running.cancel()
            assert isinstance(await running, asyncio.CancelledError)
            assert [ended(pid) for pid in both] == [True, True]
            assert await made.call("echo", value=1) == 1

    go(scenario())


def test_a_cancel_at_any_moment_leaves_nothing(folder: Path, go: Any) -> None:
    async def scenario() -> None:
        async with pool(folder, places=1) as made:
            for turns in (1, 2, 3, 5, 9):
                async with asyncio.TaskGroup() as group:
                    running = group.create_task(caught(made.call("echo", value=1)))
                    for _ in range(turns):
                        await asyncio.sleep(0)
                    running.cancel()
                # the place is free again
                assert await made.call("echo", value=turns) == turns

    go(scenario())


async def test_a_hung_call_delays_no_other(folder: Path) -> None:
    async with pool(folder) as made, asyncio.TaskGroup() as group:
        hung = group.create_task(caught(made.call("stuck")))
        await pids(folder)
        for number in range(50):
            assert await made.call("echo", user="bob", value=number) == number
        assert not hung.done()
        hung.cancel()


async def test_one_user_never_takes_all_places(folder: Path) -> None:
    async with pool(folder) as made, asyncio.TaskGroup() as group:
        hung = group.create_task(caught(made.call("hang")))
        await pids(folder)
        waiting = group.create_task(made.call("echo", value="next"))
        with pytest.raises(errors.DeadlineExceeded, match="other calls took all worker processes"):
            await made.call("echo", value=1, timeout_s=0.01)
        assert await made.call("echo", user="bob", value="free") == "free"
        assert not waiting.done()
        hung.cancel()
        assert await waiting == "next"


async def test_who_has_fewest_calls_is_next(folder: Path) -> None:
    order: list[str] = []

    async def called(user: str) -> None:
        await made.call("echo", user=user, value=1)
        order.append(user)

    async with pool(folder, places=3) as made, asyncio.TaskGroup() as group:
        hung = []
        for user in ("ann", "ann", "bob"):
            hung.append(group.create_task(caught(made.call("hang", user=user))))
            await pids(folder)
        # ann asked before eve, and has one place still when the other is free
        waiting = [group.create_task(called(user)) for user in ("ann", "eve")]
        await asyncio.sleep(0)
        hung[0].cancel()
        await asyncio.wait(waiting)
        assert order == ["eve", "ann"]
        for task in hung:
            task.cancel()


async def test_what_a_call_leaves_behind_is_ended_before_its_result_is_told(folder: Path) -> None:
    async with pool(folder) as made:
        pid = await made.call("who")
        left = await made.call("orphan")
        assert len(left) == 2
        assert [ended(process) for process in [*left, pid]] == [True] * 3


async def test_a_process_is_replaced_when_it_has_served_long_or_grown_large(folder: Path) -> None:
    async with pool(folder, calls=2) as made:
        first, second, third = [await made.call("who") for _ in range(3)]
        assert (first == second, second == third, ended(first)) == (True, False, True)
    async with pool(folder, resident=128 * MIB) as made:
        small = await made.call("who")
        assert await made.call("grow", size=MIB) == small
        assert await made.call("grow", size=256 * MIB) == small
        assert ended(small)
        assert await made.call("who") != small


async def test_a_process_that_nobody_needs_is_ended(folder: Path) -> None:
    async with pool(folder, idle_s=0.05) as made:
        pid = await made.call("who")
        with contextlib.ExitStack() as stack, contextlib.suppress(ProcessLookupError):
            assert await gone(handles(stack, [pid])[0])
        assert await made.call("who") != pid


async def test_memory_can_be_limited(folder: Path) -> None:
    async with pool(folder, memory=512 * MIB) as made:
        with pytest.raises(errors.ResourceExhausted) as caught:
            await made.call("grow", size=1024 * MIB)
        assert caught.value.details == {"limit": "memory"}
        assert await made.call("echo", value=1) == 1


async def test_what_a_function_prints_goes_to_the_log_and_not_for_ever(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with pool(folder) as made:
        assert await made.call("prints", count=50_000) == "done"
        assert await made.call("echo", value=1) == 1
    written = capsys.readouterr().out
    assert written.count("a worker process said something") == 1
    assert "the last words" in written
    assert "line 49999" in written
    assert len(written) < 8192


def test_what_is_large_comes_whole(folder: Path, go: Any) -> None:
    async def scenario() -> None:
        async with pool(folder) as made:
            size = {"size": frames.MAX_BYTES - 2}
            found = await made.workers.text(FUNCTIONS, "text", size, user="ann", timeout_s=60, folder=folder)
            assert found == b'"%b"' % (b"x" * size["size"])
            text = "é" * (MIB // 2)
            assert await made.call("echo", value=text) == text
            assert await made.call("rows", count=8_000) == functions.rows(8_000)

    go(scenario())


async def test_a_close_ends_every_call(folder: Path) -> None:
    async with pool(folder, places=3) as made, asyncio.TaskGroup() as group:
        running = group.create_task(caught(made.call("stuck")))
        both = await pids(folder)
        waiting = [group.create_task(caught(made.call("hang"))) for _ in range(2)]
        await pids(folder)
        await made.workers.close()
        assert [ended(pid) for pid in both] == [True, True]
        assert {type(await task) for task in (running, *waiting)} == {errors.Unavailable}
        assert isinstance(await caught(made.call("who")), errors.Unavailable)


@contextlib.asynccontextmanager
async def owner(folder: Path, backend: str) -> AsyncIterator[tuple[subprocess.Popen[str], list[int]]]:
    """A dispatcher with a call that hangs, and something to wait for the end of its processes with."""
    command = [sys.executable, "-c", OWNER, backend, str(folder)]
    started = await asyncio.to_thread(subprocess.Popen, command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    both = await pids(folder)
    with contextlib.ExitStack() as stack, started:
        try:
            yield started, handles(stack, both)
        finally:
            started.kill()
            for pid in both:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("backend", ["worker", "process"])
async def test_when_its_dispatcher_dies_the_whole_group_ends(folder: Path, backend: str) -> None:
    async with owner(folder, backend) as (dispatcher, both):
        dispatcher.kill()
        assert [await gone(handle) for handle in both] == [True, True]


@pytest.mark.parametrize("backend", ["worker", "process"])
async def test_when_its_dispatcher_is_stopped_the_whole_group_ends(folder: Path, backend: str) -> None:
    async with owner(folder, backend) as (dispatcher, both):
        dispatcher.send_signal(signal.SIGSTOP)
        assert [await gone(handle) for handle in both] == [True, True]
        # it is not that the dispatcher did it
        assert state(dispatcher.pid) == "T"
        dispatcher.send_signal(signal.SIGCONT)
        said, _ = await asyncio.to_thread(dispatcher.communicate, timeout=60)
        assert "was killed by SIGKILL" in said
        assert "this process was stopped or held up" in said
        assert said.splitlines()[-1] == "again"


async def test_without_its_guardian_no_call_goes_on(folder: Path) -> None:
    async with pool(folder) as made:
        running = asyncio.get_running_loop().create_task(caught(made.call("hang")))
        both = await pids(folder)
        for pid in mine("watch.py"):
            os.kill(pid, signal.SIGKILL)
        assert "SIGKILL" in str(await running)
        assert [ended(pid) for pid in both] == [True, True]
        # a new one is there with the next
        assert await made.call("echo", value=1) == 1
        assert len(mine("watch.py")) == 1


async def test_a_worker_is_started_without_a_copy_of_its_dispatcher(folder: Path) -> None:
    command = [sys.executable, "-c", FORKED, str(folder)]
    done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("whole\n", 0), done.stderr
