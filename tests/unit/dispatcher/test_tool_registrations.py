"""Registrations from outside: which change is one, and what a dispatcher makes of what others, or other releases, have kept."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence

import pytest

from netra import errors
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from netra.tool import ToolSpec, tool
from services.dispatcher.tools import registrations, registry
from services.dispatcher.tools.sandbox import remote

OPERATOR, WORKER = registrations.By("user:1", operator=True), registrations.By("service:worker", operator=False)


@tool(name="of.installation")
async def installed() -> int:
    """Comes with the installation."""
    return 1


def declared(name: str = "remote.costs", version: str = "1.0.0") -> pb.Tool:
    """A tool of a worker."""
    return pb.Tool(name=name, version=version, description="Costs.", input_schema=b'{"type":"object"}')


class Rows:
    """Stands for the table: one version of a name, and what changes."""

    def __init__(self, *kept: registrations.Kept) -> None:
        self.kept = list(kept)
        self.active = 0
        self.away: list[errors.NetraError] = []
        self.asked = asyncio.Condition()
        self.times = 0

    def add(self, kept: registrations.Kept) -> None:
        """Somebody changed something."""
        self.kept.append(dataclasses.replace(kept, revision=len(self.kept) + 1))

    async def since(self, revision: int, most: int) -> list[registrations.Kept]:
        async with self.asked:
            self.times += 1
            self.asked.notify_all()
        if self.away:
            raise self.away.pop()
        return [row for row in self.kept if row.revision > revision][:most]

    async def register(self, new: registrations.Kept, decide: registrations.Decide) -> bool:
        changed = decide([row for row in self.kept if row.name == new.name][-1:], self.active)
        if changed:
            self.add(new)
        return changed

    async def deregister(self, name: str, by: str, decide: registrations.Decide) -> bool:
        changed = decide([row for row in self.kept if row.name == name][-1:], self.active)
        if changed:
            self.add(dataclasses.replace(self.kept[-1], state=registrations.REMOVED))
        return changed


def kept(new: pb.Tool, **more: object) -> registrations.Kept:
    """A row of it."""
    row = registrations.Kept(new.name, new.version, "d" * 64, new.SerializeToString(), registered_by="service:worker")
    return dataclasses.replace(row, **more)  # type: ignore[arg-type]


async def seen(*rows: registrations.Kept, own: Sequence[ToolSpec] = (installed,)) -> registry.ToolRegistry:
    """What a dispatcher has that starts with these rows."""
    tools, table = registry.ToolRegistry(own), Rows()
    for row in rows:
        table.add(row)
    await registrations.Registrations(table, tools).prepare()
    return tools


async def test_what_is_kept_is_known_from_the_start() -> None:
    many = [kept(declared(f"tool.{number}")) for number in range(450)]
    tools = await seen(*many, kept(declared("tool.7"), state=registrations.REMOVED), kept(declared("tool.8", "1.1.0")))
    assert len(tools) == 450
    assert (tools.get("tool.8").spec.version, tools.get("tool.9").digest) == ("1.1.0", "d" * 64)
    with pytest.raises(errors.NotFound):
        tools.get("tool.7")


async def test_a_tool_of_the_installation_is_not_replaced_by_what_is_kept() -> None:
    tools = await seen(kept(declared("of.installation", "9.0.0")), kept(declared("of.installation", "9.0.0"), state=registrations.REMOVED))
    assert tools.get("of.installation").spec is installed


@pytest.mark.parametrize("document", [b"\xff", declared(version="odd").SerializeToString(), b""])
async def test_what_this_release_cannot_use_is_left_out_and_stops_nothing(document: bytes) -> None:
    tools = await seen(kept(declared()), kept(declared(), document=document), kept(declared("next.one")))
    assert [name for name in ("remote.costs", "next.one") if name in tools._tools] == ["next.one"]


async def test_there_is_a_limit_to_how_many() -> None:
    table = Rows()
    registered = registrations.Registrations(table, registry.ToolRegistry([]))
    table.active = registrations.MOST - 1
    await registered.register(declared(), OPERATOR, replace=False)
    table.active = registrations.MOST
    with pytest.raises(errors.ResourceExhausted) as caught:
        await registered.register(declared("one.more"), OPERATOR, replace=False)
    assert caught.value.details["limit"] == "tools"
    # what takes the place of another is not one more
    await registered.register(declared(version="2.0.0"), OPERATOR, replace=True)


async def test_a_worker_changes_what_workers_registered() -> None:
    table = Rows()
    registered = registrations.Registrations(table, registry.ToolRegistry([]))
    await registered.register(declared(), OPERATOR, replace=False)
    new = declared(version="2.0.0")
    for attempt in (registered.register(new, WORKER, replace=True), registered.deregister("remote.costs", WORKER)):
        with pytest.raises(errors.PermissionDenied, match="user:1"):
            await attempt
    # nor after it was taken away
    await registered.deregister("remote.costs", OPERATOR)
    with pytest.raises(errors.PermissionDenied):
        await registered.register(new, WORKER, replace=True)


async def test_what_is_stored_is_registered_even_if_it_cannot_be_read_back_at_once() -> None:
    table, tools = Rows(), registry.ToolRegistry([])
    registered = registrations.Registrations(table, tools)
    table.away = [errors.Unavailable()]
    assert (await registered.register(declared(), OPERATOR, replace=False))[1] is True
    assert len(tools) == 0
    await registered.refresh()
    assert tools.get("remote.costs")


async def test_changes_are_taken_over_again_after_an_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registrations, "_EVERY_S", 0.001)
    table, tools = Rows(), registry.ToolRegistry([])
    registered = registrations.Registrations(table, tools)
    table.away = [errors.Unavailable(), errors.DeadlineExceeded()]
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        following = group.create_task(registered.follow())
        async with table.asked:
            await table.asked.wait_for(lambda: table.times >= 3)
            table.add(kept(declared()))
            at = table.times
            await table.asked.wait_for(lambda: table.times >= at + 3)
        following.cancel()
    assert tools.get("remote.costs").spec.enforcement == "remote"


async def test_a_declaration_has_the_digest_of_what_it_says() -> None:
    made = registrations.read(declared())
    assert made.digest == made.spec.digest == registrations.read(declared()).digest != registrations.read(declared(version="1.0.1")).digest
    assert (made.spec.permission, made.spec.timeout_s, made.weight) == ("tools:execute", 5.0, 1)


async def test_nobody_serves_the_tier_remote_yet() -> None:
    tier = remote.Remote()
    await tier.start()
    found = await tier.probe()
    assert (found.tier, found.available, found.enforcement()) == ("remote", False, {"tier": "remote", "backend": "worker"})
    assert found.remedy
    with pytest.raises(errors.SandboxUnavailable, match="no worker"):
        found.require()
    with pytest.raises(errors.SandboxUnavailable, match="no worker") as caught:
        await registrations.read(declared()).spec.function(month="x")
    assert caught.value.details["remedy"]
    await tier.close()
