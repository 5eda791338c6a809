"""Worker processes: what they are given and answer, and that they end when they have to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import uvloop

from netra import errors
from services.dispatcher.tools.sandbox import process
from tests.fixtures.worker import ended

WORKER = "tests.fixtures.worker"
ROOT = Path(__file__).resolve().parents[3]
# a dispatcher that is only there to be killed
OWNER = f"""
import pathlib, sys
import uvloop
from services.dispatcher.tools.sandbox import process
uvloop.run(process.run({WORKER!r}, {{"do": "hang"}}, cwd=pathlib.Path(sys.argv[1])))
"""
# in a copy of the dispatcher by fork, gRPC's threads would crash: its handlers of forks run there, as this one would
FORKED = f"""
import os, pathlib, sys
import uvloop
from services.dispatcher.tools.sandbox import process
os.register_at_fork(after_in_child=lambda: os._exit(77))
print(uvloop.run(process.run({WORKER!r}, {{"echo": "whole"}}, cwd=pathlib.Path(sys.argv[1]))))
"""


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def go(request: pytest.FixtureRequest) -> Any:
    """Runs a coroutine: services run on uvloop, and both loops start and await processes in ways of their own."""
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with the pipe that a worker announces itself in."""
    os.mkfifo(tmp_path / "ready")
    return tmp_path


async def run(folder: Path, **request: Any) -> Any:
    """What the worker of the tests answers."""
    return await process.run(WORKER, request, cwd=folder)


async def pids(folder: Path) -> list[int]:
    """The processes that hang, once they do."""
    text = await asyncio.wait_for(asyncio.to_thread((folder / "ready").read_text), 20)
    return [int(pid) for pid in text.split()]


def here(folder: Path) -> list[int]:
    """The processes that work in a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            found += [int(entry.name)] if (entry / "cwd").resolve() == folder and not ended(int(entry.name)) else []
    return found


async def test_an_answer_is_returned(folder: Path) -> None:
    assert await run(folder, echo={"words": ["é", 1, None]}) == {"words": ["é", 1, None]}


async def test_nothing_of_the_dispatcher_is_handed_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRA_SECRETS_DIR", "/somewhere")
    found = await run(folder, do="surroundings")
    allowed = {"PATH", "HOME", "TMPDIR", "LANG", "TZ", "PYTHONPATH", "LC_CTYPE"}
    assert set(found["environment"]) <= allowed
    assert found["folder"] == found["environment"]["HOME"] == found["environment"]["TMPDIR"] == str(folder)
    assert found["leader"]


async def test_what_lies_in_its_folder_is_never_imported(folder: Path) -> None:
    (folder / "json.py").write_text("raise SystemExit(7)")
    assert await run(folder, echo=1) == 1
    assert str(folder) not in (await run(folder, do="surroundings"))["imports_from"]


async def test_its_error_is_raised_as_it_is(folder: Path) -> None:
    problem = {"code": "INVALID_PAYLOAD", "message": "Line 3: no number.", "details": {"line": 3, "column": "tokens", "field": "file"}}
    with pytest.raises(errors.InvalidPayload, match=r"Line 3: no number\.") as caught:
        await run(folder, error=problem)
    assert caught.value.details == {"line": "3", "column": "tokens", "field": "file"}


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("exhausted", "killed by SIGKILL before it answered; when nobody stopped it, it took more memory than there is"),
        ("broken", "ended with exit code 1 and without an answer"),
        ("silent", "ended without an answer"),
        ("prattling", "ended without an answer"),
        ("endless", "answered with more than"),
    ],
)
async def test_an_end_without_an_answer_says_how_it_ended(folder: Path, what: str, said: str) -> None:
    with pytest.raises(errors.ToolFailed, match=said) as caught:
        await run(folder, do=what)
    assert "operator" not in caught.value.message


def test_a_worker_that_somebody_kills_is_an_error(folder: Path, go: Any) -> None:
    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(_caught(run(folder, do="hang")))
            worker, child = await pids(folder)
            os.kill(worker, signal.SIGKILL)
        assert isinstance(running.result(), errors.ToolFailed)
        assert "SIGKILL" in str(running.result())
        assert ended(child)

    go(scenario())


async def _caught(work: Any) -> BaseException | None:
    try:
        await work
    except (errors.NetraError, asyncio.CancelledError) as error:
        return error
    return None


def test_a_cancel_comes_back_when_the_whole_group_is_gone(folder: Path, go: Any) -> None:
    async def scenario() -> None:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(_caught(run(folder, do="hang")))
            both = await pids(folder)
            assert [ended(pid) for pid in both] == [False, False]
            running.cancel()
            running.cancel()
            assert isinstance(await running, asyncio.CancelledError)
            assert [ended(pid) for pid in both] == [True, True]

    go(scenario())


def test_a_cancel_at_any_moment_leaves_nothing(folder: Path, go: Any) -> None:
    async def scenario() -> None:
        for turns in range(1, 61, 3):
            async with asyncio.TaskGroup() as group:
                running = group.create_task(_caught(run(folder, do="surroundings")))
                for _ in range(turns):
                    await asyncio.sleep(0)
                running.cancel()
            assert here(folder) == []

    go(scenario())


def test_what_a_worker_leaves_behind_ends_with_it(folder: Path, go: Any) -> None:
    async def scenario() -> None:
        async with asyncio.timeout(20):
            assert ended(await run(folder, do="orphan"))

    go(scenario())


async def test_a_worker_ends_with_its_dispatcher(folder: Path) -> None:
    owner = await asyncio.to_thread(subprocess.Popen, [sys.executable, "-c", OWNER, str(folder)], cwd=ROOT)
    worker, child = await pids(folder)
    try:
        handle = os.pidfd_open(worker)
        owner.kill()
        watch = select.poll()
        watch.register(handle, select.POLLIN)
        assert await asyncio.to_thread(watch.poll, 20_000) != []
        os.close(handle)
    finally:
        owner.wait()
        os.kill(child, signal.SIGKILL)


async def test_a_worker_is_started_without_a_copy_of_its_dispatcher(folder: Path) -> None:
    command = [sys.executable, "-c", FORKED, str(folder)]
    done = await asyncio.to_thread(subprocess.run, command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.returncode) == ("whole\n", 0), done.stderr


def test_where_there_are_no_handles_of_processes_their_end_is_seen_too(folder: Path, go: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    assert go(run(folder, echo=1)) == 1
