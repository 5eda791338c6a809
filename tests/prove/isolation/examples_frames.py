"""Examples of the frames of the socket; STREAM has one for each RPC that it can open."""

from __future__ import annotations

from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from netra import ids
from tests.prove.isolation.example import USER, Example, frames, rpcs
from tests.prove.isolation.people import Party
from tests.prove.isolation.world import World


@frames("START_AGENT", USER)
async def _(world: World, who: Party) -> Any:
    payload = {"agent": "text-analyst", "user_request": f"About {who.canary}.", "inputs": {"note": who.canary}}
    return {"payload": payload, "thread_id": who.things["thread_id"], "id": who.once()}


@frames("USER_MESSAGE", USER)
async def _(world: World, who: Party) -> Any:
    return {"payload": {"agent": "text-analyst", "message": f"About {who.canary}.", "thread_id": who.things["thread_id"]}, "id": who.once()}


@frames("CHAT", USER)
async def _(world: World, who: Party) -> Any:
    payload = {"agent": "text-analyst", "text": f"About {who.canary}.", "on_busy": "enqueue"}
    return {"payload": payload, "thread_id": who.things["thread_id"], "id": who.once()}


@frames("CANCEL", USER, shows="run_id", reads="run_id")
async def _(world: World, who: Party) -> Any:
    return {"payload": {"run_id": who.things["run_id"]}, "id": who.once()}


@frames("SEND", USER)
async def _(world: World, who: Party) -> Any:
    return {"payload": {"run_id": await world.waiting(who), "message": f"About {who.canary}."}, "id": who.once()}


@frames("APPROVE", USER, shows="approval_id", reads="approval_id")
async def _(world: World, who: Party) -> Any:
    payload = {"approval_id": who.things["approval_id"], "decision": "approve", "comment": "Yes."}
    return {"payload": payload, "id": who.once()}


@frames("RESUME", USER, shows="canary", live=True)
async def _(world: World, who: Party) -> Any:
    return {"payload": {"after": 0}, "id": who.once(), "thread_id": who.things["thread_id"]}


# one's own choice of one's own events: what is chosen may be nothing. That everything which is named must hold would hide what one of
# them lets in: each is asked alone, too


@frames("SUBSCRIBE", USER, live=True)
async def _(world: World, who: Party) -> Any:
    payload = {"thread_id": who.things["thread_id"], "run_id": who.things["run_id"], "types": ["agent_started", "note"]}
    return {"payload": payload, "id": who.once()}


@frames("SUBSCRIBE#thread", USER, live=True)
async def _(world: World, who: Party) -> Any:
    return {"payload": {"thread_id": who.things["thread_id"]}, "id": who.once()}


@frames("SUBSCRIBE#run", USER, live=True)
async def _(world: World, who: Party) -> Any:
    return {"payload": {"run_id": who.things["run_id"]}, "id": who.once()}


@frames("UNSUBSCRIBE", USER)
async def _(world: World, who: Party) -> Any:
    before = {"type": "SUBSCRIBE", "payload": {"thread_id": who.things["thread_id"]}}
    return {"payload": {}, "id": who.once(), "before": before, "needs": "subscription_id", "gives": "subscription_id"}


@frames("STREAM_CANCEL", USER)
async def _(world: World, who: Party) -> Any:
    before = {"type": "STREAM", "payload": {"method": "netra.events.v1.EventsService/Subscribe", "request": {}}}
    return {"payload": {}, "id": who.once(), "before": before, "needs": "stream_id", "gives": "stream_id"}


@frames("AUTH", USER, live=True)
async def _(world: World, who: Party) -> Any:
    return {"payload": {"access_token": who.token}, "id": who.once()}


@frames("PING", USER)
async def _(world: World, who: Party) -> Any:
    return {"payload": {"text": ids.uuid7()}, "id": who.once()}


def streams(names: dict[str, str]) -> dict[str, Example]:
    """STREAM with each RPC, by the name of the RPC's own example; `names` are those of the wire."""
    return {f"STREAM {name}": _stream(rpcs.known[name], wire) for name, wire in names.items() if name in rpcs.known}


def _stream(rpc: Example, wire: str) -> Example:
    async def make(world: World, who: Party) -> Any:
        request = await rpc.make(world, who)
        assert isinstance(request, Message)
        told = json_format.MessageToDict(request, preserving_proto_field_name=True)
        return {"payload": {"method": wire, "request": told}, "id": who.once()}

    return Example(f"STREAM {rpc.name}", rpc.by, make, shows=rpc.shows, spare=rpc.spare, live=rpc.live)
