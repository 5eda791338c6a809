"""The tier `python` under attack, as every user that it may run as, and what it does to calls that must end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import orjson
import pytest

from chassis import lifecycle
from netra import errors
from services.dispatcher.tools.sandbox.python import Python
from services.dispatcher.tools.sandbox.tiers import Job, Limits
from tests.fixtures import sandboxes
from tests.prove.sandbox import python_attacks
from tests.prove.sandbox.stage import Stage

_ROOT = Path(__file__).resolve().parents[2]
# what is named by the mark, and would run for ever
_FOR_EVER = "import ctypes, threading\nctypes.CDLL(None).prctl(15, mark.encode(), 0, 0, 0)\nwhile True:\n    pass"
_PATIENCE_S = 30.0


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage() as made:
        yield made


@pytest.fixture
async def tier(stage: Stage) -> AsyncIterator[Python]:
    made = Python(stage.folders, heartbeat_s=10.0)
    await made.start()
    yield made
    await made.close()


def _job(stage: Stage, code: str, **limits: float) -> Job:
    wanted = Limits(**{"wall_s": _PATIENCE_S, **limits})  # type: ignore[arg-type]
    return Job(stage.folder(), wanted, code=code, arguments=orjson.dumps(stage.facts))


def _tasks() -> lifecycle.Tasks:
    return lifecycle.Tasks(on_failure=lambda _error: None)  # how a call ends is asked of it


async def _seen(stage: Stage, count: int = 1) -> float:
    """Returns when there are so many processes with the stage's mark: at what time of the monotonic clock."""
    async with asyncio.timeout(_PATIENCE_S):
        while len(stage.survivors()) != count:  # noqa: ASYNC110  # nobody is told of changes of the process table
            await asyncio.sleep(0.005)
    return time.monotonic()


def test_the_attacks_are_many_and_of_every_kind() -> None:
    attacks = python_attacks.ATTACKS
    assert len({attack.name for attack in attacks}) == len(attacks) >= 60
    assert {attack.family for attack in attacks} >= {
        "files", "workspaces", "memory of others", "environment", "proc", "signals", "ptrace", "tcp", "udp", "dns", "sockets", "fork",
        "threads", "memory", "cpu", "disk", "inodes", "output", "descriptors", "namespaces", "io_uring", "links", "daemons",
    }  # fmt: skip


@pytest.mark.parametrize("user", [(), ("--nobody",), ("--nobody", "--without-namespaces")], ids=["as it is", "nobody", "nobody, bare"])
async def test_no_attack_of_any_family_escapes(user: tuple[str, ...]) -> None:
    """A part of `make prove-sandbox`, which makes them all."""
    report = await sandboxes.attacked("python", "--each-family", *user)
    assert report["passed"], report
    assert report["available"]
    assert report["attacks"] == report["families"] >= 20
    assert report["enforcement"]["tier"] == "python"
    assert report["user"] != 0 or not user


async def test_one_that_is_over_its_time_is_gone_within_a_quarter_of_a_second(stage: Stage, tier: Python) -> None:
    late = []
    for _ in range(3):
        began = time.monotonic()
        with pytest.raises(errors.DeadlineExceeded):
            await tier.run(_job(stage, _FOR_EVER, wall_s=0.5))
        late.append(time.monotonic() - began - 0.5)
        assert not stage.survivors()
    assert min(late) < 0.25  # the machine may be busy, the sandbox may not


async def test_one_that_is_cancelled_is_gone_when_the_cancel_is_raised(stage: Stage, tier: Python) -> None:
    late, tasks = [], _tasks()
    for _ in range(3):
        running = tasks.spawn(tier.run(_job(stage, _FOR_EVER)), name="a call")
        began = await _seen(stage)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not stage.survivors()
        late.append(time.monotonic() - began)
    assert min(late) < 0.25


async def test_one_that_waits_for_its_turn_can_be_cancelled_and_be_late(stage: Stage) -> None:
    tier, tasks = Python(stage.folders, concurrency=1), _tasks()
    try:
        running = tasks.spawn(tier.run(_job(stage, _FOR_EVER)), name="a call")
        await _seen(stage)
        with pytest.raises(errors.DeadlineExceeded):
            await tier.run(_job(stage, "1", wall_s=0.05))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert (await tier.run(_job(stage, "1"))).result == b"1"
    finally:
        await tier.close()


async def test_nothing_is_left_for_the_next_user(stage: Stage, tier: Python) -> None:
    leave = (
        "import builtins, json, os, sys, tempfile\nbuiltins.left = sys.left = json.left = token\nos.environ['LEFT'] = token\n"
        "open('left.txt', 'w').write(token)\ntempfile.NamedTemporaryFile(delete=False, dir='.').write(token.encode())\nprint(token)\n1"
    )
    find = (
        "import builtins, json, os, sys\n"
        "[hasattr(builtins, 'left'), hasattr(sys, 'left'), hasattr(json, 'left'), bool(os.environ), bool(os.listdir('.')),\n"
        " 'token' in globals()]"
    )
    token = orjson.dumps({"token": "hidden-0123456789abcdef"})
    first = Job(stage.folder(), Limits(_PATIENCE_S), code=leave, arguments=token, environment={"SECRET": "hidden-1"})
    assert (await tier.run(first)).output.startswith("hidden-")
    ended = await tier.run(Job(stage.folder(), Limits(_PATIENCE_S), code=find))
    assert orjson.loads(ended.result) == [False] * 6


async def test_the_zygote_has_read_no_request(stage: Stage) -> None:
    """Not even in the leavings of its memory: whatever a later call reads of what it inherited, it is of nobody."""
    tier = Python(stage.folders, namespaces=None if os.getuid() == 0 else False)
    try:
        token = f"hidden-{os.urandom(12).hex()}"
        job = Job(
            stage.folder("seen-by-the-zygote"), Limits(_PATIENCE_S), code=f"'{token}'", arguments=orjson.dumps({"a": token}),
            environment={"A": token},
        )  # fmt: skip
        assert token in (await tier.run(job)).result.decode()
        found = {word for zygote in _zygotes() for word in _in_memory(zygote, [token.encode(), b"seen-by-the-zygote", b"first_uid"])}
        assert b"first_uid" in found  # it is looked for in the right place
        assert token.encode() not in found
    finally:
        await tier.close()


def _zygotes(owner: int | None = None) -> list[int]:
    """The processes of the zygotes that a process started, this one if none is named, in the order of their birth."""
    found, zygotes = [owner or os.getpid()], []
    for parent in found:
        with contextlib.suppress(OSError):
            for tasks in Path(f"/proc/{parent}/task").glob("*/children"):
                found += [int(child) for child in tasks.read_text().split()]
            # a call has the command line, too, but those here have a name of their own
            name, command = (Path(f"/proc/{parent}/{what}").read_bytes() for what in ("comm", "cmdline"))
            if b"sandbox.zygote" in command and name.startswith(b"python"):
                zygotes.append(parent)
    return zygotes


def _parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def _in_memory(pid: int, words: list[bytes]) -> set[bytes]:
    found: set[bytes] = set()
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            place = re.match(r"([0-9a-f]+)-([0-9a-f]+) rw", line)
            if place is None:
                continue
            first, end = (int(number, 16) for number in place.groups())
            with contextlib.suppress(OSError):
                memory.seek(first)
                text = memory.read(end - first)
                found |= {word for word in words if word in text}
    return found


# three streams, the door, the rules
_HELD = {"0", "1", "2", "100", "101"}


async def _waiting(other_than: list[int]) -> list[int]:
    """The processes that wait for a call, when there are two other ones and none holds more than it should."""
    async with asyncio.timeout(_PATIENCE_S):
        while True:
            with contextlib.suppress(OSError):  # one of them ended meanwhile
                parents = {pid: _parent(pid) for pid in _zygotes()}
                found = [pid for pid, parent in parents.items() if parent in parents and pid not in parents.values()]
                held = [set(os.listdir(f"/proc/{pid}/fd")) for pid in found]
                if len(found) >= 2 and all(each == _HELD for each in held) and not set(found) & set(other_than):
                    return found
            await asyncio.sleep(0.005)


async def test_what_waits_for_a_call_holds_nothing_of_another(stage: Stage, tier: Python) -> None:
    tasks = _tasks()
    running = [tasks.spawn(tier.run(_job(stage, _FOR_EVER)), name="a call") for _ in range(3)]
    await _seen(stage, len(running))
    assert await _waiting([])
    for call in running:
        call.cancel()
    await asyncio.wait(running)


async def test_what_is_killed_while_it_waits_for_a_call_is_replaced(stage: Stage, tier: Python) -> None:
    assert (await tier.run(_job(stage, "1"))).result == b"1"
    killed = await _waiting([])
    for spare in killed:
        os.kill(spare, signal.SIGKILL)
    await _waiting(other_than=killed)
    assert (await tier.run(_job(stage, "2"))).result == b"2"


async def test_in_namespaces_nothing_else_of_the_machine_is_even_there(stage: Stage, tier: Python) -> None:
    names = ["secret_file", "other_folder", "outside_folder", "'/proc'", "'/sys'", "'/etc/passwd'", "'/dev/shm'"]
    there = json.loads((await tier.run(_job(stage, f"import os\n[os.path.exists(name) for name in ({', '.join(names)})]"))).result)
    apart = (await tier.probe()).facts["namespaces"]
    assert there == [False] * len(names) if apart else any(there)


async def test_a_zygote_that_is_killed_is_started_again_and_its_calls_say_so(stage: Stage, tier: Python) -> None:
    tasks = _tasks()
    running = tasks.spawn(tier.run(_job(stage, _FOR_EVER)), name="a call")
    await _seen(stage)
    (call,) = stage.survivors()
    forked_by = _parent(call)
    assert forked_by in _zygotes()
    os.kill(forked_by, signal.SIGKILL)
    with pytest.raises(errors.ToolFailed, match="ended"):
        await running
    assert not stage.survivors()
    assert (await tier.run(_job(stage, "1"))).result == b"1"


async def test_the_zygote_holds_nothing_of_ours_but_itself(stage: Stage, tier: Python) -> None:
    ours = "{'netra', 'chassis', 'grpc', 'orjson', 'pydantic', 'asyncio'}"
    code = f"import sys\nsorted({{name.partition('.')[0] for name in sys.modules}} & {ours})"
    assert (await tier.run(_job(stage, code))).result == b"[]"


async def test_a_zygote_that_hangs_is_given_up(stage: Stage) -> None:
    tier, tasks = Python(stage.folders, heartbeat_s=1.0), _tasks()
    try:
        running = tasks.spawn(tier.run(_job(stage, _FOR_EVER)), name="a call")
        await _seen(stage)
        for zygote in _zygotes():
            os.kill(zygote, signal.SIGSTOP)
        with pytest.raises(errors.ToolFailed, match="ended"):
            await running
        assert not stage.survivors()
        assert (await tier.run(_job(stage, "1"))).result == b"1"
    finally:
        await tier.close()


_DISPATCHER = """
import asyncio, json, sys
from pathlib import Path
from tests.prove.sandbox import nobody
asked = json.loads(sys.argv[1])
if asked["bare"]:
    nobody.become()
from netra import errors
from services.dispatcher.tools.sandbox.python import Python
from services.dispatcher.tools.sandbox.tiers import Job, Limits
async def main():
    tier = Python(Path(asked["folders"]), heartbeat_s=1.0, namespaces=False if asked["bare"] else None)
    job = Job(Path(asked["folder"]), Limits(60.0, cpu_s=60.0), code=asked["code"], arguments=json.dumps({"mark": asked["mark"]}).encode())
    try:
        await tier.run(job)
    except errors.NetraError as error:
        print(error.code, error.message, flush=True)
    print((await tier.run(Job(job.folder, Limits(60.0), code="1"))).result.decode())
    await tier.close()
asyncio.run(main())
"""


@pytest.fixture(params=[False, True], ids=["as it is", "nobody, bare"])
def dispatcher(stage: Stage, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[bytes]]:
    asked = {"folders": str(stage.folders), "folder": str(stage.folder()), "mark": stage.facts["mark"], "code": _FOR_EVER}
    asked |= {"bare": request.param}
    started = subprocess.Popen([sys.executable, "-c", _DISPATCHER, json.dumps(asked)], cwd=_ROOT, stdout=subprocess.PIPE)
    yield started
    started.kill()
    started.communicate()


async def test_when_the_dispatcher_stands_still_its_calls_are_killed(stage: Stage, dispatcher: subprocess.Popen[bytes]) -> None:
    # the mark is in the fake dispatcher's own command line, too
    await _seen(stage, 2)
    dispatcher.send_signal(signal.SIGSTOP)
    await _seen(stage, 1)
    dispatcher.send_signal(signal.SIGCONT)
    said = (await asyncio.to_thread(dispatcher.communicate, timeout=_PATIENCE_S))[0].decode()
    assert said.startswith("TOOL_FAILED")
    assert "stood still" in said
    assert said.splitlines()[-1] == "1"  # and it can go on


async def test_when_the_dispatcher_is_killed_nothing_of_it_is_left(stage: Stage, dispatcher: subprocess.Popen[bytes]) -> None:
    await _seen(stage, 2)
    zygotes = _zygotes(dispatcher.pid)
    assert zygotes
    dispatcher.kill()
    await asyncio.to_thread(dispatcher.wait, _PATIENCE_S)
    await _seen(stage, 0)
    async with asyncio.timeout(_PATIENCE_S):
        while any(_lives(pid) for pid in zygotes):  # noqa: ASYNC110
            await asyncio.sleep(0.005)


def _lives(pid: int) -> bool:
    """Whether a process has not ended: one that has is listed until somebody asks for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
