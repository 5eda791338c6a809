"""What a call is given: a folder and limits of its own for what it runs, its secrets and no others, and nothing after its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import pytest

from netra.tool import ToolContext, tool
from services.dispatcher.tools import attempts, means
from services.dispatcher.tools.sandbox import allowances, sandboxes, tiers
from tests.fixtures import contained
from tests.fixtures.dispatchers import house

ASKED: dict[str, Any] = {}


@tool(name="uses.tier", enforcement="command", secrets=("key_one",), timeout_s=30)
async def uses(context: ToolContext, files: dict[str, str]) -> Any:
    """Runs a command with files."""
    return await context.contained(argv=["x"], arguments={"a": 1}, files={name: text.encode() for name, text in files.items()})


@tool(name="misuses.tier", enforcement="command", timeout_s=30)
async def misuses(context: ToolContext, how: str) -> Any:
    """Uses its tier as it is not meant to be used."""
    if how == "code":
        return await context.contained(code="1")
    return await (context.contained(code="1", argv=["x"]) if how == "both" else context.contained())


@tool(name="no.tier", timeout_s=30)
async def no_tier(context: ToolContext) -> Any:
    """Is trusted, and so has no sandbox to run foreign code in."""
    return await context.contained(code="1")


class Command:
    """Takes jobs, and remembers them with what lay in their folders."""

    def __init__(self) -> None:
        self.jobs: list[tuple[tiers.Job, dict[str, str]]] = []

    async def start(self) -> None:
        """Is ready."""

    async def run(self, job: tiers.Job) -> tiers.Ended:
        """Done at once."""
        folder = job.folder
        self.jobs.append((job, {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}))
        return tiers.Ended(orjson.dumps({"given": orjson.loads(job.arguments)}))

    async def probe(self) -> tiers.Availability:
        """Holds."""
        return tiers.Availability("command", "test", available=True, facts={"disk_quota": False, "walls": 3})

    async def close(self) -> None:
        """Nothing is left."""


async def ready(tier: Command, limits: Mapping[str, Mapping[str, float]]) -> sandboxes.Sandboxes:
    """The tier, probed."""
    known = sandboxes.Sandboxes({"command": tier}, limits=allowances.Allowances(limits))

    async def tell(_found: tiers.Availability) -> None:
        """Nobody is told."""

    await known.start()
    await known.probe(tell)
    return known


def secret(name: str, key: str) -> str:
    """One secret of one tool is granted."""
    return "the word" if (name, key) == ("uses.tier", "key_one") else means.not_granted(name, key)


async def test_a_job_has_its_own_folder_limits_and_secrets(tmp_path: Path) -> None:
    tier = Command()
    limits = {"free": {"memory": 7 << 20, "files": 2, "disk": 10}, "business": {"memory": 9 << 20}}
    async with house(tmp_path, [uses], contained=await ready(tier, limits), secrets=secret) as made:
        free, paying = made.person(tier="free"), made.person(tier="business")
        async with made.open(free) as tools, made.open(paying, strategy="isolated") as others:
            for who in (tools, tools, others):
                outcome = await who.execute("uses.tier", {"files": {"a": "1", "b/c": "2"}})
                assert outcome.unwrap() == {"given": {"a": 1}}
                assert not tier.jobs[-1][0].folder.exists()
            assert dict(outcome.enforcement) == {"tier": "command", "backend": "test", "disk_quota": False, "facts": {"walls": 3}}
            for files, code in [
                ({"a": "", "b": "", "c": ""}, "RESOURCE_EXHAUSTED"), ({"a": "x" * 11}, "RESOURCE_EXHAUSTED"),
                ({"../a": ""}, "INVALID_PAYLOAD"), ({"/a": ""}, "INVALID_PAYLOAD"),
                ({"a/../../b": ""}, "INVALID_PAYLOAD"), ({"": ""}, "INVALID_PAYLOAD"),
            ]:  # fmt: skip
                wrong = await tools.execute("uses.tier", {"files": files})
                assert (wrong.error and wrong.error.code) == code, files
        jobs = [job for job, _ in tier.jobs]
        assert [files for _, files in tier.jobs] == [{"a": "1", "b/c": "2"}] * 3
        assert [job.limits.memory for job in jobs] == [7 << 20, 7 << 20, 9 << 20]
        assert all(0 < job.limits.wall_s <= 30 for job in jobs)
        assert [dict(job.environment) for job in jobs] == [{"KEY_ONE": "the word"}] * 3
        # what is kept warm is kept for the user, and for nobody after an isolated call
        assert [job.owner for job in jobs] == [free.context.user_id] * 2 + [""]
        assert len({job.folder for job in jobs}) == 3
        assert "the word" not in repr(jobs)


async def test_a_secret_that_was_not_granted_keeps_the_call_from_running(tmp_path: Path) -> None:
    tier = Command()
    async with house(tmp_path, [uses], contained=await ready(tier, {})) as made:
        async with made.open(made.person()) as tools:
            outcome = await tools.execute("uses.tier", {"files": {}})
    assert (outcome.status, outcome.error and outcome.error.details["secret"], tier.jobs) == ("denied", "key_one", [])


@pytest.mark.parametrize(("name", "arguments"), [("no.tier", {})] + [("misuses.tier", {"how": how}) for how in ("code", "both", "none")])
async def test_a_tier_is_used_as_it_is_meant_to_be_or_not_at_all(tmp_path: Path, name: str, arguments: dict[str, Any]) -> None:
    tier = Command()
    async with house(tmp_path, [no_tier, misuses], contained=await ready(tier, {})) as made:
        async with made.open(made.person()) as tools:
            outcome = await tools.execute(name, arguments)
    assert (outcome.error and outcome.error.code, tier.jobs) == ("TOOL_FAILED", [])


@pytest.mark.parametrize("link", [False, True])
async def test_files_that_are_given_by_path_are_copied(tmp_path: Path, link: bool) -> None:
    tier, source = Command(), tmp_path / "source"
    source.write_text("content")
    if link:
        os.symlink(source, tmp_path / "link")
        source = tmp_path / "link"

    @tool(name="gives.path", enforcement="command")
    async def gives(context: ToolContext) -> Any:
        """Hands over a file."""
        return await context.contained(argv=["x"], files={"given": source})

    async with house(tmp_path, [gives], contained=await ready(tier, {})) as made:
        async with made.open(made.person()) as tools:
            assert (await tools.execute("gives.path", {})).status == "success"
    assert tier.jobs[0][1] == {"given": "content"}


class Stuck:
    """Workers that end no call, whoever asks them to, until they are let go."""

    def __init__(self) -> None:
        self.began, self.released = asyncio.Event(), asyncio.Event()

    async def run(self, *_: object, **_more: object) -> object:
        """Does not heed its cancellation."""
        self.began.set()
        while not self.released.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.released.wait()
        return {"value": 1, "pid": 1}


async def test_a_cancel_does_not_wait_for_what_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_GRACE_S", 0.05)
    stuck: Any = Stuck()
    async with house(tmp_path, [contained.worker], contained=sandboxes.Sandboxes(warm=stuck)) as made:
        who = made.person()
        async with made.open(who) as tools, asyncio.TaskGroup() as group:
            call = group.create_task(tools.execute("plain.worker", {"value": 1}))
            await asyncio.wait_for(stuck.began.wait(), 10)
            call.cancel()
            # the tool has thirty seconds; the cancel is the cancel all the same, and nobody says that the tool stopped
            await asyncio.wait({call}, timeout=10)
            assert call.cancelled()
            assert [stopped.confirmed for stopped in tools.stopped] == [False]
            stuck.released.set()
    who.heard.pairs()
