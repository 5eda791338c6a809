"""What the people of the proof have before it begins: of everything two, one that others name and one that they do not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import grpc

from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import approvals_pb2, dispatcher_pb2
from netra.events.v1 import events_pb2
from tests.fixtures import forge
from tests.prove.isolation.people import Party
from tests.prove.isolation.world import World


async def everybody(world: World, *names: str) -> None:
    """All of them at once, or those named."""
    await asyncio.gather(*(_settle(world, world[name]) for name in names or ("A", "B", "C", "F")))
    # who rules a tenant names what its users have
    world["operator"].things = world["A"].things


async def _settle(world: World, who: Party) -> None:
    things = who.things
    claims = forge.claims_of(who.token)
    things.ids |= {"user_id": who.user_id, "tenant_id": claims["tid"], "session_id": claims["sid"], "email": who.email}
    for named in (True, False):
        found = await _one_of_each(world, who, named)
        if named:
            things.ids |= found
        else:
            things.hidden |= set(found.values())
    opened = await world.run_opened(who)
    things.context_token = opened.context_token
    things.ids |= {"context_id": opened.context.context_id, "connection_id": opened.context.connection_id}
    other = await world.opened(who)
    things.hidden |= {other.context.context_id, other.context.thread_id, other.context.run_id, other.context.connection_id}
    things.hidden |= {opened.context.thread_id, opened.context.run_id}
    things.grant_token = await granted(world, who)
    await _pages(world, who)


async def _one_of_each(world: World, who: Party, named: bool) -> dict[str, str]:
    run = await world.started(who, request_id=who.once() if named else who.word())
    await world.ended(who, run.run_id)
    page = await world.events.ListEvents(events_pb2.ListEventsRequest(run_id=run.run_id), metadata=who.bearer, timeout=20)
    event = json.loads(page.events[0].frame)
    # one file lies in the thread, the other one in none
    file, key = await world.kept(who, **({"thread_id": run.thread_id} if named else {})), await world.key(who)
    found = (await world.runs.GetRun(dispatcher_pb2.GetRunRequest(run_id=run.run_id), metadata=who.bearer, timeout=20)).run
    return {
        "run_id": run.run_id, "thread_id": run.thread_id, "message_id": run.message_id, "event_id": event["event_id"],
        "artifact_id": file.artifact_id, "key_id": key.key.key_id, "prefix": key.key.prefix, "request_id": found.request_id,
        "correlation_id": found.correlation_id, "approval_id": await world.asked_for(who, run.run_id, run.thread_id),
    }  # fmt: skip


async def granted(world: World, who: Party) -> str:
    """What the context service signs for the thread among somebody's things: to whom it is, whoever brings it."""
    owner = next((one for one in world.parties.values() if one.user_id == who.things["user_id"]), who)
    wanted = context_pb2.CreateGrantTokenRequest(thread_id=who.things["thread_id"])
    return (await world.context.CreateGrantToken(wanted, metadata=owner.bearer, timeout=20)).grant_token


async def _pages(world: World, who: Party) -> None:
    asked: dict[str, Callable[[], Any]] = {
        "runs": lambda: world.runs.ListRuns(dispatcher_pb2.ListRunsRequest(page_size=1), metadata=who.bearer, timeout=20),
        "approvals": lambda: world.runs.ListApprovals(approvals_pb2.ListApprovalsRequest(page_size=1), metadata=who.bearer, timeout=20),
        "threads": lambda: world.context.ListThreads(context_pb2.ListThreadsRequest(page_size=1), metadata=who.bearer, timeout=20),
        "artifacts": lambda: world.context.ListArtifacts(context_pb2.ListArtifactsRequest(page_size=1), metadata=who.bearer, timeout=20),
        "contexts": lambda: world.context.ListContexts(context_pb2.ListContextsRequest(page_size=1), metadata=who.bearer, timeout=20),
        "messages": lambda: world.context.ListMessages(
            context_pb2.ListMessagesRequest(thread_id=who.things["thread_id"], page_size=1), metadata=who.bearer, timeout=20
        ),
    }
    for name, ask in asked.items():
        try:
            if token := (await ask()).next_page_token:
                who.things.pages[f"page:{name}"] = token
        except grpc.aio.AioRpcError:
            continue  # not there yet: the control of that example says so
