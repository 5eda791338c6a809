"""The tier `script`: what a script gets, what it is kept from, and what is left of it."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from chassis import lifecycle
from netra import errors
from services.dispatcher.tools.sandbox import tiers
from services.dispatcher.tools.sandbox.guardian import Guardian
from services.dispatcher.tools.sandbox.script import Script
from tests.fixtures import sandboxes
from tests.prove.sandbox import script_attacks

_ROOT = Path(__file__).resolve().parents[2]


def job(folder: Path, code: str, owner: str = "ann", **more: Any) -> tiers.Job:
    """A call of somebody."""
    return sandboxes.job(folder, code, owner=owner, **more)


def processes(sandbox: Script) -> set[int]:
    """The hosts and interpreters that are there now."""
    template = sandbox._template
    return set() if template is None else sandboxes.below(template._process.pid)


def status(pid: int) -> str:
    """What the kernel says of a process."""
    return Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize("user", [(), ("--nobody",)], ids=["as it is", "nobody"])
async def test_attacks_of_each_family_fail(user: tuple[str, ...]) -> None:
    """A part of `make prove-sandbox`, which makes them all."""
    assert len(script_attacks.ATTACKS) >= 60
    report = await sandboxes.attacked("script", "--each-family", *user)
    assert report["passed"], report
    assert report["available"]
    assert report["attacks"] == report["families"] >= 20
    assert report["user"] != 0 or not user


async def test_the_attacks_get_through_where_there_is_no_sandbox(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("canary")
    for name in ("read", "the environment", "all classes", "fork"):
        attack = next(one for one in script_attacks.ATTACKS if one.name == name)
        code = f"globals().update({ {'secret_file': str(tmp_path / 'secret'), 'canary': 'canary'}!r})\n{attack.code}"
        done = await asyncio.to_thread(
            subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
        )
        assert "ESCAPED" in done.stdout.splitlines(), name


async def test_arguments_results_and_output(tmp_path: Path) -> None:
    async with sandboxes.started(Script) as sandbox:
        given = job(tmp_path, "print(name)\nsum(numbers)", arguments=b'{"name": "x", "numbers": [1, 2.5]}')
        assert await sandbox.run(given) == tiers.Ended(b"3.5", "x\n")
        assert await sandboxes.value(sandbox, job(tmp_path, "result = {'a': [1, None, True]}\n5")) == {"a": [1, None, True]}
        assert await sandboxes.value(sandbox, job(tmp_path, "'a result that is only a word'")) == "a result that is only a word"
        assert await sandboxes.value(sandbox, job(tmp_path, "x = 1")) is None


@pytest.mark.parametrize(
    ("code", "line", "told"),
    [
        ("print('so far')\nx = 1 / 0", 2, "ZeroDivisionError"),
        ("def f():\n    raise ValueError('no')\n\nf()", 2, "ValueError: no"),
        ("x = (", 1, "SyntaxError"),
        ("class A: pass\nA()", 0, "not JSON"),
        ("raise TimeoutError('of its own')", 1, "TimeoutError: of its own"),
    ],
)
async def test_errors_tell_their_line(tmp_path: Path, code: str, line: int, told: str) -> None:
    async with sandboxes.started(Script) as sandbox:
        error = await sandboxes.refused(sandbox, job(tmp_path, code))
        assert isinstance(error, errors.ToolFailed)
        assert told in error.message
        assert error.details["line"] == str(line)
        assert error.details.get("output", "so far\n") == "so far\n"


async def test_what_is_printed_is_cut_and_says_so_and_what_is_returned_is_never_cut(tmp_path: Path) -> None:
    async with sandboxes.started(Script) as sandbox:
        ended = await sandbox.run(job(tmp_path, "print('ä' * 4000)\n1", output=5001))
        assert (ended.result, len(ended.output.encode()), ended.cut) == (b"1", 5000, True)
        exact = await sandbox.run(job(tmp_path, "'a' * 4998", output=5000))
        assert len(exact.result) == 5000
        error = await sandboxes.refused(sandbox, job(tmp_path, "'a' * 4999", output=5000))
        assert isinstance(error, errors.ResourceExhausted)
        assert error.details["limit"] == "output"


@pytest.mark.parametrize(
    ("code", "limit"),
    [
        ("while True: pass", "cpu_s"),
        ("x = []\nwhile True: x.append('a' * 1000)", "memory"),
        ("x = 'a' * 10 ** 12", "memory"),
        # it is small as long as nobody writes it down: whoever does is held as well
        ("x = [1]\nfor _ in range(40): x = [x] * 10\nx", ""),
    ],
    ids=["time", "pieces", "one piece", "a result that grows"],
)
async def test_limits_are_named_and_the_next_call_works(tmp_path: Path, code: str, limit: str) -> None:
    async with sandboxes.started(Script) as sandbox:
        error = await sandboxes.refused(sandbox, job(tmp_path, code, cpu_s=0.3, memory=32 << 20))
        assert isinstance(error, errors.ResourceExhausted if limit else errors.ResourceExhausted | errors.ToolFailed), error
        if limit:
            assert error.details["limit"] == limit
        assert await sandboxes.value(sandbox, job(tmp_path, "1 + 1")) == 2


async def test_a_late_script_is_gone(tmp_path: Path) -> None:
    async with sandboxes.started(Script, spares=0) as sandbox:
        await sandbox.run(job(tmp_path, "1"))
        before = processes(sandbox)
        assert len(before) == 2
        error = await sandboxes.refused(sandbox, job(tmp_path, "while True: pass", wall_s=0.4))
        assert isinstance(error, errors.DeadlineExceeded)
        await sandboxes.until(lambda: sandboxes.gone(before), 0.25)


async def test_a_cancelled_script_is_gone(tmp_path: Path) -> None:
    tasks = lifecycle.Tasks(on_failure=lambda _error: None)
    async with sandboxes.started(Script, spares=0) as sandbox:
        await sandbox.run(job(tmp_path, "1"))
        before = processes(sandbox)
        running = tasks.spawn(sandbox.run(job(tmp_path, "while True: pass")), name="script")
        await sandboxes.until(lambda: not sandbox._waiting)
        await sandboxes.until(lambda: any(sandboxes.computes(pid) for pid in before))
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await sandboxes.until(lambda: sandboxes.gone(before), 0.25)


async def test_an_interpreter_that_dies_takes_nobody_with_it(tmp_path: Path) -> None:
    tasks = lifecycle.Tasks(on_failure=lambda _error: None)
    async with sandboxes.started(Script, spares=0) as sandbox:
        await sandbox.run(job(tmp_path, "1", "ann"))
        await sandbox.run(job(tmp_path, "1", "bob"))
        ann, bob = (sandbox._warm[owner][0] for owner in ("ann", "bob"))
        running = tasks.spawn(sandbox.run(job(tmp_path, "while True: pass", "ann")), name="script")
        await sandboxes.until(lambda: ann not in sandbox._waiting)
        ann.kill()
        with pytest.raises(errors.ToolFailed):
            await running
        assert await sandboxes.value(sandbox, job(tmp_path, "3", "bob")) == 3
        assert sandbox._warm["bob"] == [bob]
        # one that died while it waited is not asked
        bob.kill()
        await bob.gone()
        assert await sandboxes.value(sandbox, job(tmp_path, "4", "bob")) == 4


def held(pid: int) -> list[str]:
    """What a process has open."""
    return [os.readlink(handle) for handle in Path(f"/proc/{pid}/fd").iterdir()]


async def test_when_either_of_its_two_processes_ends_the_call_does_too(tmp_path: Path) -> None:
    tasks = lifecycle.Tasks(on_failure=lambda _error: None)
    async with sandboxes.started(Script, spares=0) as sandbox:
        for victim in (0, 1):
            await sandbox.run(job(tmp_path, "1"))
            both = sorted(processes(sandbox))
            assert len(both) == 2
            # the interpreter, which runs what is foreign, holds nothing that leads to who asks
            assert not [name for name in held(both[1]) if name.startswith("socket:")]
            running = tasks.spawn(sandbox.run(job(tmp_path, "while True: pass", cpu_s=60.0, wall_s=60.0)), name="script")
            await sandboxes.until(lambda: not sandbox._waiting)
            await sandboxes.until(functools.partial(sandboxes.computes, both[1]))
            os.kill(both[victim], signal.SIGKILL)
            with pytest.raises(errors.ToolFailed):
                await running
            await sandboxes.until(functools.partial(sandboxes.gone, set(both)), 0.5)
        assert await sandboxes.value(sandbox, job(tmp_path, "2")) == 2


async def test_the_process_that_hosts_come_from_is_started_again(tmp_path: Path) -> None:
    async with sandboxes.started(Script, spares=0) as sandbox:
        await sandbox.run(job(tmp_path, "1", "ann"))
        template = sandbox._template
        assert template is not None
        template._process.kill()
        template._process.wait()
        error = await sandboxes.refused(sandbox, job(tmp_path, "1", "bob"))
        assert isinstance(error, errors.SandboxUnavailable)
        assert await sandboxes.value(sandbox, job(tmp_path, "2", "bob")) == 2
        assert await sandboxes.value(sandbox, job(tmp_path, "3", "ann")) == 3


async def test_no_two_owners_share_a_host_and_nobody_keeps_one(tmp_path: Path) -> None:
    async with sandboxes.started(Script, spares=1, most=4) as sandbox:
        await asyncio.gather(*(sandbox.run(job(tmp_path, "1", owner)) for _ in range(3) for owner in ("ann", "bob", "")))
        warm = {owner: {host.group for host in found} for owner, found in sandbox._warm.items()}
        assert set(warm) == {"ann", "bob"}
        assert not warm["ann"] & warm["bob"]
        assert not {host.group for host in sandbox._spares} & (warm["ann"] | warm["bob"])
        uids = [host.uid for host in sandbox._hosts if host.uid is not None]
        assert len(uids) == len(set(uids))


async def test_walls_stand_around_host_and_interpreter(tmp_path: Path) -> None:
    async with sandboxes.started(Script, spares=0) as sandbox:
        await sandbox.run(job(tmp_path, "1"))
        both = processes(sandbox)
        assert len(both) == 2
        for pid in both:
            told = status(pid)
            assert "Seccomp:\t2" in told
            assert "NoNewPrivs:\t1" in told
            assert "CapEff:\t0000000000000000" in told
            assert os.getuid() != 0 or "Uid:\t0" not in told


async def test_the_walls_hold_what_the_interpreter_does_not(tmp_path: Path) -> None:
    """What native code in the place of the interpreter could do: everything before the walls stand, nothing after."""
    (secret := tmp_path / "secret").write_text("x")
    (tmp_path / "secret.binary").write_text("x")
    program = """
import json, os, socket, subprocess, sys
from services.dispatcher.tools.sandbox import filters, interpreter, walls
secret, outside = sys.argv[1], int(sys.argv[2])
def connect():
    socket.socket(socket.AF_UNIX).close()
attacks = {
    "read": lambda: open(secret).read(), "list": lambda: os.listdir("/"), "processes": lambda: open(f"/proc/{outside}/environ").read(),
    "write": lambda: open(secret, "a").write("x"), "create": lambda: open(secret + "2", "w"), "delete": lambda: os.unlink(secret + "2"),
    "start": lambda: subprocess.run(["/bin/true"], check=True), "socket": connect, "signal": lambda: os.kill(outside, 0),
}
def through():
    found = []
    for name, attack in attacks.items():
        try:
            attack()
            found.append(name)
        except OSError:
            pass
    return found
before = through()
facts = interpreter._confined(
    os.open(secret + ".binary", os.O_PATH), None, filters.compiled(sockets=False, signals=walls.landlock_abi() >= 6)
)
print(json.dumps([sorted(before) == sorted(attacks), facts["landlock"], through()]))
"""
    asked = [sys.executable, "-c", program, str(secret), str(os.getpid())]
    done = await asyncio.to_thread(subprocess.run, asked, cwd=_ROOT, capture_output=True, text=True, check=False, timeout=60)
    all_before, landlock, after = json.loads(done.stdout)
    assert all_before, done.stderr
    # where the kernel has no Landlock, the tier says so: then the interpreter alone keeps files off
    assert set(after) <= (set() if landlock else {"read", "list", "processes", "write", "create", "delete", "start"})


async def test_hosts_are_retired_and_only_so_many_wait(tmp_path: Path) -> None:
    async with sandboxes.started(Script, spares=0, kept=2, runs=2) as sandbox:
        found = []
        for _ in range(3):
            await sandbox.run(job(tmp_path, "1", "ann"))
            found.append([host.group for host in sandbox._warm.get("ann", [])])
        assert [len(warm) for warm in found] == [1, 0, 1]
        assert found[0] != found[2]
        for owner in "bcd":
            await sandbox.run(job(tmp_path, "1", owner))
        assert set(sandbox._warm) == {"c", "d"}


async def test_a_host_that_waits_long_is_ended(tmp_path: Path) -> None:
    async with sandboxes.started(Script, spares=0, idle_s=0.05) as sandbox:
        await sandbox.run(job(tmp_path, "1"))
        before = processes(sandbox)
        await sandboxes.until(lambda: sandboxes.gone(before))
        await sandboxes.until(lambda: not sandbox._hosts)
        assert not sandbox._waiting


async def test_variables_are_only_those_of_the_call(tmp_path: Path) -> None:
    read = "import os\nos.environ.get('TOKEN', 'none')"
    async with sandboxes.started(Script) as sandbox:
        assert await sandboxes.value(sandbox, job(tmp_path, read, environment={"TOKEN": "canary"})) == "canary"
        assert await sandboxes.value(sandbox, job(tmp_path, read, environment={"OTHER": "x"})) == "none"
        assert await sandboxes.value(sandbox, job(tmp_path, "import os\ndict(os.environ)", environment={"A": "b"})) == {"A": "b"}
        assert isinstance(await sandboxes.refused(sandbox, job(tmp_path, read)), errors.ToolFailed)


async def test_files_can_be_read_and_not_written(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("hello")
    (tmp_path / "link").symlink_to("/etc/passwd")
    async with sandboxes.started(Script) as sandbox:
        assert await sandboxes.value(sandbox, job(tmp_path, "open('sub/a.txt').read()")) == "hello"
        assert await sandboxes.value(sandbox, job(tmp_path, "import os\nos.listdir('.')")) == ["sub"]
        for write in ("open('sub/a.txt', 'w')", "open('new', mode='a')", "from pathlib import Path\nPath('sub/a.txt').unlink()"):
            error = await sandboxes.refused(sandbox, job(tmp_path, write))
            assert "PermissionError" in error.message
        error = await sandboxes.refused(sandbox, job(tmp_path, "1", disk=3))
        assert error.details["limit"] == "disk"
    assert (tmp_path / "sub" / "a.txt").read_text() == "hello"


async def test_nothing_is_left_when_the_tier_is_closed(tmp_path: Path) -> None:
    tasks = lifecycle.Tasks(on_failure=lambda _error: None)
    async with sandboxes.started(Script) as sandbox:
        running = tasks.spawn(sandbox.run(job(tmp_path, "while True: pass", cpu_s=60.0)), name="script")
        await sandboxes.until(lambda: any("State:\tR" in status(pid) for pid in processes(sandbox)))
        there = processes(sandbox)
    await sandboxes.until(lambda: sandboxes.dead(there), 0.25)
    await sandboxes.until(lambda: sandboxes.gone(there))
    with pytest.raises(errors.NetraError):
        await running


async def test_a_script_ends_with_its_owner(tmp_path: Path) -> None:
    program = f"""
import asyncio, pathlib
from tests.fixtures import sandboxes
from services.dispatcher.tools.sandbox.script import Script
async def main():
    async with sandboxes.started(Script, spares=0) as sandbox:
        folder = pathlib.Path({str(tmp_path)!r})
        await sandbox.run(sandboxes.job(folder, "1", owner="ann"))
        print(*sandboxes.below(sandbox._template._process.pid), flush=True)
        await sandbox.run(sandboxes.job(folder, "while True: pass", owner="ann", cpu_s=50.0, wall_s=60.0))
asyncio.run(main())
"""
    owner = await asyncio.to_thread(subprocess.Popen, [sys.executable, "-c", program], cwd=_ROOT, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    both = set(map(int, (await asyncio.to_thread(owner.stdout.readline)).split()))
    assert len(both) == 2
    owner.kill()
    owner.communicate()
    await sandboxes.until(lambda: sandboxes.gone(both))


async def test_without_the_interpreter_the_tier_refuses(tmp_path: Path) -> None:
    guardian = Guardian(60.0)
    sandbox = Script(guardian, binary=tmp_path / "none")
    with pytest.raises(errors.SandboxUnavailable, match="not there"):
        await sandbox.start()
    error = await sandboxes.refused(sandbox, job(tmp_path, "1"))
    assert isinstance(error, errors.SandboxUnavailable)
    assert "pydantic-monty" in error.details["remedy"]
    found = await sandbox.probe()
    assert not found.available
    with pytest.raises(errors.SandboxUnavailable):
        found.require()
    await sandbox.close()
    await guardian.close()


async def test_what_is_no_interpreter_is_found_out(tmp_path: Path) -> None:
    (false := tmp_path / "monty").write_text("#!/bin/sh\nexit 0\n")
    false.chmod(0o755)
    with pytest.raises(errors.SandboxUnavailable):
        async with sandboxes.started(Script, binary=false):
            pass
