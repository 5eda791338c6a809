"""Examples of the context service: threads, who may do what with them, and all that somebody has."""

from __future__ import annotations

from typing import Any

from netra.context.v1 import context_pb2
from tests.prove.isolation.example import USER, rpcs
from tests.prove.isolation.people import Party
from tests.prove.isolation.world import World


@rpcs("context.ListThreads", USER, long=True, shows="thread_id")
async def _(world: World, who: Party) -> Any:
    return context_pb2.ListThreadsRequest(page_size=200)


@rpcs("context.GetThread", USER, shows="thread_id user_id", reads="thread_id")
async def _(world: World, who: Party) -> Any:
    return context_pb2.GetThreadRequest(thread_id=who.things["thread_id"])


@rpcs("context.DeleteThread", USER)
async def _(world: World, who: Party) -> Any:
    return context_pb2.DeleteThreadRequest(request_id=who.once(), thread_id=await world.thread(who))


@rpcs("context.RestoreThread", USER)
async def _(world: World, who: Party) -> Any:
    thread_id = await world.thread(who)
    wanted = context_pb2.DeleteThreadRequest(request_id=who.once(), thread_id=thread_id)
    await world.context.DeleteThread(wanted, metadata=who.bearer, timeout=20)
    return context_pb2.RestoreThreadRequest(request_id=who.once(), thread_id=thread_id)


@rpcs("context.EraseThread", USER)
async def _(world: World, who: Party) -> Any:
    return context_pb2.EraseThreadRequest(request_id=who.once(), thread_id=await world.thread(who))


# the contract: one's own thread may be shown to whoever is in the tenant, by id or address
@rpcs("context.GrantThread", USER, legit=[("user_id", "user_id"), ("email", "email")])
async def _(world: World, who: Party) -> Any:
    return context_pb2.GrantThreadRequest(
        request_id=who.once(), thread_id=await world.thread(who), user_id=world.near(who).user_id, access=context_pb2.ACCESS_READ
    )


async def granted_to(world: World, who: Party) -> context_pb2.GrantThreadRequest:
    """A thread of a user that was granted to another: how."""
    wanted = context_pb2.GrantThreadRequest(
        request_id=who.once(), thread_id=await world.thread(who), user_id=world.near(who).user_id, access=context_pb2.ACCESS_READ
    )
    await world.context.GrantThread(wanted, metadata=who.bearer, timeout=20)
    return wanted


@rpcs("context.WithdrawGrant", USER)
async def _(world: World, who: Party) -> Any:
    wanted = await granted_to(world, who)
    return context_pb2.WithdrawGrantRequest(request_id=who.once(), thread_id=wanted.thread_id, grantee_id=wanted.user_id)


@rpcs("context.ListGrants", USER, reads="thread_id", works=lambda answer: len(answer.messages[0].grants) == 1)
async def _(world: World, who: Party) -> Any:
    return context_pb2.ListGrantsRequest(thread_id=(await granted_to(world, who)).thread_id, page_size=200)


@rpcs("context.CreateGrantToken", USER, reads="thread_id")
async def _(world: World, who: Party) -> Any:
    return context_pb2.CreateGrantTokenRequest(thread_id=who.things["thread_id"])


@rpcs("context.ExportData", USER, shows="thread_id message_id artifact_id context_id canary")
async def _(world: World, who: Party) -> Any:
    return context_pb2.ExportDataRequest()


@rpcs("context.EraseData", USER, spare=True)
async def _(world: World, who: Party) -> Any:
    await world.thread(who)
    return context_pb2.EraseDataRequest(request_id=who.once())
