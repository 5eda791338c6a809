"""Every way a token can come into the running system: gRPC, HTTP, WebSocket; each says what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
import websockets

from netra import ids
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from tests.fixtures import web
from tests.fixtures.forge import Forge
from tests.fixtures.stack import System, gateway_url
from tests.prove import hostile

# outcomes: a gRPC code, an HTTP status, the code of an error frame; UNSENDABLE where the way cannot carry the text
UNSENDABLE = "UNSENDABLE"
REFUSED = frozenset({"UNAUTHENTICATED", "401"})
# longer than an unknown key is waited for
_OPEN_S = 5.0
Way = Callable[[str], Awaitable[str]]


def a_client() -> dict[str, str]:
    """Headers of a client of its own: throttling by address must not answer for the verification of tokens."""
    return {"X-Forwarded-For": f"198.51.{random.randrange(256)}.{random.randrange(256)}"}


class Ways:
    """The ways into one running system, by what a token wants to be taken for."""

    def __init__(self, system: System, forge: Forge, stack: contextlib.AsyncExitStack) -> None:
        self._system, self._forge, self._stack = system, forge, stack
        self._http = web.client(base_url=gateway_url(system), timeout=30)
        self._auth: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(self._to("auth"))
        self._context: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(self._to("context"))
        self._runs: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(self._to("dispatcher"))
        self._events: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(self._to("events"))
        stack.push_async_callback(self._http.aclose)

    def _to(self, name: str) -> grpc.aio.Channel:
        to = grpc.aio.insecure_channel(f"127.0.0.1:{self._system.ports[name]}", (("grpc.max_metadata_size", 64 * 1024),))
        self._stack.push_async_callback(to.close, None)
        return to

    def of(self, typ: str) -> dict[str, Way]:
        """Name of the way -> way."""
        made = {
            hostile.ACCESS: self._of_users, hostile.SERVICE: self._of_services, hostile.CONTEXT: self._of_contexts,
            hostile.GRANT: self._of_grants,
        }  # fmt: skip
        return made[typ]()

    def _of_users(self) -> dict[str, Way]:
        return {
            "grpc auth.GetPermissions": lambda token: _rpc(lambda: self._auth.GetPermissions(_PERMISSIONS, metadata=_bearer(token))),
            "grpc context.ListThreads": lambda token: _rpc(lambda: self._context.ListThreads(_THREADS, metadata=_bearer(token))),
            "grpc dispatcher.ListRuns": lambda token: _rpc(lambda: self._runs.ListRuns(_RUNS, metadata=_bearer(token))),
            "grpc events.ListEvents": lambda token: _rpc(lambda: self._events.ListEvents(_EVENTS, metadata=_bearer(token))),
            "grpc events.Subscribe": lambda token: _stream(lambda: self._events.Subscribe(_SUBSCRIBE, metadata=_bearer(token))),
            "in auth.VerifyToken": self._verified,
            "in context.OpenContext": self._opened,
            "in events.Tail": self._joined,
            "http GET /v1/me": lambda token: self._get("/v1/me", token),
            "http GET /v1/runs": lambda token: self._get("/v1/runs", token),
            "http POST /rpc": lambda token: self._post("/rpc/netra.auth.v1.AuthService/GetPermissions", token),
            "http POST /auth/logout": lambda token: self._post("/auth/logout", token),
            "ws subprotocol": self._subprotocol,
            "ws header": self._socket_header,
            "ws AUTH frame": self._auth_frame,
        }

    def _of_services(self) -> dict[str, Way]:
        verify = auth_pb2.VerifyTokenRequest(access_token=self._forge.token(hostile.ACCESS))
        opening = context_pb2.OpenContextRequest(request_id=ids.uuid7(), access_token=self._forge.token(hostile.ACCESS))
        run = events_pb2.OpenRunRequest(run_id=ids.uuid7(), epoch=1, context_token=self._forge.token(hostile.CONTEXT))
        return {
            "grpc auth.VerifyToken": lambda token: _rpc(lambda: self._auth.VerifyToken(verify, metadata=_bearer(token))),
            "grpc context.OpenContext": lambda token: _rpc(lambda: self._context.OpenContext(opening, metadata=_bearer(token))),
            "grpc events.OpenRun": lambda token: _rpc(lambda: self._events.OpenRun(run, metadata=_bearer(token))),
            "grpc dispatcher.ListRuns": lambda token: _rpc(lambda: self._runs.ListRuns(_RUNS, metadata=_bearer(token))),
            "http GET /v1/me": lambda token: self._get("/v1/me", token),
            "ws subprotocol": self._subprotocol,
        }

    def _of_contexts(self) -> dict[str, Way]:
        return {
            "grpc context.RenewContext": lambda token: _rpc(
                lambda: self._context.RenewContext(_RENEW, metadata=(*self._dispatcher(), ("x-netra-context", _sendable(token))))
            ),
            "in events.OpenRun": lambda token: _rpc(
                lambda: self._events.OpenRun(
                    events_pb2.OpenRunRequest(run_id=ids.uuid7(), epoch=1, context_token=token), metadata=self._dispatcher()
                )
            ),
            "in events.ListSteps": lambda token: _rpc(
                lambda: self._events.ListSteps(
                    events_pb2.ListStepsRequest(run_id=ids.uuid7(), epoch=1, context_token=token), metadata=self._dispatcher()
                )
            ),
            "grpc dispatcher.ListRuns": lambda token: _rpc(lambda: self._runs.ListRuns(_RUNS, metadata=_bearer(token))),
            "http GET /v1/me": lambda token: self._get("/v1/me", token),
            "ws header": self._socket_header,
        }

    def _of_grants(self) -> dict[str, Way]:
        user = _bearer(self._forge.token(hostile.ACCESS))
        run_id = ids.uuid7()

        def listed(token: str) -> Any:
            return self._runs.ListRuns(dispatcher_pb2.ListRunsRequest(grant_token=token), metadata=user)

        def shown(token: str) -> Any:
            return self._runs.GetRun(dispatcher_pb2.GetRunRequest(run_id=run_id, grant_token=token), metadata=user)

        def cancelled(token: str) -> Any:
            return self._runs.CancelRun(dispatcher_pb2.CancelRunRequest(run_id=run_id, grant_token=token), metadata=user)

        def page(token: str) -> Any:
            return self._events.ListThreadEvents(events_pb2.ListThreadEventsRequest(run_id=run_id, grant_token=token), metadata=user)

        def followed(token: str) -> Any:
            return self._events.FollowThread(events_pb2.FollowThreadRequest(grant_token=token), metadata=user)

        return {
            "in dispatcher.ListRuns": lambda token: _known(token, _rpc, listed),
            "in dispatcher.GetRun": lambda token: _known(token, _rpc, shown),
            "in dispatcher.CancelRun": lambda token: _known(token, _rpc, cancelled),
            "in events.ListThreadEvents": lambda token: _known(token, _rpc, page),
            "in events.FollowThread": lambda token: _known(token, _stream, followed),
            "grpc events.ListEvents": lambda token: _rpc(lambda: self._events.ListEvents(_EVENTS, metadata=_bearer(token))),
            "http GET /v1/me": lambda token: self._get("/v1/me", token),
            "ws subprotocol": self._subprotocol,
        }

    def _dispatcher(self) -> tuple[tuple[str, str], ...]:
        return _bearer(self._forge.token(hostile.SERVICE))

    async def _verified(self, token: str) -> str:
        asked = lambda: self._auth.VerifyToken(auth_pb2.VerifyTokenRequest(access_token=token), metadata=self._dispatcher())  # noqa: E731
        outcome, answer = await _asked(asked)
        return outcome if answer is None or answer.valid else "UNAUTHENTICATED"

    async def _opened(self, token: str) -> str:
        def asked() -> Any:
            wanted = context_pb2.OpenContextRequest(request_id=ids.uuid7(), run_id=ids.uuid7(), access_token=token)
            return self._context.OpenContext(wanted, metadata=self._dispatcher())

        return await _rpc(asked)

    async def _joined(self, token: str) -> str:
        async def requests() -> AsyncIterator[events_pb2.TailRequest]:
            yield events_pb2.TailRequest(join=events_pb2.JoinUser(access_token=token))

        try:
            call = self._events.Tail(requests(), metadata=_bearer(self._forge.token(hostile.SERVICE, sub="gateway")), timeout=20)
            async for answer in call:
                for position in answer.positions:
                    call.cancel()
                    return "OK" if position.joined else "UNAUTHENTICATED"
        except grpc.aio.AioRpcError as error:
            return error.code().name
        except ValueError:
            return UNSENDABLE
        return "UNAUTHENTICATED"

    async def _get(self, path: str, token: str) -> str:
        return await self._asked_over_http("GET", path, token)

    async def _post(self, path: str, token: str) -> str:
        return await self._asked_over_http("POST", path, token)

    async def _asked_over_http(self, method: str, path: str, token: str) -> str:
        if not _fits_header(token):
            return UNSENDABLE
        headers = {**a_client(), "Authorization": f"Bearer {token}".encode(), "Content-Type": "application/json"}
        body = b"{}" if method == "POST" else None
        return str((await self._http.request(method, path, headers=headers, content=body)).status_code)  # type: ignore[arg-type]

    async def _subprotocol(self, token: str) -> str:
        if not token or not all((letter.isalnum() and letter.isascii()) or letter in "!#$%&'*+-.^_`|~" for letter in token):
            return UNSENDABLE
        return await self._shaken({}, "netra.v1", f"bearer.{token}")

    async def _socket_header(self, token: str) -> str:
        if not _fits_header(token) or not token.isascii():
            return UNSENDABLE
        return await self._shaken({"Authorization": f"Bearer {token}"})

    async def _shaken(self, headers: dict[str, str], *entries: str) -> str:
        more = {**a_client(), **headers}
        try:
            async with websockets.connect(self._ws, subprotocols=entries or None, additional_headers=more):  # type: ignore[arg-type]
                return "OK"
        except websockets.InvalidStatus as refused:
            return str(refused.response.status_code)

    @property
    def _ws(self) -> str:
        return f"ws://127.0.0.1:{self._system.ports['gateway']}/ws"

    async def _auth_frame(self, token: str) -> str:
        good = f"bearer.{self._forge.token(hostile.ACCESS)}"
        client = f"client.{ids.uuid7()}"
        async with websockets.connect(self._ws, subprotocols=["netra.v1", good, client], additional_headers=a_client()) as socket:  # type: ignore[list-item]
            await socket.recv()
            await socket.send(json.dumps({"type": "AUTH", "id": "a", "payload": {"access_token": token}}))
            while (answer := json.loads(await socket.recv())).get("id") != "a":
                pass
            return str(answer.get("code", "OK"))


_PERMISSIONS, _THREADS, _RUNS = auth_pb2.GetPermissionsRequest(), context_pb2.ListThreadsRequest(), dispatcher_pb2.ListRunsRequest()
_EVENTS, _SUBSCRIBE, _RENEW = events_pb2.ListEventsRequest(), events_pb2.SubscribeRequest(), context_pb2.RenewContextRequest()


def _bearer(token: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {_sendable(token)}"),)


def _sendable(token: str) -> str:
    """What metadata can carry: printable ASCII. Raises `ValueError`."""
    if not all(" " <= letter <= "~" for letter in token):
        raise ValueError("not for metadata")
    return token


def _fits_header(token: str) -> bool:
    return token == token.strip() and not any(ord(letter) < 32 or ord(letter) == 127 for letter in token)


async def _asked(call: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "OK", await call()
    except grpc.aio.AioRpcError as error:
        return error.code().name, None
    except (ValueError, UnicodeError):
        return UNSENDABLE, None


async def _rpc(call: Callable[[], Any]) -> str:
    return (await _asked(call))[0]


async def _known(token: str, how: Callable[[Callable[[], Any]], Awaitable[str]], call: Callable[[str], Any]) -> str:
    """No token at all is a call of its own, and no hostile one."""
    return await how(lambda: call(token)) if token else UNSENDABLE


async def _stream(call: Callable[[], Any]) -> str:
    try:
        opened = call()
        try:
            async with asyncio.timeout(_OPEN_S):
                await opened.read()
        except TimeoutError:
            pass  # it is open, and has nothing to say
        opened.cancel()
    except grpc.aio.AioRpcError as error:
        return error.code().name
    except (ValueError, UnicodeError):
        return UNSENDABLE
    return "OK"
