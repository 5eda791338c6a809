"""POST /rpc/{package.Service}/{Method}: every unary RPC that is marked for the edge, as JSON, under its own access rule."""

from __future__ import annotations

import functools
import re
import weakref
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import json_format, message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from starlette.requests import Request
from starlette.responses import Response

from chassis import channel, identity, replicas, status, telemetry
from gateway import bridge, callers, frames, problems, session, upstreams
from netra import errors
from netra.access.v1 import access_pb2
from netra.auth.v1 import auth_pb2
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2

Endpoint = Callable[[Request], Awaitable[Response]]
_FILES = {"auth": auth_pb2, "context": context_pb2, "dispatcher": dispatcher_pb2, "events": events_pb2}
_PREFIX = "/rpc/"
# what the gateway knows and clients may not say
_ADDRESS = "client_address"
# a tool has a deadline of its own, which its service keeps; this is the end of all patience
_PATIENCE_S = {"ExecuteTool": 3600.0}
_FIELD = re.compile(r'Failed to parse (\w{1,64}) field|no field named "([^"]{1,64})"|multiple "([^"]{1,64})" fields')


@dataclass(frozen=True, slots=True)
class Method:
    """One RPC that may be called from outside."""

    service: str
    descriptor: MethodDescriptor
    rule: access_pb2.Rule

    @property
    def path(self) -> str:
        """Its address."""
        return f"{_PREFIX}{self.descriptor.containing_service.full_name}/{self.descriptor.name}"


def methods() -> list[Method]:
    """All of them, by descriptor: what is not in this list does not exist outside."""
    return [one for one in _marked() if _is_outside(one)]


def _marked() -> list[Method]:
    found = [
        Method(name, method, method.GetOptions().Extensions[access_pb2.rule])
        for name, module in _FILES.items()
        for service in module.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]
    return [one for one in found if one.rule.edge]


def streams() -> list[Method]:
    """Those that answer with a stream: STREAM opens them."""
    return [one for one in _marked() if one.descriptor.server_streaming and not one.descriptor.client_streaming and one.rule.permission]


def streamed(channels: Mapping[str, grpc.aio.Channel], events: replicas.Each[grpc.aio.Channel]) -> dict[str, bridge.Method]:
    """The same, by name, ready to be called: the record at the replica of the user, as pages are."""

    def to(service: str, user_id: str) -> grpc.aio.Channel:
        return events.of(events.replicas.first(user_id)) if service == "events" else channels[service]

    return {one.path.removeprefix(_PREFIX): _streamed(one, functools.partial(to, one.service)) for one in streams()}


def _streamed(method: Method, to: Callable[[str], grpc.aio.Channel]) -> bridge.Method:
    request, response = (message_factory.GetMessageClass(one) for one in (method.descriptor.input_type, method.descriptor.output_type))
    # a channel keeps every method it was ever asked for
    known: weakref.WeakKeyDictionary[grpc.aio.Channel, Any] = weakref.WeakKeyDictionary()

    def call(who: identity.Principal, wanted: Message) -> Any:
        there = to(who.user_id)
        if there not in known:
            known[there] = there.unary_stream(method.path.removeprefix("/rpc"), request.SerializeToString, response.FromString)
        return known[there](wanted, metadata=channel.bearer(who.token))

    return bridge.Method(method.rule.permission, lambda fields: _message(request, fields), call, _json)


def _is_outside(method: Method) -> bool:
    unary = not (method.descriptor.client_streaming or method.descriptor.server_streaming)
    return unary and (method.rule.public or bool(method.rule.permission))


def _json(answer: Message) -> dict[str, Any]:
    return json_format.MessageToDict(answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


@dataclass(frozen=True, slots=True)
class _Callable:
    method: Method
    request: type[Message]
    call: Any


class Rpc:
    """Calls in the caller's name; the service itself applies the rule."""

    def __init__(self, edge: session.Edge, services: upstreams.Upstreams) -> None:
        self._edge, self._services = edge, services
        self._known = {method.path: _callable(method, services.channels[method.service]) for method in methods()}

    def routes(self) -> list[tuple[str, str, Endpoint]]:
        """Method, path, endpoint."""
        return [("POST", _PREFIX + "{method:path}", self.call)]

    async def call(self, request: Request) -> Response:
        """Any unary RPC marked for the edge: JSON in, JSON out."""
        found = self._known.get(_path(request))
        if found is None:
            raise errors.NotFound("There is no such RPC here. GET /openapi.json names those there are.")
        telemetry.annotate("rpc.method", found.method.path.removeprefix(_PREFIX))
        metadata = await self._metadata(request, found.method)
        wanted = _message(found.request, await problems.body_of(request, self._edge.settings.max_body_bytes))
        if _ADDRESS in found.request.DESCRIPTOR.fields_by_name:
            setattr(wanted, _ADDRESS, self._edge.callers.address(request))
        if isinstance(wanted, auth_pb2.IssueTokenRequest):
            wanted.device = callers.device(request, wanted.device)
        if isinstance(wanted, dispatcher_pb2.StartRunRequest):
            wanted.ClearField("received_at")
            wanted.ClearField("validated_at")
        with status.translated():
            answer = await found.call(wanted, metadata=metadata, timeout=_PATIENCE_S.get(found.method.descriptor.name))
        return problems.answer(_json(answer))

    async def _metadata(self, request: Request, method: Method) -> channel.Metadata:
        if method.rule.public:
            await self._edge.callers.nobody(request)
            return await self._services.credentials()
        who = await self._edge.callers.of(request)
        # the service decides; who may not call it is told before their body is looked at
        try:
            identity.require(self._edge.verifier.trust, who, method.rule.permission)
        except errors.PermissionDenied as error:
            self._edge.entitled.refused(method.path.removeprefix(_PREFIX), error, who)
            raise
        return channel.bearer(who.token)


def _callable(method: Method, to: grpc.aio.Channel) -> _Callable:
    request, response = (message_factory.GetMessageClass(one) for one in (method.descriptor.input_type, method.descriptor.output_type))
    call = to.unary_unary(method.path.removeprefix("/rpc"), request.SerializeToString, response.FromString)
    return _Callable(method, request, call)


def _path(request: Request) -> str:
    """The address as it was sent: one RPC has one, however else it may be written."""
    raw = request.scope.get("raw_path")
    return raw.decode("latin-1") if isinstance(raw, bytes) else ""


def _message(kind: type[Message], body: dict[str, Any]) -> Message:
    message = kind()
    _refuse_doubles(body, kind.DESCRIPTOR.name)
    try:
        json_format.ParseDict(body, message, max_recursion_depth=frames.MAX_DEPTH)
    except (json_format.ParseError, ValueError, TypeError) as error:
        found = _FIELD.search(str(error))
        field = next(filter(None, found.groups()), "body") if found else "body"
        # the parser quotes what was sent, and that may be a secret
        told = f"{field} does not belong there, or its value is of another kind; GET /openapi.json tells what does"
        raise errors.InvalidPayload(f"The body does not fit {kind.DESCRIPTOR.name}: {told}.", field=field) from None
    return message


def _refuse_doubles(value: Any, where: str) -> None:
    """`request_id` and `requestId` are one field: it may be there once."""
    if isinstance(value, list):
        for item in value:
            _refuse_doubles(item, where)
    elif isinstance(value, dict):
        plain = [name.replace("_", "").lower() for name in value]
        if len(set(plain)) != len(plain):
            raise errors.DuplicateKey(f"A field of {where} is there twice, written in two ways.")
        for name, item in value.items():
            _refuse_doubles(item, name[:64])
