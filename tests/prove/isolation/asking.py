"""Asks what an example says, in somebody's name, over each way: gRPC, HTTP, /rpc, frames and STREAM."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import websockets
from google.protobuf import json_format
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message

from netra import ids
from netra.access.v1 import access_pb2
from netra.auth.v1 import auth_pb2
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2
from tests.fixtures import sockets
from tests.prove import ways
from tests.prove.isolation import answers, leaves
from tests.prove.isolation.example import ADMIN, NOBODY, OPERATOR, USER, Example, Wanted
from tests.prove.isolation.listening import Heard, Held, listen
from tests.prove.isolation.people import Party
from tests.prove.isolation.world import World

_MODULES = {"auth": auth_pb2, "context": context_pb2, "dispatcher": dispatcher_pb2, "events": events_pb2}
METHODS: dict[str, MethodDescriptor] = {
    f"{name}.{method.name}": method
    for name, module in _MODULES.items()
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}
# the client's library stumbles when a stream is refused while it still writes
_TRIES = 5
# of all that a stream says
_FRAMES = 200
# longer than anything is listened to
_LONG_S = 3600.0
PEOPLE = (USER, ADMIN, OPERATOR, NOBODY)


def rule(name: str) -> access_pb2.Rule:
    """Who may call an RPC."""
    found: access_pb2.Rule = METHODS[name].GetOptions().Extensions[access_pb2.rule]
    return found


def full(name: str) -> str:
    """An RPC as the wire calls it."""
    method = METHODS[name]
    return f"{method.containing_service.full_name}/{method.name}"


@dataclass(slots=True)
class Asked:
    """What is asked by whom: ready to be changed in one place, and asked."""

    example: Example
    who: Party
    body: Any
    metadata: answers.Metadata = ()


class Way:
    """One way to ask. `places` are those in which something can be written; `most` is how many values a place that names something gets."""

    kind = ""
    most = 5

    def __init__(self, world: World) -> None:
        self.world = world

    async def ready(self, example: Example, who: Party, as_: Party | None = None) -> Asked:
        """What somebody asks; with `as_` it names what is another's."""
        if example.spare:
            who = await self.world.spare(who, signed_in=example.signed_in)
        body = await example.make(self.world, who.with_things_of(as_) if as_ is not None else who)
        return Asked(example, who, body)

    def places(self, asked: Asked) -> Iterator[leaves.Path]:
        """Where something can be written."""
        raise NotImplementedError

    def written(self, asked: Asked, place: leaves.Path, value: str) -> Asked:
        """The same, with a value at one place."""
        raise NotImplementedError

    def request_id(self, asked: Asked) -> str:
        """What it is called, so that it counts once; empty when it is not."""
        body = asked.body[0] if isinstance(asked.body, list) else asked.body
        if isinstance(body, Wanted):
            return body.headers.get("Idempotency-Key", "")
        if isinstance(body, dict):
            return str(body.get("id", ""))
        return str(getattr(getattr(body, "header", body), "request_id", ""))

    def anew(self, asked: Asked) -> Asked:
        """The same under another request id: what was asked before, also in vain, does not count."""
        if not self.request_id(asked):
            return asked
        found = copy.deepcopy(asked.body)
        body = found[0] if isinstance(found, list) else found
        if isinstance(body, Wanted):
            body.headers["Idempotency-Key"] = ids.uuid7()
        elif isinstance(body, dict):
            body["id"] = ids.uuid7()
        else:
            message: Any = getattr(body, "header", body)
            message.request_id = ids.uuid7()
        return Asked(asked.example, asked.who, found, asked.metadata)

    async def ask(
        self, asked: Asked, extra: answers.Metadata = (), until: Callable[[answers.Answer], bool] | None = None
    ) -> answers.Answer:
        """Ask it. `until` says of a control's answer that it has come."""
        raise NotImplementedError

    def held(self, asked: Asked, until: Callable[[answers.Answer], bool] | None) -> Held | None:
        """How long it is listened to, where it goes on by itself; a control stops when it has what it must show."""
        return self.world.held if asked.example.live and until is None else None


class Rpc(Way):
    """Over gRPC."""

    kind = "grpc"
    most = 100

    async def ready(self, example: Example, who: Party, as_: Party | None = None) -> Asked:
        asked = await super().ready(example, who, as_)
        if isinstance(asked.body, Message):
            asked.body = [asked.body]
        asked.metadata = await self._metadata(example, asked.who)
        return asked

    def anew(self, asked: Asked) -> Asked:
        """The same under another request id, and from another address, where it says one: whoever fails too often is not heard any more."""
        found = super().anew(asked)
        if not getattr(found.body[0], "client_address", ""):
            return found
        body = copy.deepcopy(found.body)
        body[0].client_address = ways.a_client()["X-Forwarded-For"]
        return Asked(found.example, found.who, body, found.metadata)

    async def _metadata(self, example: Example, who: Party) -> answers.Metadata:
        if example.by == NOBODY:
            # as the edge passes it on: who is nobody comes from an address
            return self.world.service("gateway")
        if example.by in PEOPLE:
            return who.bearer
        closes = example.name.endswith("CloseContext")
        token = "" if not example.context else (await self.world.opened(who)).context_token if closes else who.things.context_token
        return self.world.service(example.by, token)

    def places(self, asked: Asked) -> Iterator[leaves.Path]:
        return leaves.of_message(METHODS[asked.example.name].input_type)

    def written(self, asked: Asked, place: leaves.Path, value: str) -> Asked:
        return Asked(asked.example, asked.who, leaves.written(asked.body, place, value), asked.metadata)

    async def ask(
        self, asked: Asked, extra: answers.Metadata = (), until: Callable[[answers.Answer], bool] | None = None
    ) -> answers.Answer:
        example, channel = asked.example, self.world.channels[asked.example.name.partition(".")[0]]

        def enough(found: Sequence[Message]) -> bool:
            said = b"\n".join(one.SerializeToString() for one in found)
            return example.until(found) or (until is not None and bool(example.shows) and until(answers.Answer(answers.OK, "", said)))

        patience_s = answers.PATIENCE_S if until is None else answers.PATIENT_S
        metadata, held = (*asked.metadata, *extra), self.held(asked, until)
        for _ in range(_TRIES):
            answer = await answers.rpc(channel, METHODS[example.name], asked.body, metadata, patience_s, enough, held)
            if answer.code != "INTERNAL" or "from Core" not in answer.told:
                break
        return answer


class Edge(Way):
    """An RPC over POST /rpc, as JSON: once it is through there, it is what it is over gRPC."""

    kind = "http"
    most = 1

    def places(self, asked: Asked) -> Iterator[leaves.Path]:
        # a bytes field is base64 there: what cannot be read proves nothing
        return (path for path in leaves.of_message(METHODS[asked.example.name].input_type) if path[-1] != "{}" and _is_text(asked, path))

    def written(self, asked: Asked, place: leaves.Path, value: str) -> Asked:
        return Asked(asked.example, asked.who, leaves.written([asked.body], place, value)[0])

    async def ask(
        self, asked: Asked, extra: answers.Metadata = (), until: Callable[[answers.Answer], bool] | None = None
    ) -> answers.Answer:
        body = json_format.MessageToDict(asked.body, preserving_proto_field_name=True)
        body.pop("client_address", None)
        headers = ways.a_client() if asked.example.by == NOBODY else self.world.as_user(asked.who)
        return await answers.http(
            self.world.http, "POST", f"/rpc/{full(asked.example.name)}", json=body, headers=[*headers.items(), *extra]
        )


def _is_text(asked: Asked, path: leaves.Path) -> bool:
    descriptor: Any = METHODS[asked.example.name].input_type
    for name in path[:-1]:
        descriptor = descriptor.fields_by_name[str(name)].message_type
    one = descriptor.fields_by_name[str(path[-1])]
    return bool(one.type == one.TYPE_STRING and one.name != "client_address")


class Route(Way):
    """Over HTTP."""

    kind = "http"

    def places(self, asked: Asked) -> Iterator[leaves.Path]:
        wanted: Wanted = asked.body
        for part in ("path", "query", "headers", "json", "form"):
            for path in leaves.of_json(getattr(wanted, part)):
                yield (part, *path)

    def written(self, asked: Asked, place: leaves.Path, value: str) -> Asked:
        wanted: Wanted = asked.body
        parts = {part: getattr(wanted, part) for part in ("path", "query", "headers", "json", "form", "content")}
        parts[str(place[0])] = leaves.placed(parts[str(place[0])], place[1:], value)
        return Asked(asked.example, asked.who, Wanted(**parts))

    async def ask(
        self, asked: Asked, extra: answers.Metadata = (), until: Callable[[answers.Answer], bool] | None = None
    ) -> answers.Answer:
        wanted: Wanted = asked.body
        method, _, template = asked.example.name.partition(" ")
        path = template.format(**{name: quote(value, safe="") for name, value in wanted.path.items()})
        headers = ways.a_client() if asked.example.by == NOBODY else self.world.as_user(asked.who)
        body: dict[str, Any] = {"json": wanted.json} if wanted.json is not None else {}
        body |= {"data": wanted.form} if wanted.form is not None else {}
        body |= {"content": wanted.content} if wanted.content is not None else {}
        more = [*headers.items(), *wanted.headers.items(), *extra]
        held = self.held(asked, until)
        return await answers.http(self.world.http, method, path, held=held, params=wanted.query, headers=more, **body)


class Frames(Way):
    """Over the socket: each asks through one of their own; `STREAM <rpc>` opens a streaming RPC."""

    kind = "frame"

    def places(self, asked: Asked) -> Iterator[leaves.Path]:
        return (path for path in leaves.of_json(asked.body) if path[0] in ("payload", "thread_id", "id") and path != ("payload", "method"))

    def written(self, asked: Asked, place: leaves.Path, value: str) -> Asked:
        return Asked(asked.example, asked.who, leaves.placed(asked.body, place, value))

    async def ask(
        self, asked: Asked, extra: answers.Metadata = (), until: Callable[[answers.Answer], bool] | None = None
    ) -> answers.Answer:
        body = dict(asked.body)
        kind = asked.example.name.partition(" ")[0].partition("#")[0]
        async with _socket(self.world, asked.who) as socket:
            if prepare := body.pop("before", None):
                before = await socket.ask(prepare["type"], prepare["payload"])
                if before["type"] == "error":
                    return answers.frame(before, socket.frames)
                body["payload"] = {**body["payload"], body.pop("needs"): before["data"][body.pop("gives")]}
            answer = await socket.ask(kind, body.pop("payload", None), **body)
            held, streams, silent = self.held(asked, until), kind in ("STREAM", "RESUME"), False
            if answer["type"] == "ack" and (streams or held is not None):
                silent = await _streamed(socket, answer, until, held, says=streams)
            found = answers.frame(answer, [frame for frame in socket.frames if frame is not answer])
            found.silent = silent
            return found


@contextlib.asynccontextmanager
async def _socket(world: World, who: Party) -> AsyncIterator[sockets.Socket]:
    try:
        async with sockets.opened(world.system, who.token, additional_headers=ways.a_client(), proxy=None) as socket:
            yield socket
    except websockets.InvalidStatus as refused:
        raise OSError(f"no socket: {refused.response.status_code}") from None


async def _streamed(
    socket: sockets.Socket, ack: dict[str, Any], until: Callable[[answers.Answer], bool] | None, held: Held | None, *, says: bool
) -> bool:
    """Take what follows. Of a stream only what is its own counts, whatever else the socket hears meanwhile; what is not one `says`
    nothing that would be waited for. Returns whether there was only silence."""
    found: list[dict[str, Any]] = []
    stream_id = ack["data"].get("stream_id")

    async def read() -> Heard:
        while (frame := await socket.next(_LONG_S)).get("stream_id") != stream_id:
            pass
        found.append(frame)
        if frame["type"] == "stream_end":
            return Heard.ENDED
        enough = len(found) >= _FRAMES or (until is not None and until(answers.frame(ack, found)))
        return Heard.ENOUGH if enough else Heard.MORE

    first_s, then_s = (answers.FIRST_S, answers.PATIENCE_S) if until is None else (answers.PATIENT_S, answers.PATIENT_S)
    return await listen(read, first_s if says else 0, then_s if says else 0, held)
