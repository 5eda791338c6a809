"""A gRPC channel with keepalive, deadlines, retry policy and interceptors."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable
from typing import Any, Self

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor

from chassis import log, status, telemetry, tls
from netra import deadline, errors
from netra.auth.v1 import auth_pb2, auth_pb2_grpc

_log = log.get(__name__)
DEFAULT_TIMEOUT_S = 10.0
# only what may be done twice is tried again: what carries a request id is done once all the same, and reading changes nothing.
# The rest is told to whoever asked; what a broken connection never took along is sent again by grpc itself.
_READS = ("Get", "List", "Query", "Verify", "Watch")
_RETRY = {
    "maxAttempts": 4, "initialBackoff": "0.05s", "maxBackoff": "0.5s", "backoffMultiplier": 2, "retryableStatusCodes": ["UNAVAILABLE"],
}  # fmt: skip
_OPTIONS = (
    # a peer that is stopped is found out within 10 s, also by who only listens (grpc heeds the last of these three)
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    # grpc's name for the time a connection may take, its handshake included: a busy peer needs longer than the pause between two attempts
    ("grpc.min_reconnect_backoff_ms", 3_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.max_receive_message_length", 4 * 1024 * 1024),
    ("grpc.http2.lookahead_bytes", 65536),
    ("grpc.http2.bdp_probe", 0),
)
Metadata = tuple[tuple[str, str], ...]
Authorize = Callable[[], Awaitable[Metadata]]


class _Interceptor:
    """On every call, in this order: deadline, correlation and trace, identity."""

    def __init__(self, authorize: Authorize | None) -> None:
        self._authorize = authorize

    async def metadata(self, own: Iterable[tuple[str, Any]] | None) -> list[tuple[str, Any]]:
        """What goes with a call that brings this."""
        metadata = [*(own or ()), *telemetry.carrier().items()]
        if self._authorize is not None and not any(key == "authorization" for key, _ in metadata):
            metadata += await self._authorize()
        return metadata

    async def _details(self, details: Any) -> grpc.aio.ClientCallDetails:
        return grpc.aio.ClientCallDetails(
            details.method, deadline.timeout(details.timeout), grpc.aio.Metadata(*await self.metadata(details.metadata)),
            details.credentials, details.wait_for_ready,
        )  # fmt: skip


class _UnaryStream(_Interceptor, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(await self._details(client_call_details), request)


class _StreamUnary(_Interceptor, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return _Refusable(await continuation(await self._details(client_call_details), request_iterator))


class _Refusable:
    """A client-streaming call that raises what its server said, also when that came while messages were on their way.

    Without it grpc puts INTERNAL in the place of the status when such a message cannot be sent any more (grpc/grpc#36066).
    """

    def __init__(self, call: Any) -> None:
        self._call = call
        self._refused: grpc.aio.AioRpcError | None = None
        call.add_done_callback(self._ended)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._call, name)

    def __await__(self) -> Generator[Any, None, Any]:
        try:
            return (yield from self._call.__await__())
        except grpc.aio.AioRpcError as error:
            raise self._refused or error from None

    def _ended(self, call: Any) -> None:
        # called for each status that is set; what is set is read without waiting
        code, details, trailing = (_at_once(known()) for known in (call.code, call.details, call.trailing_metadata))
        lost = code is grpc.StatusCode.INTERNAL and not trailing
        if self._refused is None and code is not grpc.StatusCode.OK and not lost:
            self._refused = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing or grpc.aio.Metadata(), details)


def _at_once(known: Coroutine[Any, Any, Any]) -> Any:
    """What a coroutine returns that has nothing to wait for."""
    try:
        known.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("it waits")


class _StreamStream(_Interceptor, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(self, continuation: Any, client_call_details: Any, request_iterator: Any) -> Any:
        return await continuation(await self._details(client_call_details), request_iterator)


class _UnaryUnary(_Interceptor):
    """A method of one request and one answer. Its calls carry what those of other kinds do: for an interceptor grpc would make a task of
    each.
    """

    def __init__(self, method: Any, authorize: Authorize | None) -> None:
        super().__init__(authorize)
        self._method = method

    async def __call__(self, request: Any, *, timeout: float | None = None, metadata: Any = None, **more: Any) -> Any:
        carried = await self.metadata(metadata)
        return await self._method(request, timeout=deadline.timeout(timeout or DEFAULT_TIMEOUT_S), metadata=carried, **more)


def repeatable(method: MethodDescriptor) -> bool:
    """Whether a call may be made again when nobody knows what became of it."""
    return "request_id" in method.input_type.fields_by_name or method.name.startswith(_READS)


def _options(name: str) -> tuple[tuple[str, str | int], ...]:
    """Those of a channel to a service; one that nobody named repeats nothing."""
    try:
        service = descriptor_pool.Default().FindServiceByName(f"netra.{name}.v1.{name.capitalize()}Service")
    except KeyError:
        return _OPTIONS
    names = [{"service": service.full_name, "method": method.name} for method in service.methods if repeatable(method)]
    return (*_OPTIONS, ("grpc.service_config", json.dumps({"methodConfig": [{"name": names, "retryPolicy": _RETRY}]})))


def connect(
    target: str, authorize: Authorize | None = None, *, certificates: tls.Certificates | None = None, name: str = ""
) -> grpc.aio.Channel:
    """A channel to `host:port`. With `authorize`, calls without an `authorization` of their own get its metadata.

    `name` is the service there: it tells which calls may be repeated. With certificates both ends prove who they are: the
    other one by a certificate for `name`.
    """
    kinds = (_UnaryStream, _StreamUnary, _StreamStream)
    interceptors: list[grpc.aio.ClientInterceptor] = [kind(authorize) for kind in kinds]
    if certificates is None:
        return _Carrying(grpc.aio.insecure_channel(target, options=_options(name), interceptors=interceptors), authorize)
    options = (*_options(name), ("grpc.ssl_target_name_override", name))

    def made(pems: tls.Pems) -> grpc.aio.Channel:
        return _Carrying(grpc.aio.secure_channel(target, pems.for_channel(), options, interceptors=interceptors), authorize)

    return _Renewed(certificates, made)


class Chosen(grpc.aio.Channel):
    """A channel that is, for each call, the one that `choose` names then. Whoever made that one closes it."""

    def __init__(self, choose: Callable[[], grpc.aio.Channel]) -> None:
        self._choose = choose

    def method(self, wanted: _Method) -> Any:
        """The method on the channel of the next call."""
        return wanted.on(self._choose())

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self, grace: float | None = None) -> None:
        """Nothing of its own is open."""

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._choose().get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._choose().wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._choose().channel_ready()

    def unary_unary(self, *given: Any, **more: Any) -> Any:
        return _Method(self, "unary_unary", given, more)

    def unary_stream(self, *given: Any, **more: Any) -> Any:
        return _Method(self, "unary_stream", given, more)

    def stream_unary(self, *given: Any, **more: Any) -> Any:
        return _Method(self, "stream_unary", given, more)

    def stream_stream(self, *given: Any, **more: Any) -> Any:
        return _Method(self, "stream_stream", given, more)


class _Carrying(Chosen):
    """A channel whose calls carry what `_Interceptor` adds. It is this one's to close."""

    def __init__(self, channel: grpc.aio.Channel, authorize: Authorize | None) -> None:
        super().__init__(lambda: channel)
        self._channel, self._authorize = channel, authorize

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    def unary_unary(self, *given: Any, **more: Any) -> Any:
        return _UnaryUnary(self._channel.unary_unary(*given, **more), self._authorize)

    # calls of the other kinds are intercepted

    def unary_stream(self, *given: Any, **more: Any) -> Any:
        return self._channel.unary_stream(*given, **more)

    def stream_unary(self, *given: Any, **more: Any) -> Any:
        return self._channel.stream_unary(*given, **more)

    def stream_stream(self, *given: Any, **more: Any) -> Any:
        return self._channel.stream_stream(*given, **more)


class _Renewed(Chosen):
    """A channel that is made anew when the certificate is; calls that are open end on the one they began on."""

    def __init__(self, certificates: tls.Certificates, make: Callable[[tls.Pems], grpc.aio.Channel]) -> None:
        super().__init__(self._now)
        self._certificates, self._make = certificates, make
        self._pems = certificates.current()
        self._channel = make(self._pems)
        # a call that is about to begin may still need it
        self._before: grpc.aio.Channel | None = None
        self._methods: dict[_Method, Any] = {}

    def _now(self) -> grpc.aio.Channel:
        pems = self._certificates.current()
        if pems is not self._pems:
            self._pems, self._before, self._channel = pems, self._channel, self._make(pems)
            self._methods.clear()
        return self._channel

    def method(self, wanted: _Method) -> Any:
        """The method on the channel of the next call."""
        channel = self._now()
        if wanted not in self._methods:
            self._methods[wanted] = wanted.on(channel)
        return self._methods[wanted]

    async def close(self, grace: float | None = None) -> None:
        for one in (self._before, self._channel):
            if one is not None:
                await one.close(grace)


class _Method:
    """One method, on whichever channel is the present one."""

    def __init__(self, chosen: Chosen, kind: str, given: tuple[Any, ...], more: dict[str, Any]) -> None:
        self._chosen, self._kind, self._given, self._more = chosen, kind, given, more

    def on(self, channel: grpc.aio.Channel) -> Any:
        """The method as a channel makes it."""
        return getattr(channel, self._kind)(*self._given, **self._more)

    def __call__(self, *given: Any, **more: Any) -> Any:
        return self._chosen.method(self)(*given, **more)


def bearer(token: str) -> Metadata:
    """Metadata that makes a call in the name of the token."""
    return (("authorization", f"Bearer {token}"),)


class ServiceCredentials:
    """The service token of this process (client credentials), renewed at half of its life."""

    def __init__(self, name: str, secret: str, stub: auth_pb2_grpc.AuthServiceAsyncStub) -> None:
        self._name, self._secret, self._stub = name, secret, stub
        self._token = ""
        self._renew_at = self._ends_at = 0.0
        self._renewing = asyncio.Lock()

    async def __call__(self) -> Metadata:
        """Metadata with a valid token. Raises `Unavailable` when there is none and auth cannot be reached."""
        if time.monotonic() >= self._renew_at:
            async with self._renewing:
                if time.monotonic() >= self._renew_at:
                    await self._renew()
        return bearer(self._token)

    async def _renew(self) -> None:
        grant = auth_pb2.ClientCredentialsGrant(client_id=self._name, client_secret=self._secret)
        try:
            with status.translated():
                answer = await self._stub.IssueToken(auth_pb2.IssueTokenRequest(client_credentials=grant), timeout=5.0)
        except errors.NetraError as error:
            if time.monotonic() < self._ends_at:
                self._renew_at = time.monotonic() + 5.0
                _log.warning("the service token could not be renewed; going on with the old one", code=error.code)
                return
            raise
        self._token = answer.tokens.access_token
        lifetime = answer.tokens.expires_in.ToTimedelta().total_seconds()
        self._renew_at = time.monotonic() + lifetime / 2
        self._ends_at = time.monotonic() + lifetime
