"""The tier `command`: full containment where the machine has it, full refusal where not; a run says which."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from chassis import lifecycle
from netra import errors
from services.dispatcher.tools.sandbox import bubblewrap, tiers
from services.dispatcher.tools.sandbox.command import Command
from services.dispatcher.tools.sandbox.guardian import Guardian
from tests.fixtures import sandboxes
from tests.prove.sandbox import command_attacks

_ROOT = Path(__file__).resolve().parents[2]
# an owner of a command that comes to its end, or is stopped, at one place of the start, and nowhere else
_OWNER = """
import asyncio, os, pathlib, signal, sys, time
from netra import errors
from services.dispatcher.tools.sandbox import bubblewrap
from services.dispatcher.tools.sandbox.command import Command
from services.dispatcher.tools.sandbox.guardian import Guardian
from tests.fixtures import sandboxes

where, how, folder, mark, pipe = sys.argv[1:]
guardian = Guardian(1.0 if how == "stopped" else 60.0)
holder, name, after = {
    "its start": (bubblewrap.Launcher, "_popen", True),
    "the news of its namespace": (bubblewrap.Call, "born", False),
    "the last moment": (bubblewrap.Call, "begin", False),
    "its beginning": (bubblewrap.Call, "begin", True),
}[where]
whole, options = getattr(holder, name), bubblewrap.Launcher._options

def here(call, group):
    if "held up" in how:
        # as if it were long ago, and what is about to begin the first to find out
        guardian._process.send_signal(signal.SIGSTOP)
        guardian._beat.cancel()
        guardian._beaten_at -= 100
    elif "guardian" in how:
        # what lives on without either of them is waiting for its owner's word, and for nothing else
        while not any(os.path.exists(os.path.join("/proc", str(pid), "root", "sandbox")) for pid in sandboxes.below(group)):
            time.sleep(0.001)
        guardian._process.kill()
        guardian._process.wait()
    while where == "its beginning" and all(os.getpgid(pid) == group for pid in sandboxes.below(group)):
        time.sleep(0.001)
    if "killed" in how:
        # it goes on when its owner is gone for sure
        os.killpg(group, signal.SIGSTOP)
    print(group, flush=True)
    if "held up" not in how:
        os.kill(os.getpid(), signal.SIGSTOP if how == "stopped" else signal.SIGKILL)

def ends(*given):
    if not after:
        here(given[0], given[0].process.pid)
    made = whole(*given)
    if after:
        here(given[0], made.pid if name == "_popen" else given[0].process.pid)
    return made

def fewer(*given):
    return [option for option in options(*given) if option != "--die-with-parent"]

setattr(holder, name, ends)
if "nothing else" in how:
    bubblewrap.Launcher._options = fewer

async def main():
    sandbox = Command(guardian, readable=(pathlib.Path(pipe).parent,))
    await sandbox.start()
    text = f"echo begun >{pipe}; sleep 60; : netra-{mark}"
    try:
        await sandbox.run(sandboxes.job(pathlib.Path(folder), "", "sh", "-c", text))
    except errors.NetraError as error:
        print(type(error).__name__, flush=True)
    guardian._process.send_signal(signal.SIGCONT)
    await sandbox.close()
    await guardian.close()

asyncio.run(main())
"""


def job(folder: Path, *argv: str, **more: Any) -> tiers.Job:
    """A call."""
    return sandboxes.job(folder, "", *argv, **more)


def shell(folder: Path, text: str, **more: Any) -> tiers.Job:
    """A call of the shell."""
    return job(folder, "sh", "-c", text, **more)


@pytest.fixture
async def sandbox(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Command | None]:
    """The tier; None where this machine has none, and it says so."""
    guardian = Guardian(60.0)
    made = Command(guardian, most=4)
    try:
        await made.start()
        found = await made.probe()
        if not found.available:
            assert found.reason
            assert found.remedy
        yield made if found.available else None
    except errors.SandboxUnavailable:
        yield None
    finally:
        await made.close()
        await guardian.close()


async def contained(sandbox: Command | None, folder: Path) -> Command | None:
    """The tier, if it is there; if not, it must refuse everything."""
    if sandbox is not None:
        return sandbox
    guardian = Guardian(60.0)
    other = Command(guardian)
    try:
        await other.start()
        refusal = await sandboxes.refused(other, job(folder, "true"))
    except errors.SandboxUnavailable as error:
        refusal = error
    assert isinstance(refusal, errors.SandboxUnavailable)
    assert refusal.details["remedy"]
    await other.close()
    await guardian.close()
    return None


@pytest.mark.parametrize("user", [(), ("--nobody",)], ids=["as it is", "nobody"])
async def test_attacks_of_each_family_fail_or_are_refused(user: tuple[str, ...], record_property: Callable[[str, object], None]) -> None:
    """A part of `make prove-sandbox`, which makes them all."""
    assert len(command_attacks.ATTACKS) >= 60
    report = await sandboxes.attacked("command", "--each-family", *user)
    record_property("enforcement", json.dumps(report["enforcement"]))
    assert report["passed"], report
    assert report["refused"] is not report["available"]
    assert report["attacks"] == report["families"]
    assert report["attacks"] >= 20 or not report["available"]
    assert report["user"] != 0 or not user


async def test_results_arguments_and_exit_codes(sandbox: Command | None, tmp_path: Path) -> None:
    if (there := await contained(sandbox, tmp_path)) is None:
        return
    assert await there.run(job(tmp_path, "cat", arguments=b'{"x": [1, 2]}')) == tiers.Ended(b'{"x": [1, 2]}')
    assert await there.run(shell(tmp_path, "echo 'no JSON'; echo said >&2")) == tiers.Ended(b'"no JSON\\n"', "said\n")
    assert await there.run(job(tmp_path, "true")) == tiers.Ended(b'""')
    error = await sandboxes.refused(there, shell(tmp_path, "echo out; echo wrong >&2; exit 3"))
    assert isinstance(error, errors.ToolFailed)
    assert error.message.endswith("exit code 3: wrong")
    assert error.details == {"exit_code": "3", "output": "out\nwrong\n"}
    error = await sandboxes.refused(there, job(tmp_path, "no-such-program"))
    assert (type(error), error.details["exit_code"]) == (errors.ToolFailed, "127")
    for wrong in (job(tmp_path, "tr\0ue"), job(tmp_path), job(tmp_path, "env", environment={"A": "b\0--bind\0/\0/out"})):
        assert isinstance(await sandboxes.refused(there, wrong), errors.ToolFailed)


async def test_where_it_runs(sandbox: Command | None, tmp_path: Path) -> None:
    if (there := await contained(sandbox, tmp_path)) is None:
        return
    look = "id -u; pwd; hostname; ls /; env | sort; cat /proc/1/comm"
    said = str(await sandboxes.value(there, shell(tmp_path, look, environment={"TOKEN": "canary"}))).split("\n")
    assert said[:3] == ["65534", "/sandbox", "sandbox"]
    assert not {"home", "root", "var", "mnt", "sys", "srv", "opt"} & set(said)
    assert {line.split("=")[0] for line in said if "=" in line} == {"PATH", "HOME", "TMPDIR", "LANG", "TZ", "PWD", "TOKEN"}
    assert said[-2] == "bwrap"


async def test_files_in_and_out(sandbox: Command | None, tmp_path: Path) -> None:
    if (there := await contained(sandbox, tmp_path)) is None:
        return
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("hello")
    (tmp_path / "gone.txt").write_text("x")
    change = (
        "tr a-z A-Z <sub/a.txt >made.txt; rm gone.txt; mkdir new; echo 1 >new/b; chmod 0 new/b new; ln -s /etc/passwd link; cat sub/a.txt"
    )
    assert await sandboxes.value(there, shell(tmp_path, change)) == "hello"
    assert sandboxes.files(tmp_path) == {"sub/a.txt": "hello", "made.txt": "HELLO", "new/b": "1\n"}
    error = await sandboxes.refused(there, job(tmp_path, "true", disk=4))
    assert error.details["limit"] == "disk"


async def test_what_is_printed_is_bounded(sandbox: Command | None, tmp_path: Path) -> None:
    if (there := await contained(sandbox, tmp_path)) is None:
        return
    ended = await there.run(shell(tmp_path, "head -c 1000000 /dev/zero | tr '\\0' x >&2; echo 1", output=5000))
    assert (ended.result, ended.output, ended.cut) == (b"1", "x" * 5000, True)
    error = await sandboxes.refused(there, shell(tmp_path, "yes", output=5000))
    assert isinstance(error, errors.ResourceExhausted)
    assert error.details["limit"] == "output"


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("while :; do :; done", "cpu_s"),
        ("head -c 5000000 /dev/zero >big", "file_size"),
        ("head -c 60000000 /dev/zero | tail & head -c 60000000 /dev/zero | tail & head -c 60000000 /dev/zero | tail & wait", "memory"),
    ],
)
async def test_limits_are_named(sandbox: Command | None, tmp_path: Path, text: str, limit: str) -> None:
    if (there := await contained(sandbox, tmp_path)) is None:
        return
    error = await sandboxes.refused(there, shell(tmp_path, text, cpu_s=1.0, output=1 << 28))
    assert isinstance(error, errors.ResourceExhausted), error
    assert error.details["limit"] == limit


async def test_what_only_attacks_call_is_a_violation(sandbox: Command | None, tmp_path: Path) -> None:
    if (there := await contained(sandbox, tmp_path)) is None:
        return
    assert isinstance(await sandboxes.refused(there, job(tmp_path, "unshare", "--user", "true")), errors.SecurityViolation)


async def test_a_late_command_is_gone_with_all_that_it_started(sandbox: Command | None, tmp_path: Path) -> None:
    if (there := await contained(sandbox, tmp_path)) is None:
        return
    mark = f"netra-{time.monotonic_ns()}"
    left = f"(trap '' TERM HUP INT; setsid sh -c 'while :; do sleep 60; done' {mark} &) ; echo {mark} >&2; sleep 60"
    error = await sandboxes.refused(there, shell(tmp_path, left, wall_s=1.5))
    assert isinstance(error, errors.DeadlineExceeded)
    await sandboxes.until(lambda: not sandboxes.there(mark), 0.25)


async def test_a_cancelled_command_is_gone_with_all_that_it_started(sandbox: Command | None, tmp_path: Path) -> None:
    if (there := await contained(sandbox, tmp_path)) is None:
        return
    tasks, mark = lifecycle.Tasks(on_failure=lambda _error: None), f"netra-{time.monotonic_ns()}"
    running = tasks.spawn(there.run(shell(tmp_path, f"setsid sh -c 'sleep 60; : {mark}-inner' & sleep 60")), name="command")
    await sandboxes.until(lambda: sandboxes.there(f"-c\0sleep 60; : {mark}-inner"))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await sandboxes.until(lambda: not sandboxes.there(mark), 0.25)


async def test_a_cancel_at_any_moment_leaves_nothing(sandbox: Command | None, tmp_path: Path) -> None:
    if (there := await contained(sandbox, tmp_path)) is None:
        return
    tasks, mark, before = lifecycle.Tasks(on_failure=lambda _error: None), f"netra-{time.monotonic_ns()}", len(os.listdir("/proc/self/fd"))
    for milliseconds in range(0, 60, 4):
        running = tasks.spawn(there.run(shell(tmp_path, f"sleep 60; : {mark}")), name="command")
        await asyncio.wait({running}, timeout=milliseconds / 1000)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    await sandboxes.until(lambda: not sandboxes.there(mark))
    assert len(os.listdir("/proc/self/fd")) <= before
    assert await sandboxes.value(there, shell(tmp_path, "echo 5")) == 5


async def test_nothing_is_left_when_the_tier_is_closed(sandbox: Command | None, tmp_path: Path) -> None:
    if (there := await contained(sandbox, tmp_path)) is None:
        return
    tasks, mark = lifecycle.Tasks(on_failure=lambda _error: None), f"netra-{time.monotonic_ns()}"
    running = tasks.spawn(there.run(shell(tmp_path, f"sleep 60; : {mark}")), name="command")
    await sandboxes.until(lambda: sandboxes.there(mark))
    await there.close()
    assert running.done()
    with pytest.raises(errors.Unavailable):
        await running
    await sandboxes.until(lambda: not sandboxes.there(mark), 0.25)
    assert isinstance(await sandboxes.refused(there, job(tmp_path, "true")), errors.SandboxUnavailable)


async def test_a_command_ends_with_its_owner(sandbox: Command | None, tmp_path: Path) -> None:
    if await contained(sandbox, tmp_path) is None:
        return
    mark = f"netra-{time.monotonic_ns()}"
    program = f"""
import asyncio, pathlib
from tests.fixtures import sandboxes
from services.dispatcher.tools.sandbox.command import Command
async def main():
    async with sandboxes.started(Command) as sandbox:
        print("started", flush=True)
        mark = "-".join(("netra", "{mark[6:]}"))
        await sandbox.run(sandboxes.job(pathlib.Path({str(tmp_path)!r}), "", "sh", "-c", "sleep 60; : " + mark))
asyncio.run(main())
"""
    owner = await asyncio.to_thread(subprocess.Popen, [sys.executable, "-c", program], cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    await sandboxes.until(lambda: sandboxes.there(mark))
    owner.kill()
    owner.communicate()
    await sandboxes.until(lambda: not sandboxes.there(mark))


@pytest.fixture
def pipe() -> Iterator[Path]:
    """A named pipe that a command can write to, and where nothing of it is left."""
    with tempfile.TemporaryDirectory(prefix="netra-test-", dir="/var/tmp") as name:  # /tmp is another folder inside
        (folder := Path(name)).chmod(0o755)
        os.mkfifo(made := folder / "pipe")
        made.chmod(0o666)
        yield made


@pytest.mark.parametrize(
    ("where", "how"),
    [
        ("its start", "killed"),
        ("its start", "stopped"),
        ("the news of its namespace", "killed"),
        ("the news of its namespace", "stopped"),
        ("the news of its namespace", "held up with its guardian"),
        ("the last moment", "killed"),
        ("the last moment", "stopped"),
        ("the last moment", "killed with its guardian, and nothing else ends it"),
        ("its beginning", "killed"),
        ("its beginning", "stopped"),
        ("its beginning", "killed, and nothing else ends it"),
    ],
)
async def test_a_command_never_outlives_an_owner_that_ends_while_it_is_started(
    sandbox: Command | None, tmp_path: Path, pipe: Path, where: str, how: str
) -> None:
    if await contained(sandbox, tmp_path) is None:
        return
    mark = time.monotonic_ns()
    asked = [sys.executable, "-c", _OWNER, where, how, str(tmp_path), str(mark), str(pipe)]
    heard = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    owner = await asyncio.to_thread(subprocess.Popen, asked, cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert owner.stdout is not None
        group = int(await asyncio.to_thread(owner.stdout.readline))
        if how.startswith("killed"):
            assert await asyncio.to_thread(owner.wait) == -signal.SIGKILL
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGCONT)
        # what is just becoming another program has no command line in a single look
        await sandboxes.until(lambda: not any(sandboxes.there(f"netra-{mark}") for _look in range(5)))
        # nobody has it open any more
        begun = os.read(heard, 100)
        assert begun == b"" or where == "its beginning"
        if not how.startswith("killed"):
            owner.send_signal(signal.SIGCONT)
            *_, said = (await asyncio.to_thread(owner.stdout.read)).splitlines()
            assert (said, await asyncio.to_thread(owner.wait)) == ("Unavailable", 0)
            assert os.read(heard, 100) == b""
    finally:
        owner.kill()
        owner.communicate()
        os.close(heard)


async def test_without_bubblewrap_the_tier_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bubblewrap, "_PATH", str(tmp_path))
    guardian = Guardian(60.0)
    sandbox = Command(guardian)
    with pytest.raises(errors.SandboxUnavailable, match="bwrap"):
        await sandbox.start()
    error = await sandboxes.refused(sandbox, job(tmp_path, "true"))
    assert isinstance(error, errors.SandboxUnavailable)
    assert "bubblewrap" in error.details["remedy"]
    found = await sandbox.probe()
    assert not found.available
    with pytest.raises(errors.SandboxUnavailable):
        found.require()
    await sandbox.close()
    await guardian.close()


@pytest.mark.parametrize(
    ("without", "instead", "told"),
    [
        (("--remount-ro", "/dev"), (), "memory that is a disk"),
        (("--unshare-pid",), (), "a process outside"),
        # which reads what it is told to begin by as well, and makes no filter of it
        (("--seccomp",), ("--block-fd",), "no filter"),
        (("--remount-ro", "/"), (), "the root folder"),
        (("--uid", None), (), "not nobody"),
    ],
)
async def test_a_wall_that_is_missing_is_found_out(
    sandbox: Command | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    without: tuple[str | None, ...],
    instead: tuple[str, ...],
    told: str,
) -> None:
    if (there := await contained(sandbox, tmp_path)) is None:
        return
    whole = bubblewrap.Launcher._options

    def weakened(*given: Any) -> list[str]:
        options = whole(*given)
        places = range(len(options) - len(without) + 1)
        at = next(at for at in places if all(one in (None, option) for one, option in zip(without, options[at:], strict=False)))
        return [*options[:at], *instead, *options[at + len(without) :]]

    monkeypatch.setattr(bubblewrap.Launcher, "_options", weakened)
    found = await there.probe()
    assert not found.available
    assert told in found.reason
