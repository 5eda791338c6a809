"""GET /openapi.json: the HTTP surface as OpenAPI 3.1, out of the table of routes and the descriptors of the RPCs; pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from gateway import rpc

_Schema = dict[str, Any]
_TEXT, _WHOLE, _FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
_ID = {"type": "string", "format": "uuid"}
# 64 bits do not fit into the numbers of JavaScript: answers have them as text
_LONG = {"type": ["string", "integer"], "format": "int64"}
_SCALARS: dict[int, _Schema] = {
    FieldDescriptor.TYPE_STRING: _TEXT,
    FieldDescriptor.TYPE_BYTES: {"type": "string", "contentEncoding": "base64"},
    FieldDescriptor.TYPE_BOOL: _FLAG,
    FieldDescriptor.TYPE_INT32: _WHOLE,
    FieldDescriptor.TYPE_UINT32: _WHOLE,
    FieldDescriptor.TYPE_INT64: _LONG,
    FieldDescriptor.TYPE_UINT64: _LONG,
    FieldDescriptor.TYPE_DOUBLE: {"type": "number"},
    FieldDescriptor.TYPE_FLOAT: {"type": "number"},
}
_WELL_KNOWN: dict[str, _Schema] = {
    "google.protobuf.Timestamp": {"type": "string", "format": "date-time"},
    "google.protobuf.Duration": {"type": "string", "pattern": r"^-?[0-9]+(\.[0-9]+)?s$"},
}
_PROBLEM: _Schema = {
    "type": "object",
    "description": "RFC 9457. `code` is the reason that gRPC and error frames give too.",
    "required": ["status", "code", "message", "details", "retryable", "correlation_id"],
    "properties": {
        "type": _TEXT, "title": _TEXT, "status": _WHOLE, "detail": _TEXT, "code": _TEXT, "message": _TEXT, "details": {"type": "object"},
        "retryable": _FLAG, "retry_after_ms": {"type": ["integer", "null"]}, "correlation_id": _TEXT,
    },
}  # fmt: skip


def _of(required: str = "", **properties: _Schema) -> _Schema:
    """The schema of an object."""
    found: _Schema = {"type": "object", "properties": properties}
    return {**found, "required": required.split()} if required else found


_TOKENS = _of(
    "access_token refresh_token token_type expires_in user_id",
    access_token=_TEXT, refresh_token=_TEXT, token_type={"const": "Bearer"}, expires_in=_WHOLE, user_id=_ID,
)  # fmt: skip
_FORM = _of(
    "grant_type",
    grant_type={"enum": ["client_credentials", "refresh_token", "authorization_code", "urn:ietf:params:oauth:grant-type:token-exchange"]},
    client_id=_TEXT, client_secret=_TEXT, refresh_token=_TEXT, code=_TEXT, subject_token=_TEXT, subject_token_type=_TEXT, scope=_TEXT,
)  # fmt: skip
_RUN = _of("user_request", agent=_TEXT, user_request=_TEXT, inputs={"type": "object"}, thread_id=_ID, on_busy=_TEXT, deadline_s=_WHOLE)
_PAGE = {"page_size": _WHOLE, "page_token": _TEXT}


@dataclass(frozen=True, slots=True)
class _Details:
    """What a route takes and gives beyond its path."""

    query: dict[str, _Schema] = field(default_factory=dict)
    body: _Schema | None = None
    kind: str = "application/json"
    public: bool = False
    status: str = "200"
    answer: _Schema = field(default_factory=lambda: {"type": "object"})
    answers_in: str = "application/json"


_DETAILS = {
    "GET /": _Details(public=True),
    "GET /healthz": _Details(public=True),
    "GET /readyz": _Details(public=True),
    "GET /metrics": _Details(public=True, answer=_TEXT, answers_in="text/plain"),
    "GET /.well-known/jwks.json": _Details(public=True, answer=_of("keys", keys={"type": "array", "items": {"type": "object"}})),
    "GET /openapi.json": _Details(public=True),
    "POST /auth/login": _Details(body=_of("email password", email=_TEXT, password=_TEXT), public=True, answer=_TOKENS),
    "POST /auth/refresh": _Details(body=_of("refresh_token", refresh_token=_TEXT), public=True, answer=_TOKENS),
    "POST /auth/token": _Details(
        body=_FORM, kind="application/x-www-form-urlencoded", public=True,
        answer={**_TOKENS, "required": ["access_token", "token_type", "expires_in"]},
    ),
    "GET /auth/oidc/start": _Details(query={"provider": _TEXT, "redirect_uri": _TEXT}, public=True, status="303"),
    "GET /auth/oidc/callback": _Details(query={"state": _TEXT, "code": _TEXT, "iss": _TEXT, "error": _TEXT}, public=True, answer=_TOKENS),
    "POST /v1/runs": _Details(body=_RUN, status="202", answer=_of("run_id thread_id", run_id=_ID, thread_id=_ID, message_id=_TEXT)),
    "GET /v1/runs": _Details(query={**_PAGE, "thread_id": _ID, "state": _TEXT}),
    "GET /v1/runs/{run_id}/events": _Details(query={"after": _WHOLE, "limit": _WHOLE}),
    "GET /v1/threads": _Details(query=_PAGE),
    "GET /v1/threads/{thread_id}/messages": _Details(query=_PAGE),
    "GET /v1/tools": _Details(query={"text": _TEXT, "tag": _TEXT}),
}  # fmt: skip


def document(routes: Iterable[tuple[str, str, Callable[..., Any]]], methods: Iterable[rpc.Method]) -> _Schema:
    """The whole document. A route without details shows what its path and its docstring say."""
    paths: dict[str, _Schema] = {}
    for method, path, endpoint in routes:
        if path != "/ws" and "{method:path}" not in path:
            paths.setdefault(path, {})[method.lower()] = _operation(f"{method} {path}", endpoint)
    schemas: dict[str, _Schema] = {"Problem": _PROBLEM}
    for one in methods:
        paths[one.path] = {"post": _remote(one, schemas)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Netra", "version": "v1", "description": "Who you are comes from your token alone: no field names a user."},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "description": "An access token, or an API key."}},
            "responses": {"Problem": {"description": "What went wrong.", "content": _content("application/problem+json", _ref("Problem"))}},
        },
        "security": [{"bearer": []}],
    }


def _operation(name: str, endpoint: Callable[..., Any]) -> _Schema:
    details = _DETAILS.get(name, _Details())
    path = [{"name": found, "in": "path", "required": True, "schema": _ID} for found in re.findall(r"\{(\w+)", name)]
    query = [{"name": found, "in": "query", "schema": schema} for found, schema in details.query.items()]
    answer = {"description": "Done."} if details.status == "303" else {
        "description": "Done.", "content": _content(details.answers_in, details.answer)
    }  # fmt: skip
    found: _Schema = {
        "operationId": endpoint.__name__,
        "summary": (endpoint.__doc__ or "").partition("\n")[0],
        "responses": {details.status: answer, "default": {"$ref": "#/components/responses/Problem"}},
    }
    if path or query:
        found["parameters"] = path + query
    if details.body is not None:
        found["requestBody"] = {"required": True, "content": _content(details.kind, details.body)}
    return {**found, "security": []} if details.public else found


def _remote(method: rpc.Method, schemas: dict[str, _Schema]) -> _Schema:
    request, response = method.descriptor.input_type, method.descriptor.output_type
    found: _Schema = {
        "operationId": f"{method.descriptor.containing_service.name}.{method.descriptor.name}",
        "summary": "Anybody may call it." if method.rule.public else f"Needs the permission {method.rule.permission}.",
        "requestBody": {"required": True, "content": _content("application/json", _message(request, schemas))},
        "responses": {
            "200": {"description": "Done.", "content": _content("application/json", _message(response, schemas))},
            "default": {"$ref": "#/components/responses/Problem"},
        },
    }
    return {**found, "security": []} if method.rule.public else {**found, "x-netra-permission": method.rule.permission}


def _message(descriptor: Descriptor, schemas: dict[str, _Schema]) -> _Schema:
    """A reference to the schema of a message, which is added when it is new."""
    if descriptor.full_name in _WELL_KNOWN:
        return _WELL_KNOWN[descriptor.full_name]
    if descriptor.full_name not in schemas:
        schema: _Schema = {"type": "object", "additionalProperties": False, "properties": {}}
        schemas[descriptor.full_name] = schema
        schema["properties"] = {one.name: _field(one, schemas) for one in descriptor.fields}
    return _ref(descriptor.full_name)


def _field(one: FieldDescriptor, schemas: dict[str, _Schema]) -> _Schema:
    if one.message_type is not None and one.message_type.GetOptions().map_entry:
        return {"type": "object", "additionalProperties": _single(one.message_type.fields_by_name["value"], schemas)}
    schema = _single(one, schemas)
    return {"type": "array", "items": schema} if one.is_repeated else schema


def _single(one: FieldDescriptor, schemas: dict[str, _Schema]) -> _Schema:
    if one.message_type is not None:
        return _message(one.message_type, schemas)
    if one.enum_type is not None:
        return {"enum": [value.name for value in one.enum_type.values]}
    return _SCALARS[one.type]


def _ref(name: str) -> _Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(kind: str, schema: _Schema) -> _Schema:
    return {kind: {"schema": schema}}
