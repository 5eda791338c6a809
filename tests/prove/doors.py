"""Requests that try a door that should not be there: identity in headers, tokens in addresses, foreign pages, other names of a method."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial

import grpc
import websockets

from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from tests.fixtures import web
from tests.prove import hostile, ways
from tests.prove.place import Place

# what is tried, the outcomes that are right, separated by spaces, and how
Try = tuple[str, str, Callable[[], Awaitable[str]]]


def every(place: Place) -> list[Try]:
    """All of them."""
    return [*_spoofed(place), *_addresses(place), *_foreign_pages(place), *_method_names(place)]


def _spoofed(place: Place) -> list[Try]:
    """Identity by header is not believed, beside a token or without one."""

    async def http(headers: dict[str, str], path: str = "/v1/me") -> str:
        async with web.client(base_url=place.url, timeout=30) as client:
            answer = await client.get(path, headers={**ways.a_client(), **headers})
        if answer.status_code == 200 and answer.json()["user_id"] != place.user.user_id:
            return "SPOOFED"
        return str(answer.status_code)

    async def rpc(*metadata: tuple[str, str]) -> str:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{place.system.ports['auth']}") as channel:
            stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(channel)
            try:
                answer = await stub.GetPermissions(auth_pb2.GetPermissionsRequest(), metadata=metadata)
            except grpc.aio.AioRpcError as error:
                return error.code().name
        return "OK" if answer.principal.user_id == place.user.user_id and "users:write" not in answer.permissions else "SPOOFED"

    names = "x-user-id x-netra-user-id x-forwarded-user x-remote-user x-auth-request-user user-id x-roles x-netra-roles".split()
    good = place.user.token
    mine, admin = ("authorization", f"Bearer {good}"), ("authorization", f"Bearer {place.admin}")
    found: list[Try] = []
    for name in names:
        value = "admin" if "roles" in name else place.other.user_id
        found += [
            (f"http {name} alone", "401", partial(http, {name: value})),
            (f"http {name} beside a token", "200", partial(http, {name: value, "Authorization": f"Bearer {good}"})),
            (f"grpc {name} alone", "UNAUTHENTICATED", partial(rpc, (name, value))),
            (f"grpc {name} beside a token", "OK", partial(rpc, (name, value), mine)),
        ]
    context = place.forge.token(hostile.CONTEXT)
    return [
        *found,
        ("grpc context token alone", "UNAUTHENTICATED", lambda: rpc(("x-netra-context", context))),
        ("grpc two tokens, theirs first", "UNAUTHENTICATED", lambda: rpc(mine, admin)),
        ("grpc two tokens, theirs last", "UNAUTHENTICATED", lambda: rpc(admin, mine)),
        ("grpc Basic", "UNAUTHENTICATED", lambda: rpc(("authorization", f"Basic {good}"))),
        ("http two tokens", "401", lambda: _raw(place, "/v1/me", f"Authorization: Bearer {good}", f"Authorization: Bearer {place.admin}")),
        ("http token in a cookie", "401", lambda: http({"Cookie": f"access_token={good}; Authorization=Bearer {good}"})),
    ]


async def _raw(place: Place, path: str, *headers: str, method: str = "GET", body: str = "") -> str:
    """The status of a request that is sent as it is written."""
    reader, writer = await asyncio.open_connection("127.0.0.1", place.system.ports["gateway"])
    try:
        forwarded = ways.a_client()["X-Forwarded-For"]
        lines = [f"{method} {path} HTTP/1.1", "Host: netra", "Connection: close", f"X-Forwarded-For: {forwarded}", *headers]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        writer.write("\r\n".join([*lines, "", body]).encode())
        async with asyncio.timeout(20):
            words = (await reader.readline()).split()
        return words[1].decode() if len(words) > 1 else "CLOSED"
    finally:
        writer.close()


def _addresses(place: Place) -> list[Try]:
    """A token in an address is never read."""
    names = "access_token token bearer jwt authorization Access_Token api_key".split()
    return [
        *((f"?{name}= over HTTP", "400 401", partial(_raw, place, f"/v1/me?{name}={place.user.token}")) for name in names),
        ("?token= over WebSocket", "400 401", partial(_shaken, place, f"?token={place.user.token}", "")),
        ("path with a token", "404", partial(_raw, place, f"/v1/me/{place.user.token}")),
    ]


async def _shaken(place: Place, query: str = "", token: str | None = None, **headers: str) -> str:
    token = place.user.token if token is None else token
    more = {**ways.a_client(), **headers, **({"Authorization": f"Bearer {token}"} if token else {})}
    try:
        async with websockets.connect(f"ws://127.0.0.1:{place.system.ports['gateway']}/ws{query}", additional_headers=more):
            return "OK"
    except websockets.InvalidStatus as refused:
        return str(refused.response.status_code)


def _foreign_pages(place: Place) -> list[Try]:
    """A page of another site may not open a socket, even with a good token."""
    origins = (
        "https://attacker.example", "null", "http://localhost.attacker.example", "http://127.0.0.1.attacker.example", "file://",
        "http://localhost:80@attacker.example", "https://netra.example.attacker.example",
    )  # fmt: skip
    return [(f"ws from {origin}", "403", partial(_shaken, place, Origin=origin)) for origin in origins]


def _method_names(place: Place) -> list[Try]:
    """A method has one name; what is not outside has none there."""
    service = "netra.auth.v1.AuthService"
    inside = ("WatchTrust", "PublishKey", "VerifyToken", "AppendAudit", "StartOidc", "FinishOidc", "ExportAudit")
    paths = [f"/rpc/{service}/{name}" for name in inside]
    paths += [f"/rpc/netra.context.v1.ContextService/{name}" for name in ("OpenContext", "AppendMessage")]
    paths += ["/rpc/netra.events.v1.EventsService/OpenRun", "/rpc/grpc.health.v1.Health/Check"]
    name = f"{service}/GetPermissions"
    paths += [
        f"/rpc//{name}", f"/rpc/./{name}", f"/rpc/x/../{name}", f"/rpc/{name}/", f"/rpc/{name};x", f"/rpc/{name}%00", f"/rpc/{name}%20",
        f"/rpc/{service}%2FGetPermissions", f"/rpc/{service}/Get%50ermissions", f"/rpc/{service}//GetPermissions", f"/RPC/{name}",
        f"/rpc/{name.lower()}", f"/rpc/{name.upper()}", f"/v1/../rpc/{name}", f"//rpc/{name}", f"/rpc/{service}.GetPermissions",
    ]  # fmt: skip
    token = f"Authorization: Bearer {place.admin}"
    found: list[Try] = [(f"http {path}", "404", partial(_raw, place, path, token, method="POST", body="{}")) for path in paths]
    names = (
        f"/{service}//WatchTrust", f"//{service}/WatchTrust", f"/{service}/WatchTrust/", f"/{service.lower()}/watchtrust",
        f"/{service}/Watch%54rust", f"/{service}/./WatchTrust", f"/x/../{service}/WatchTrust", f"{service}/WatchTrust",
        f"/{service}/WatchTrust\\", f"/{service}/WatchTrust;", f"/grpc.health.v1.Health/../{service}/WatchTrust",
    )  # fmt: skip
    return found + [(f"grpc {name}", "UNIMPLEMENTED", partial(_method, place, name)) for name in names]


async def _method(place: Place, name: str) -> str:
    async with grpc.aio.insecure_channel(f"127.0.0.1:{place.system.ports['auth']}") as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(name)
        try:
            await call(b"", metadata=(("authorization", f"Bearer {place.forge.token(hostile.SERVICE)}"),), timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return "OK"
