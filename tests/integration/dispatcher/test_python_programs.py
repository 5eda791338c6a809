"""Programs in the tier `python`: what they are given, what they leave, and what is said of those that fail."""

from __future__ import annotations

import asyncio
import dataclasses
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from netra import errors
from services.dispatcher.tools.sandbox.python import Python
from services.dispatcher.tools.sandbox.tiers import Ended, Job, Limits

_PATIENCE_S = 60.0


class Runner:
    """Runs code, each in a new folder unless one is named."""

    def __init__(self, tier: Python, root: Path) -> None:
        self.tier, self._root, self._count = tier, root, 0

    def folder(self) -> Path:
        self._count += 1
        made = self._root / f"run-{self._count}" / "call"
        made.mkdir(parents=True)
        return made

    async def ended(
        self, code: str, arguments: object = None, folder: Path | None = None, limits: Mapping[str, int] | None = None
    ) -> Ended:
        wanted = dataclasses.replace(Limits(_PATIENCE_S), **(limits or {}))
        job = Job(folder or self.folder(), wanted, code=code, arguments=orjson.dumps(arguments or {}), environment={"GIVEN": "secret"})
        return await self.tier.run(job)

    async def result(self, code: str, arguments: object = None, folder: Path | None = None) -> Any:
        return orjson.loads((await self.ended(code, arguments, folder)).result)


@pytest.fixture
async def runner(tmp_path: Path) -> AsyncIterator[Runner]:
    tier = Python(tmp_path, modules=["netra"], concurrency=4)
    await tier.start()
    yield Runner(tier, tmp_path)
    await tier.close()


async def test_the_result_is_the_variable_or_the_last_expression(runner: Runner) -> None:
    programs = {
        "a + 1": 3,
        "result = {'b': [a, None, 'ü']}\na": {"b": [2, None, "ü"]},
        "result = None": None,
        "def f(n):\n    return n * a\nf(4)": 8,
        "import sys\nresult = 5\nsys.exit(0)": 5,
        "arguments['a'] + arguments['not-a-name']": 9,
        "from collections import namedtuple\nPoint = namedtuple('Point', 'x y')\nPoint(1, a)": [1, 2],
        "from dataclasses import dataclass, asdict\n@dataclass\nclass P:\n    x: int = 1\nasdict(P())": {"x": 1},
    }
    found = await asyncio.gather(*(runner.result(code, {"a": 2, "not-a-name": 7}) for code in programs))
    assert found == list(programs.values())


async def test_each_call_draws_random_numbers_of_its_own(runner: Runner) -> None:
    drawn = [await runner.result("import random\nrandom.random()") for _ in range(8)]
    assert len(set(drawn)) == len(drawn)


async def test_code_is_given_its_environment_and_its_folder_and_no_more(runner: Runner) -> None:
    folder = runner.folder()
    code = "import os\n[dict(os.environ), os.getcwd(), os.listdir('.')]"
    assert await runner.result(code, folder=folder) == [{"GIVEN": "secret"}, str(folder), []]


async def test_code_imports_the_library_and_what_is_granted(runner: Runner) -> None:
    code = "import asyncio, sqlite3, ssl, xml.dom.minidom, pydantic, netra.ids\nasyncio.run(asyncio.sleep(0))\nnetra.ids.__name__"
    assert await runner.result(code) == "netra.ids"
    with pytest.raises(errors.ToolFailed, match="ModuleNotFoundError"):
        await runner.result("import services.dispatcher.settings")
    with pytest.raises(errors.ToolFailed, match="ModuleNotFoundError"):
        await runner.result("import chassis.environment")


async def test_threads_work_and_each_call_is_a_new_process(runner: Runner) -> None:
    code = (
        "import os\nfrom concurrent.futures import ThreadPoolExecutor\nwith ThreadPoolExecutor(8) as pool:\n"
        "    total = sum(pool.map(lambda n: n * n, range(100)))\n[total, os.getpid()]"
    )
    (one, first), (two, second) = [await runner.result(code) for _ in range(2)]
    assert one == two == 328350
    assert first != second


async def test_native_libraries_with_threads_of_their_own_work(runner: Runner) -> None:
    code = "import duckdb\nduckdb.sql('select sum(i)::bigint, count(*) from range(200000) t(i) where i % 7 = 0').fetchall()[0]"
    assert await runner.result(code) == [sum(range(0, 200000, 7)), len(range(0, 200000, 7))]


async def test_chance_is_another_in_each_call(runner: Runner) -> None:
    code = "import random, secrets, uuid\n[random.random(), secrets.token_hex(), str(uuid.uuid4())]"
    first, second = await asyncio.gather(runner.result(code), runner.result(code))
    assert not set(first) & set(second)


async def test_files_come_in_and_go_out(runner: Runner) -> None:
    folder = runner.folder()
    (folder / "kept.txt").write_text("kept")
    (folder / "changed.txt").write_text("before")
    (folder / "removed.txt").write_text("x")
    (folder / "deep").mkdir()
    (folder / "deep" / "in.txt").write_text("in")
    (folder / "a-file").write_text("x")
    before = (folder / "kept.txt").stat().st_mtime_ns
    code = (
        "import os\nread = [open('kept.txt').read(), open('deep/in.txt').read()]\nopen('changed.txt', 'w').write('after')\n"
        "os.unlink('removed.txt')\nos.makedirs('new/deeper')\nopen('new/deeper/out.bin', 'wb').write(bytes(range(256)))\n"
        "os.unlink('a-file')\nos.mkdir('a-file')\nread"
    )
    assert await runner.result(code, folder=folder) == ["kept", "in"]
    left = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert left == {"kept.txt": b"kept", "changed.txt": b"after", "deep/in.txt": b"in", "new/deeper/out.bin": bytes(range(256))}
    assert (folder / "a-file").is_dir()
    assert (folder / "kept.txt").stat().st_mtime_ns == before


# code; how the message begins; the type that is told; what the traceback says
_WRONG = [
    (
        "x = 1\ndef f():\n    return x / 0\nf()",
        "ZeroDivisionError: division by zero",
        "ZeroDivisionError",
        "line 3, in f: return x / 0",
    ),
    ("def f(:\n  pass", "SyntaxError in line 1: invalid syntax", "SyntaxError", "def f(:"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt", "KeyboardInterrupt", "line 1, in <module>: raise KeyboardInterrupt"),
    ("import sys\nsys.exit('no more')", "It ended with exit code no more.", "SystemExit", ""),
    ("x = 1", "It left no result: set the variable `result`, or end with an expression.", "", ""),
    ("float('nan')", "Its result cannot be written as JSON: Out of range float values are not JSON compliant.", "ValueError", ""),
    ("{1, 2}", "Its result cannot be written as JSON: Object of type set is not JSON serializable.", "TypeError", ""),
    ("'\\ud800'", "Its result cannot be written as JSON", "UnicodeEncodeError", ""),
    ("import os\nos._exit(3)", "It ended with exit code 3 and without a result.", "", ""),
    ("import os\nos._exit(0)", "It ended without a result.", "", ""),
    ("import ctypes\nctypes.string_at(0)", "It was killed by SIGSEGV before it ended.", "", ""),
    ("def f(n):\n    return f(n + 1)\nf(0)", "RecursionError: maximum recursion depth exceeded", "RecursionError", "more ..."),
]


async def test_what_went_wrong_is_said(runner: Runner) -> None:
    raised = await asyncio.gather(*(runner.result(code) for code, *_ in _WRONG), return_exceptions=True)
    for (code, says, kind, where), error in zip(_WRONG, raised, strict=True):
        assert isinstance(error, errors.ToolFailed), (code, error)
        assert error.message.startswith(says), code
        assert error.details.get("type", "") == kind, code
        assert where in error.details.get("traceback", ""), code


async def test_no_path_of_ours_is_said(runner: Runner) -> None:
    with pytest.raises(errors.ToolFailed) as raised:
        await runner.result("from json import nothing_of_the_kind")
    told = f"{raised.value.message} {raised.value.details}"
    assert "nothing_of_the_kind" in told
    assert os.path.dirname(os.__file__) not in told


async def test_what_is_printed_is_kept_and_what_is_too_much_is_cut(runner: Runner) -> None:
    ended = await runner.ended("import sys\nprint('out', 'ü')\nprint('err', file=sys.stderr)\nsys.stdout.write('no end')\n1")
    assert (ended.output, ended.cut) == ("out ü\nerr\nno end", False)
    ended = await runner.ended("print('x' * 999)\n2", limits={"output": 1000})
    assert (len(ended.output), ended.cut, ended.result) == (1000, False, b"2")
    ended = await runner.ended("print('x' * 1500)\nprint('more')\n3", limits={"output": 1000})
    assert (ended.output, ended.cut, ended.result) == ("x" * 1000, True, b"3")
    with pytest.raises(errors.ToolFailed) as raised:
        await runner.ended("print('so far')\n1 / 0")
    assert raised.value.details["output"] == "so far\n"


# a limit, how much, and code that takes more
_TOO_MUCH = [
    ("memory", 32 << 20, "bytearray(64 << 20)"),
    ("memory", 32 << 20, "kept = []\nwhile True:\n    kept.append('x' * 1000 + str(len(kept)))"),
    ("output", 1000, "'x' * 1000"),
    ("open_files", 16, "kept = [open('/dev/null') for _ in range(30)]"),
    ("file_size", 1 << 20, "open('big', 'wb').write(bytes(2 << 20))"),
    ("processes", 4, "import threading, time\n[threading.Thread(target=time.sleep, args=(9,)).start() for _ in range(9)]\ntime.sleep(9)"),
    ("cpu_s", 1, "while True:\n    pass"),
]


async def test_what_was_too_much_is_named(runner: Runner) -> None:
    raised = await asyncio.gather(*(runner.ended(code, limits={limit: most}) for limit, most, code in _TOO_MUCH), return_exceptions=True)
    for (limit, _, code), error in zip(_TOO_MUCH, raised, strict=True):
        assert isinstance(error, errors.ResourceExhausted), (code, error)
        assert error.details["limit"] == limit, code


async def test_what_only_an_attack_does_is_said_to_be_one(runner: Runner) -> None:
    with pytest.raises(errors.SecurityViolation):
        await runner.result("import ctypes\nctypes.CDLL(None).ptrace(0, 0, 0, 0)\n1")


async def test_a_folder_that_lies_elsewhere_is_refused(runner: Runner, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(ValueError, match="does not lie below"):
        await runner.ended("1", folder=tmp_path_factory.mktemp("elsewhere"))


async def test_what_is_available_is_told_and_nothing_weaker_is_used(tmp_path: Path) -> None:
    tier = Python(tmp_path)
    try:
        found = await tier.probe()
        assert (found.tier, found.available, found.reason) == ("python", True, "")
        assert found.backend == ("namespaces" if found.facts["namespaces"] else "landlock")
        assert found.facts["disk_quota"] is found.facts["namespaces"]
        assert not os.listdir(tmp_path)
    finally:
        await tier.close()
    missing = Python(tmp_path / "nowhere")
    try:
        found = await missing.probe()
        assert not found.available
        assert found.reason
        assert found.remedy
        with pytest.raises(errors.SandboxUnavailable):
            found.require()
    finally:
        await missing.close()


@pytest.mark.parametrize("namespaces", [None, False], ids=["as it is", "bare"])
async def test_modules_of_tools_are_there_before_a_call_and_know_nothing(tmp_path: Path, namespaces: bool | None) -> None:
    if namespaces is False and os.getuid() == 0:
        namespaces = None  # nothing brings Python to users who may not read it
    tier = Python(tmp_path, modules=["netra", "chassis", "tests.fixtures.noticed"], concurrency=2, namespaces=namespaces)
    (tmp_path / "call").mkdir()

    async def result(code: str, module: str = "") -> Any:
        return orjson.loads((await tier.run(Job(tmp_path / "call", Limits(_PATIENCE_S), code=code, module=module))).result)

    try:
        there = "import sys; 'tests.fixtures.noticed' in sys.modules"
        assert await result(there, "tests.fixtures.noticed")
        assert not await result(there)
        # the copy of the call is not the process that imported it, which found no more than a call does
        take = "from tests.fixtures import noticed; "
        found, pid = await result(take + "import os; [noticed.FOUND, os.getpid()]", "tests.fixtures.noticed")
        assert found["pid"] != pid
        assert [Path(path).name for path in found["readable"]] == ["noticed.py"]
        assert not {"PATH", "HOME"} & set(found["environment"])
        assert not [name for name in found["environment"] if name.startswith("NETRA")]
        # each has it as it was when it was imported
        assert await result(take + "noticed.FOUND['left'] = 1; 'left'", "tests.fixtures.noticed") == "left"
        assert "left" not in await result(take + "noticed.FOUND", "tests.fixtures.noticed")
    finally:
        await tier.close()


async def test_a_module_that_cannot_be_forked_is_imported_by_its_calls(tmp_path: Path) -> None:
    tier = Python(tmp_path, modules=["netra", "tests.fixtures.threaded"], concurrency=2)
    (tmp_path / "call").mkdir()
    try:
        await tier.start()
        code = "from tests.fixtures.threaded import half\nhalf(3)"
        ended = await tier.run(Job(tmp_path / "call", Limits(_PATIENCE_S), code=code, module="tests.fixtures.threaded"))
        assert ended.result == b"1.5"
    finally:
        await tier.close()


async def test_a_module_that_is_not_there_keeps_the_tier_from_starting(tmp_path: Path) -> None:
    tier = Python(tmp_path, modules=["netra.there_is_no_such"])
    try:
        with pytest.raises(errors.SandboxUnavailable, match="no module"):
            await tier.start()
    finally:
        await tier.close()


async def test_after_it_is_closed_nothing_is_run(runner: Runner) -> None:
    await runner.tier.close()
    with pytest.raises(errors.SandboxUnavailable):
        await runner.result("1")
