"""Examples of the HTTP resources of threads, contexts, and all that is kept of a user."""

from __future__ import annotations

from typing import Any

from netra.context.v1 import context_pb2
from tests.prove.isolation.example import USER, Wanted, routes
from tests.prove.isolation.examples_threads import granted_to
from tests.prove.isolation.people import Party
from tests.prove.isolation.world import World


def _once(who: Party) -> dict[str, str]:
    return {"Idempotency-Key": who.once()}


@routes("GET /v1/threads/{thread_id}", USER, shows="thread_id user_id", reads="thread_id")
async def _(world: World, who: Party) -> Any:
    return Wanted(path={"thread_id": who.things["thread_id"]})


@routes("DELETE /v1/threads/{thread_id}", USER)
async def _(world: World, who: Party) -> Any:
    return Wanted(path={"thread_id": await world.thread(who)}, headers=_once(who))


@routes("POST /v1/threads/{thread_id}:restore", USER)
async def _(world: World, who: Party) -> Any:
    thread_id = await world.thread(who)
    wanted = context_pb2.DeleteThreadRequest(request_id=who.once(), thread_id=thread_id)
    await world.context.DeleteThread(wanted, metadata=who.bearer, timeout=20)
    return Wanted(path={"thread_id": thread_id}, headers=_once(who))


@routes("POST /v1/threads/{thread_id}:erase", USER)
async def _(world: World, who: Party) -> Any:
    return Wanted(path={"thread_id": await world.thread(who)}, headers=_once(who))


@routes("GET /v1/threads/{thread_id}/grants", USER)
async def _(world: World, who: Party) -> Any:
    return Wanted(path={"thread_id": (await granted_to(world, who)).thread_id}, query={"page_size": "200"})


# the contract: one's own thread may be shown to whoever is in the tenant, by id or address
@routes("POST /v1/threads/{thread_id}/grants", USER, legit=[("grantee_id", "user_id")])
async def _(world: World, who: Party) -> Any:
    body = {"grantee_id": world.near(who).user_id, "access": "read"}
    return Wanted(path={"thread_id": await world.thread(who)}, headers=_once(who), json=body)


@routes("POST /v1/threads/{thread_id}/grants#email", USER, legit=[("email", "email")])
async def _(world: World, who: Party) -> Any:
    body = {"email": world.near(who).email, "access": "write"}
    return Wanted(path={"thread_id": await world.thread(who)}, headers=_once(who), json=body)


@routes("DELETE /v1/threads/{thread_id}/grants/{grantee_id}", USER)
async def _(world: World, who: Party) -> Any:
    granted = await granted_to(world, who)
    return Wanted(path={"thread_id": granted.thread_id, "grantee_id": granted.user_id}, headers=_once(who))


@routes("POST /v1/threads/{thread_id}/token", USER, reads="thread_id")
async def _(world: World, who: Party) -> Any:
    return Wanted(path={"thread_id": who.things["thread_id"]})


@routes("GET /v1/contexts", USER, long=True, shows="context_id user_id", rulers=True)
async def _(world: World, who: Party) -> Any:
    return Wanted(query={"page_size": "200", "user_id": who.user_id})


@routes("GET /v1/contexts/audit", USER, shows="context_id", rulers=True)
async def _(world: World, who: Party) -> Any:
    return Wanted(query={"page_size": "200", "context_id": who.things["context_id"], "thread_id": "", "user_id": who.user_id})


@routes("GET /v1/contexts/{context_id}", USER, shows="context_id user_id", reads="context_id", rulers=True)
async def _(world: World, who: Party) -> Any:
    return Wanted(path={"context_id": who.things["context_id"]}, query={"user_id": who.user_id})


@routes("GET /v1/export", USER, shows="thread_id message_id artifact_id context_id event_id canary")
async def _(world: World, who: Party) -> Any:
    return Wanted()


@routes("DELETE /v1/me/data", USER, spare=True)
async def _(world: World, who: Party) -> Any:
    return Wanted(headers=_once(who))
