"""A gRPC server: what is around each call, health and reflection."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc

from chassis import audit, calls, identity, lifecycle, log, status, tally, telemetry, tls
from netra import deadline, errors
from netra.access.v1 import access_pb2

_log = log.get(__name__)
_OPEN = frozenset({health.SERVICE_NAME, reflection.SERVICE_NAME})
_MAX_MESSAGE = 4 * 1024 * 1024
_OPTIONS = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", _MAX_MESSAGE),
    # tokens beyond their own limit still get an answer that says so
    ("grpc.max_metadata_size", 32 * 1024),
    ("grpc.absolute_max_metadata_size", 48 * 1024),
    # small windows: a stalled reader must not pile up megabytes
    ("grpc.http2.lookahead_bytes", 65536),
    ("grpc.http2.bdp_probe", 0),
    # both ends of keepalive are set, or eager clients get GOAWAY
    ("grpc.http2.min_ping_interval_without_data_ms", 2_500),
    ("grpc.keepalive_permit_without_calls", 1),
)
_ended = tally.Tally("netra.rpc.server.calls", "Calls that ended, by method and code.", "method", "code")
_seconds = tally.Durations("netra_rpc_server_duration_seconds", "How long calls took, by method.", "method")


class MissingAccessRule(Exception):
    """An RPC has no access rule, so nobody can say who may call it."""


class _Malformed:
    """Stands for a request that is not the protobuf it should be."""


@dataclass(frozen=True, slots=True)
class _Suspect:
    """A request in which there is a NUL somewhere."""

    message: Message


@dataclass(frozen=True, slots=True)
class _Method:
    """What is the same for all calls of one method."""

    # as the path of its calls says it, with a slash first
    path: str
    rule: access_pb2.Rule

    @property
    def name(self) -> str:
        return self.path[1:]


def rules(descriptor: ServiceDescriptor) -> dict[str, access_pb2.Rule]:
    """Full method name -> access rule. Raises `MissingAccessRule` naming each method without one."""
    found, missing = {}, []
    for method in descriptor.methods:
        rule = method.GetOptions().Extensions[access_pb2.rule]
        if not (rule.public or rule.permission or rule.services):
            missing.append(f"{descriptor.full_name}/{method.name}")
        found[f"/{descriptor.full_name}/{method.name}"] = rule
    if missing:
        raise MissingAccessRule(f"no access rule: {', '.join(missing)}. Add option (netra.access.v1.rule) to each in its .proto")
    return found


@dataclass(frozen=True, slots=True)
class _Asked(grpc.HandlerCallDetails):
    """For the handler of which method is asked."""

    method: str
    invocation_metadata: tuple[tuple[str, str], ...] = ()


class _Mounted(grpc.GenericRpcHandler):
    """Handlers by the paths of their methods."""

    def __init__(self, handlers: Mapping[str, Any]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """The handler; None when the method is not one of these."""
        return self._handlers.get(handler_call_details.method)


class _Around:
    """Around every call, from outside in: deadline, correlation and trace, errors, identity and access rule, metrics.

    To servicers it is the server. An interceptor of gRPC's would be asked anew for each call, health checks included.
    """

    def __init__(
        self, server: grpc.aio.Server, known: dict[str, access_pb2.Rule], authenticator: identity.Authenticator,
        refusals: audit.Refusals | None, *, certified: bool,
    ) -> None:  # fmt: skip
        self._server = server
        self._rules = known
        self._authenticator = authenticator
        self._refusals = refusals
        self._certified = certified
        self._calls = calls.Calls(authenticator.verifier.trust)

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Mount what stands in the place of each handler of a method that has a rule; others are not there."""
        mounted = {}
        for path, rule in self._rules.items():
            found = [found for each in handlers if (found := each.service(_Asked(path))) is not None]
            if found:
                mounted[path] = self._wrapped(found[0], _Method(path, rule))
        self._server.add_generic_rpc_handlers((_Mounted(mounted),))

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Nothing: see `_Unregistered`."""

    def _wrapped(self, handler: Any, method: _Method) -> Any:
        kind = ("stream" if handler.request_streaming else "unary") + "_" + ("stream" if handler.response_streaming else "unary")
        behaviour = getattr(handler, kind)
        around = self._streaming(behaviour, method) if handler.response_streaming else self._single(behaviour, method)
        make: Callable[..., Any] = getattr(grpc, f"{kind}_rpc_method_handler")
        return make(
            around,
            request_deserializer=_tolerant(handler.request_deserializer, looking=not handler.request_streaming),
            response_serializer=handler.response_serializer,
        )

    def _single(self, behaviour: Any, method: _Method) -> Any:
        name = method.name

        async def around(request: Any, context: Any) -> Any:
            deadline.bind(context.time_remaining())
            metadata = _text(context.invocation_metadata())
            with telemetry.span(name, metadata, "SERVER") as span:
                began = time.perf_counter()
                code = "OK"
                try:
                    request = await self._admit(method, metadata, request, context)
                    with self._calls.under_way(identity.current().principal):
                        return await behaviour(request, context)
                except (Exception, asyncio.CancelledError) as error:
                    if _is_over(error):
                        raise
                    known = status.as_netra(error)
                    code = known.code
                    telemetry.failed(span, code)
                    self._note(method, metadata, request, known)
                    await status.abort(context, known)
                finally:
                    _seconds.add(time.perf_counter() - began, method.path)
                    _ended.add(1, method.path, code)

        return around

    def _streaming(self, behaviour: Any, method: _Method) -> Any:
        name = method.name

        async def around(request: Any, context: Any) -> AsyncIterator[Any]:
            deadline.bind(context.time_remaining())
            metadata = _text(context.invocation_metadata())
            with telemetry.span(name, metadata, "SERVER") as span:
                began = time.perf_counter()
                code = "OK"
                try:
                    request = await self._admit(method, metadata, request, context)
                    async with contextlib.aclosing(behaviour(request, context)) as responses:
                        async for response in responses:
                            self._calls.check(identity.current().principal)
                            yield response
                except (Exception, asyncio.CancelledError) as error:
                    if _is_over(error):
                        raise
                    known = status.as_netra(error)
                    code = known.code
                    telemetry.failed(span, code)
                    self._note(method, metadata, request, known)
                    await status.abort(context, known)
                finally:
                    _seconds.add(time.perf_counter() - began, method.path)
                    _ended.add(1, method.path, code)

        return around

    def _note(self, method: _Method, metadata: dict[str, str], request: Any, error: errors.NetraError) -> None:
        if self._refusals is not None:
            # where anybody may call, what is refused came in the message
            with_credential = method.rule.public or "authorization" in metadata
            self._refusals.note(_what(method, request), error, identity.current(), with_credential=with_credential)

    async def _admit(self, method: _Method, metadata: dict[str, str], request: Any, context: Any) -> Any:
        # nobody yet: who is refused must not be taken for whoever started this process
        identity.bind(identity.Caller())
        peer = tls.peer_names(context.auth_context()) if self._certified else None
        caller = await self._authenticator.admit(method.rule, metadata, peer)
        identity.bind(caller)
        if caller.principal is not None or caller.context is not None:
            log.bind(user_id=caller.user_id)
        if isinstance(request, _Malformed):
            raise errors.InvalidPayload("The request is not a valid protobuf message of this method.")
        # only now: nobody is looked at twice whom the rule does not let in
        return _checked(request.message) if isinstance(request, _Suspect) else request


def _is_over(error: BaseException) -> bool:
    """Whether nobody waits for an answer any more: the caller has gone, or grpc has cut the call and says so itself.

    Otherwise it was something that the call waited for which was cancelled. Without an answer the caller would wait to their deadline.
    """
    return isinstance(error, asyncio.CancelledError) and lifecycle.told_to_stop()


def _what(method: _Method, request: Any) -> str:
    """The method, and which of several things it was asked for."""
    chosen = [request.WhichOneof(one.name) for one in request.DESCRIPTOR.oneofs] if isinstance(request, Message) else []
    return " ".join([method.name, *filter(None, chosen)])


def _text(metadata: Any) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in metadata or ():
        if isinstance(value, str):
            # two tokens are none: nobody may choose which one counts
            found[key] = f"{found[key]},{value}" if key in found else value
    return found


def _tolerant(deserialize: Any, *, looking: bool) -> Any:
    # grpc answers a request it cannot decode with UNKNOWN before any interceptor runs
    def decode(data: bytes) -> Any:
        try:
            message = deserialize(data)
        except DecodeError:
            return _Malformed()
        return _Suspect(message) if looking and b"\0" in data else message

    return decode


def _checked(message: Message) -> Message:
    """The same. Raises `InvalidPayload` naming the text that holds a NUL, which no database takes."""
    if place := _place_of_nul(message):
        raise errors.InvalidPayload(f"{place} must not hold a NUL character", field=place)
    return message


def _place_of_nul(message: Message, within: str = "") -> str:
    for field, value in message.ListFields():
        place = f"{within}{field.name}"
        parts = value if isinstance(value, Sequence) and not isinstance(value, str | bytes) else [value]
        if isinstance(parts[0], str):
            # secrets are left to whoever compares them: a wrong one is answered as such, whatever is in it
            if not log.names_a_secret(field.name) and "\0" in "".join(parts):
                return place
        elif isinstance(parts[0], Message):
            numbered = parts is value
            inside = (_place_of_nul(part, f"{place}[{at}]." if numbered else f"{place}.") for at, part in enumerate(parts))
            if found := next(filter(None, inside), ""):
                return found
    return ""


class _Unregistered:
    """To the servicers of gRPC's own services it is the server, which finds methods by name.

    Of methods that are registered it waits for the next call of each, of all of them anew with every call of any: with the methods of a
    service that is a tenth of what a call costs.
    """

    def __init__(self, server: grpc.aio.Server) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Nothing."""


class Server:
    """One listening gRPC server. It is NOT_SERVING until `serving(True)`."""

    def __init__(
        self, host: str, port: int, authenticator: identity.Authenticator, drain_s: float, certificates: tls.Certificates | None = None,
        refusals: audit.Refusals | None = None,
    ) -> None:  # fmt: skip
        self._address = f"{host}:{port}"
        self._refusals = refusals
        self._certificates = certificates
        self._authenticator = authenticator
        self._drain_s = drain_s
        self._health = health.aio.HealthServicer()
        self._known: dict[str, access_pb2.Rule] = {}
        self._adders: list[Callable[[_Around], None]] = []
        self._server: grpc.aio.Server | None = None
        self.draining = asyncio.Event()
        self.port = port

    def add(self, descriptor: ServiceDescriptor, adder: Callable[[Any, Any], None], servicer: object) -> None:
        """Mount a servicer. Raises `MissingAccessRule` when one of its methods has no rule."""
        self._known |= rules(descriptor)
        self._adders.append(lambda around: adder(servicer, around))

    async def start(self) -> None:
        """Listen. Raises `OSError` when the address is taken."""
        server = grpc.aio.server(options=_OPTIONS)
        around = _Around(server, self._known, self._authenticator, self._refusals, certified=self._certificates is not None)
        for adder in self._adders:
            adder(around)
        by_name: Any = _Unregistered(server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, by_name)
        names = {name.rpartition("/")[0][1:] for name in self._known}
        describe: Callable[..., None] = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
        describe(reflection.aio.ReflectionServicer((*sorted(names), *sorted(_OPEN))), by_name)
        await self.serving(False)
        try:
            if self._certificates is None:
                self.port = server.add_insecure_port(self._address)
            else:
                self.port = server.add_secure_port(self._address, self._certificates.server())
        except RuntimeError:
            raise OSError(f"{self._address} is in use. Stop what listens there, or set another port.") from None
        await server.start()
        self._server = server

    async def serving(self, ready: bool) -> None:
        """Say over grpc.health.v1 whether calls are welcome."""
        state = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set("", state)

    async def part(self, name: str, ok: bool) -> None:
        """Say over grpc.health.v1 how a part of this process is, under its own name; whether calls are welcome is another matter."""
        state = health_pb2.HealthCheckResponse.SERVING if ok else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set(name, state)

    async def drain(self) -> None:
        """NOT_SERVING first, then streams are asked to end, then open calls get their time, then the rest is cut."""
        await self._health.enter_graceful_shutdown()
        self.draining.set()
        if self._server is not None:
            await self._server.stop(self._drain_s)
