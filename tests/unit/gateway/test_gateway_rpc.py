"""Which RPCs are outside, under which addresses, and what of a body is taken."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import jsonschema_rs
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from chassis import channel
from gateway import app, http, openapi, problems, rpc
from gateway.settings import GatewaySettings
from netra import errors
from netra.access.v1 import access_pb2
from netra.auth.v1 import auth_pb2
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2


def _every() -> list[tuple[str, Any]]:
    modules = (auth_pb2, context_pb2, dispatcher_pb2, events_pb2)
    services = [service for module in modules for service in module.DESCRIPTOR.services_by_name.values()]
    return [(f"/rpc/{service.full_name}/{method.name}", method) for service in services for method in service.methods]


def test_outside_is_what_its_rule_says_and_nothing_else() -> None:
    outside = {method.path for method in rpc.methods()}
    for path, method in _every():
        rule = method.GetOptions().Extensions[access_pb2.rule]
        unary = not (method.client_streaming or method.server_streaming)
        assert (path in outside) == (rule.edge and unary), path
    assert "/rpc/netra.auth.v1.AuthService/IssueToken" in outside
    assert "/rpc/netra.auth.v1.AuthService/WatchTrust" not in outside


def test_streams_that_are_outside_answer_to_one_request_and_need_a_permission() -> None:
    found = {method.path: method for method in rpc.streams()}
    for path, method in _every():
        rule = method.GetOptions().Extensions[access_pb2.rule]
        assert (path in found) == (rule.edge and method.server_streaming), path
    assert all(method.rule.permission and not method.descriptor.client_streaming for method in found.values())
    assert {path.rpartition("/")[2] for path in found} == {
            "Subscribe", "ExportEvents", "ExportAudit", "GetArtifact", "ExportData", "ExportRuns", "FollowThread",
        }  # fmt: skip


class _Called:
    """A service that answers; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def unary_unary(self, path: str, serialize: Any, deserialize: Any) -> Any:
        async def call(request: Any, metadata: Any, timeout: float | None) -> Any:
            serialize(request)
            self.asked.append((path, request, metadata))
            return deserialize(b"")

        return call


class _Callers:
    async def of(self, connection: Any) -> Any:
        if not (token := problems.bearer(connection.headers)):
            raise errors.Unauthenticated
        return SimpleNamespace(token=token, roles=("user",), tier="free", scope=None)

    async def nobody(self, connection: Any) -> str:
        return self.address(connection)

    def address(self, connection: Any) -> str:
        return "198.51.100.1"


async def _own() -> channel.Metadata:
    return channel.bearer("the gateway's")


class _Edge:
    """The routes of the RPCs on one application."""

    def __init__(self, permission: str = "users:read") -> None:
        self.called = _Called()
        channels = dict.fromkeys(("auth", "context", "dispatcher", "events"), self.called)
        trust = SimpleNamespace(permissions=lambda roles, tier: {permission})
        self.refused: list[str] = []
        entitled = SimpleNamespace(refused=lambda what, error, who: self.refused.append(f"{what} {error.code}"))
        edge = SimpleNamespace(settings=GatewaySettings(), callers=_Callers(), verifier=SimpleNamespace(trust=trust), entitled=entitled)
        served = rpc.Rpc(edge, SimpleNamespace(channels=channels, credentials=_own))  # type: ignore[arg-type]
        routes = [Route(path, endpoint, methods=[method]) for method, path, endpoint in served.routes()]
        self._app = Starlette(routes=routes, exception_handlers={errors.NetraError: app._refused, 404: app._unknown, 405: app._unknown})

    async def post(
        self, raw_path: str, body: Any = None, user: str = "t", method: str = "POST", more: tuple[tuple[bytes, bytes], ...] = ()
    ) -> tuple[int, dict[str, Any]]:
        """Status and body of the answer."""
        from urllib.parse import unquote

        headers = [(b"content-type", b"application/json"), *([(b"authorization", f"Bearer {user}".encode())] if user else []), *more]
        scope = {
            "type": "http", "http_version": "1.1", "method": method, "path": unquote(raw_path), "raw_path": raw_path.encode(),
            "query_string": b"", "headers": headers, "root_path": "", "scheme": "http", "server": ("h", 80), "client": ("c", 1),
        }  # fmt: skip
        sent: list[Any] = []
        text = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()

        async def receive() -> Any:
            return {"type": "http.request", "body": text, "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        await self._app(scope, receive, send)
        return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]) or b"{}")


_GET_USER = "/rpc/netra.auth.v1.AuthService/GetUser"


async def test_a_call_goes_on_in_the_name_of_the_caller() -> None:
    edge = _Edge()
    assert (await edge.post(_GET_USER, {"user_id": "u"}))[0] == 200
    assert (await edge.post(_GET_USER, {"userId": "u"}))[0] == 200
    wanted = ("/netra.auth.v1.AuthService/GetUser", auth_pb2.GetUserRequest(user_id="u"), channel.bearer("t"))
    assert edge.called.asked == [wanted, wanted]
    assert (await edge.post(_GET_USER, {"user_id": "u"}, user=""))[0] == 401
    assert (await edge.post("/rpc/netra.auth.v1.AuthService/CreateUser", b"not looked at"))[0] == 403
    assert edge.refused == ["netra.auth.v1.AuthService/CreateUser PERMISSION_DENIED"]


async def test_what_anybody_may_call_is_called_by_the_gateway_with_the_address_that_it_saw() -> None:
    edge = _Edge()
    body = {"password": {"email": "e", "password": "p"}, "client_address": "127.0.0.1"}
    assert (await edge.post("/rpc/netra.auth.v1.AuthService/IssueToken", body, user=""))[0] == 200
    _, request, metadata = edge.called.asked[0]
    assert (request.client_address, metadata) == ("198.51.100.1", channel.bearer("the gateway's"))


async def test_nobody_says_for_the_gateway_when_a_message_came() -> None:
    edge = _Edge(permission="runs:write")
    long_ago = {"received_at": "2000-01-01T00:00:00Z", "validated_at": "2000-01-01T00:00:00Z"}
    assert (await edge.post("/rpc/netra.dispatcher.v1.DispatcherService/StartRun", {"request_id": "r", **long_ago}))[0] == 200
    assert edge.called.asked[0][1] == dispatcher_pb2.StartRunRequest(request_id="r")


@pytest.mark.parametrize(
    ("more", "device"), [((), "netra cli on a desk"), (((b"origin", b"null"),), "browser"), (((b"sec-fetch-site", b"none"),), "browser")]
)
async def test_a_page_is_no_command_line(more: tuple[tuple[bytes, bytes], ...], device: str) -> None:
    edge = _Edge()
    body = {"password": {"email": "e", "password": "p"}, "device": "netra cli on a desk"}
    assert (await edge.post("/rpc/netra.auth.v1.AuthService/IssueToken", body, "", more=more))[0] == 200
    assert edge.called.asked[0][1].device == device


@pytest.mark.parametrize(
    "raw_path",
    [
        "/rpc/netra.auth.v1.AuthService/WatchTrust", "/rpc/netra.auth.v1.AuthService/PublishKey", "/rpc/netra.auth.v1.AuthService/Nothing",
        "/rpc/netra.auth.v1.AuthService", "/rpc/", "/rpc/netra.auth.v1.AuthService/GetUser/", "/rpc//netra.auth.v1.AuthService/GetUser",
        "/rpc/netra.auth.v1.AuthService//GetUser", "/rpc/netra.auth.v1.AuthService/Get%55ser", "/rpc/netra.auth.v1.AuthService%2FGetUser",
        "/rpc/netra.auth.v1.AuthService/./GetUser", "/rpc/x/../netra.auth.v1.AuthService/GetUser",
        "/rpc/netra.auth.v1.AuthService/GetUser;x", "/rpc/netra.auth.v1.AuthService/GetUser%00", "/rpc/netra.auth.v1.AuthService/getuser",
        "/rpc/NETRA.AUTH.V1.AUTHSERVICE/GetUser", "/rpc/netra.auth.v1.AuthService/GetUser%20", "/rpc/grpc.health.v1.Health/Check",
        "/rpc/netra.events.v1.EventsService/Append", "/rpc/netra.context.v1.ContextService/OpenContext",
        "/rpc/netra.auth.v1.AuthService\\GetUser", "/rpc/netra.auth.v1.AuthService/GetUser%252e",
    ],
)  # fmt: skip
async def test_every_other_address_leads_nowhere(raw_path: str) -> None:
    edge = _Edge()
    status, body = await edge.post(raw_path, {})
    assert (status, body["code"]) == (404, "NOT_FOUND")
    assert edge.called.asked == []


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "HEAD"])
async def test_calls_are_posted(method: str) -> None:
    edge = _Edge()
    assert (await edge.post(_GET_USER, {}, method=method))[0] == 405
    assert edge.called.asked == []


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "BAD_JSON"),
        (b"[]", "NOT_AN_OBJECT"),
        (b'{"user_id":"a","user_id":"b"}', "DUPLICATE_KEY"),
        (b'{"user_id":"a","userId":"b"}', "DUPLICATE_KEY"),
        (b'{"user_id":1}', "INVALID_PAYLOAD"),
        (b'{"user_id":["a"]}', "INVALID_PAYLOAD"),
        (b'{"nobody":"a"}', "INVALID_PAYLOAD"),
        (b'{"user_id":"\\ud800"}', "BAD_JSON"),
        (b'{"user_id":NaN}', "BAD_JSON"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "INVALID_PAYLOAD"),
        (b'{"user_id":"' + b"x" * 300_000 + b'"}', "FRAME_TOO_LARGE"),
    ],
)
async def test_a_body_that_does_not_fit_is_refused(body: bytes, code: str) -> None:
    edge = _Edge()
    status, answer = await edge.post(_GET_USER, body)
    assert (status // 100, answer["code"]) == (4, code)
    assert edge.called.asked == []


async def test_a_wrong_field_is_named() -> None:
    for body, field in (({"user_id": 1}, "user_id"), ({"nobody": 1}, "nobody")):
        _, answer = await _Edge().post(_GET_USER, body)
        assert answer["details"] == {"field": field}


def _routes() -> list[Any]:
    channels = dict.fromkeys(("auth", "context", "dispatcher", "events"), _Called())
    nothing: Any = SimpleNamespace(channels=channels, credentials=_own, serving=None)
    edge: Any = SimpleNamespace(settings=GatewaySettings(), callers=_Callers())
    return http.Api(edge, nothing).routes()


def test_the_description_has_every_route_and_every_rpc() -> None:
    found = openapi.document(_routes(), rpc.methods())
    described = {f"{method.upper()} {path}" for path, operations in found["paths"].items() for method in operations}
    served = {f"{method} {path}" for method, path, _ in _routes() if path != "/ws" and "{method:path}" not in path}
    assert described == served | {f"POST {method.path}" for method in rpc.methods()}
    assert set(openapi._DETAILS) <= served
    names = [operation["operationId"] for operations in found["paths"].values() for operation in operations.values()]
    assert len(set(names)) == len(names)


def test_every_schema_of_the_description_is_one_and_every_reference_leads_somewhere() -> None:
    found = openapi.document(_routes(), rpc.methods())
    schemas = found["components"]["schemas"]

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            if "$ref" in value:
                *_, kind, name = value["$ref"].split("/")
                assert name in found["components"][kind]
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)

    walk(found)
    for schema in schemas.values():
        assert jsonschema_rs.meta.is_valid({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
    login = schemas["netra.auth.v1.IssueTokenRequest"]
    whole = {"$ref": "#/components/schemas/netra.auth.v1.IssueTokenRequest", "components": {"schemas": schemas}}
    check = jsonschema_rs.Draft202012Validator(whole)
    assert login["additionalProperties"] is False
    assert check.is_valid({"password": {"email": "e", "password": "p"}})
    assert not check.is_valid({"nobody": 1})


@pytest.mark.parametrize(
    ("error", "status", "retryable"),
    [
        (errors.ResourceExhausted("The process has all the calls it takes.", retry_after_ms=1000), 429, True),
        (errors.ResourceExhausted("It took more memory than it may.", limit="memory"), 422, False),
        (errors.PermissionDenied("In quarantine.", retry_after_ms=1000), 403, False),
    ],
    ids=["no room", "took too much", "refused"],
)
def test_want_of_room_passes_and_what_took_too_much_does_not(error: errors.NetraError, status: int, retryable: bool) -> None:
    answer = problems.response(error)
    told = json.loads(bytes(answer.body))
    assert (answer.status_code, told["status"], told["retryable"]) == (status, status, retryable)
    assert answer.headers.get("retry-after") == ("1" if error.retry_after_ms else None)
