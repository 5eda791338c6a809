"""GET /openapi.json: the HTTP surface as OpenAPI 3.1, out of the table of routes and the descriptors of the RPCs; pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor

from gateway import rpc, views

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
    client_id=_TEXT, client_secret=_TEXT, refresh_token=_TEXT, code=_TEXT, code_verifier=_TEXT, subject_token=_TEXT,
    subject_token_type=_TEXT, scope=_TEXT,
)  # fmt: skip
_RUN = _of(
    "user_request", agent=_TEXT, user_request=_TEXT, inputs={"type": "object"}, thread_id=_ID,
    on_busy={"enum": ["enqueue", "reject", "interrupt", "rollback"]}, deadline_s={"type": "number"},
)  # fmt: skip
_STATE = _of("run_id state", run_id=_ID, state=_TEXT)
_MAYBE: _Schema = {"type": ["string", "null"]}
_ARTIFACT = _of(
    "artifact_id name bytes sha256 media_type run_id created_at thread_id user_id", artifact_id=_ID, name=_TEXT, bytes=_WHOLE, sha256=_TEXT,
    media_type=_TEXT, run_id=_MAYBE, created_at=_TEXT, thread_id=_MAYBE, user_id=_ID,
)  # fmt: skip
_THREAD = _of(
    "thread_id created_at updated_at messages owner_id access deleted_at", thread_id=_ID, created_at=_TEXT, updated_at=_TEXT,
    messages=_WHOLE, owner_id=_ID, access={"enum": ["read", "write", "own"]}, deleted_at=_MAYBE,
)  # fmt: skip
_ACCESS: _Schema = {"enum": ["read", "write"]}
_GRANT = _of(
    "thread_id grantee_id access created_at withdrawn_at", thread_id=_ID, grantee_id=_ID, access=_ACCESS, created_at=_TEXT,
    withdrawn_at=_MAYBE,
)  # fmt: skip
_CONTEXT = _of(
    "context_id user_id tenant_id session_id thread_id run_id request_id roles tier created_at depth correlation_id closed_at",
    **dict.fromkeys(("context_id", "user_id", "tenant_id", "session_id", "thread_id", "run_id"), _ID),
    request_id=_TEXT, connection_id=_MAYBE, roles={"type": "array", "items": _TEXT}, tier=_TEXT, created_at=_TEXT, deadline=_MAYBE,
    depth=_WHOLE, parent_request_id=_MAYBE, correlation_id=_TEXT, closed_at=_MAYBE,
)  # fmt: skip
_REMOVED = {"threads": _WHOLE, "messages": _WHOLE, "artifacts": _WHOLE, "contexts": _WHOLE, "events": _WHOLE, "runs": _WHOLE}
_WITH_GRANT = {"X-Netra-Grant": _TEXT}
_ONCE = {"Idempotency-Key": _TEXT}
_ANYTHING: _Schema = {"type": "object"}
_LIST: _Schema = {"type": "array", "items": _ANYTHING}
_WHOLE_OR_NONE: _Schema = {"type": ["integer", "null"]}
_TOOL = _of(
    "name version description input_schema output_schema tags permission side_effects timeout_s category min_role min_tier enforcement"
    " retries idempotent reconciles concurrency fallback deprecated digest",
    name=_TEXT, version=_TEXT, description=_TEXT, input_schema=_ANYTHING, output_schema={"type": ["object", "null"]},
    tags={"type": "array", "items": _TEXT},
    permission=_TEXT, side_effects=_FLAG, timeout_s={"type": ["number", "null"]}, category=_TEXT, min_role=_MAYBE, min_tier=_MAYBE,
    enforcement=_TEXT, retries=_WHOLE, idempotent=_FLAG, reconciles=_FLAG, concurrency=_WHOLE_OR_NONE, fallback=_MAYBE, deprecated=_MAYBE,
    digest=_TEXT,
)  # fmt: skip
_APPROVAL_STATE: _Schema = {"enum": ["pending", "approved", "rejected", "expired"]}
_DECISION: _Schema = {"enum": ["approve", "reject"]}
_VOTE = _of("user_id decision comment at", user_id=_ID, decision=_DECISION, comment=_TEXT, at=_TEXT)
_APPROVAL = _of(
    "approval_id run_id thread_id user_id state message tool_name parameters quorum votes created_at expires_at resolved_at",
    **dict.fromkeys(("approval_id", "run_id", "thread_id", "user_id"), _ID), state=_APPROVAL_STATE, message=_TEXT, tool_name=_MAYBE,
    parameters={"type": ["object", "null"]}, quorum=_WHOLE, votes={"type": "array", "items": _VOTE}, created_at=_TEXT,
    expires_at=_MAYBE, resolved_at=_MAYBE,
)  # fmt: skip
_PAGE: dict[str, _Schema] = {"page_size": {"type": "integer", "minimum": 1, "maximum": 200}, "page_token": _TEXT}


def _paged(name: str, item: _Schema = _ANYTHING, **more: _Schema) -> _Schema:
    fields: dict[str, _Schema] = {name: {"type": "array", "items": item}, "next_page_token": _TEXT, **more}
    return _json(_of(" ".join(fields), **fields))


def _json(schema: _Schema = _ANYTHING) -> _Schema:
    return {"application/json": {"schema": schema}}


@dataclass(frozen=True, slots=True)
class _Details:
    """What a route takes and gives beyond its path: `answers` by status, each with what it may consist of."""

    query: dict[str, _Schema] = field(default_factory=dict)
    needed: frozenset[str] = frozenset()
    headers: dict[str, _Schema] = field(default_factory=dict)
    body: _Schema = field(default_factory=dict)
    public: bool = False
    answers: dict[str, _Schema] = field(default_factory=lambda: {"200": _json()})


_DETAILS = {
    "GET /": _Details(public=True),
    "GET /healthz": _Details(public=True),
    "GET /readyz": _Details(public=True, answers={"200": _json(), "503": _json()}),
    "GET /metrics": _Details(public=True, answers={"200": {"text/plain": {"schema": _TEXT}}}),
    "GET /.well-known/jwks.json": _Details(public=True, answers={"200": _json(_of("keys", keys=_LIST))}),
    "GET /openapi.json": _Details(public=True),
    "POST /auth/login": _Details(
        body=_json(_of("email password", email=_TEXT, password=_TEXT)), public=True, answers={"200": _json(_TOKENS)}
    ),
    "POST /auth/refresh": _Details(body=_json(_of("refresh_token", refresh_token=_TEXT)), public=True, answers={"200": _json(_TOKENS)}),
    "POST /auth/logout": _Details(answers={"200": _json(_of("session_id", session_id=_ID))}),
    "POST /auth/token": _Details(
        body={"application/x-www-form-urlencoded": {"schema": _FORM}}, public=True,
        answers={"200": _json({**_TOKENS, "required": ["access_token", "token_type", "expires_in"]})},
    ),
    "GET /auth/oidc/start": _Details(
        query={"provider": _TEXT, "redirect_uri": _TEXT, "code_challenge": _TEXT, "code_challenge_method": {"const": "S256"}},
        needed=frozenset({"provider"}), public=True, answers={"303": {}},
    ),
    "GET /auth/oidc/callback": _Details(
        query={"state": _TEXT, "code": _TEXT, "iss": _TEXT, "error": _TEXT}, needed=frozenset({"state"}), public=True,
        answers={"200": _json(_TOKENS), "303": {}},
    ),
    "POST /v1/runs": _Details(
        headers=_ONCE, body=_json(_RUN),
        answers={"202": _json(_of("run_id thread_id message_id", run_id=_ID, thread_id=_ID, message_id=_TEXT))},
    ),
    "GET /v1/runs": _Details(query={**_PAGE, "thread_id": _ID, "state": _TEXT}, headers=_WITH_GRANT, answers={"200": _paged("runs")}),
    "GET /v1/runs/{run_id}": _Details(headers=_WITH_GRANT),
    "POST /v1/runs/{run_id}:cancel": _Details(headers=_WITH_GRANT, answers={"200": _json(_STATE)}),
    "POST /v1/runs/{run_id}:send": _Details(
        headers={**_ONCE, **_WITH_GRANT}, body=_json(_of("message", message=_TEXT)),
        answers={"200": _json(_of(
            "run_id message_id delivered state", run_id=_ID, message_id=_ID, delivered=_FLAG, state=_TEXT
        ))},
    ),
    "GET /v1/approvals": _Details(
        query={**_PAGE, "run_id": _ID, "state": _APPROVAL_STATE}, headers=_WITH_GRANT, answers={"200": _paged("approvals", _APPROVAL)}
    ),
    "GET /v1/approvals/{approval_id}": _Details(headers=_WITH_GRANT, answers={"200": _json(_APPROVAL)}),
    "POST /v1/approvals/{approval_id}:resolve": _Details(
        headers=_WITH_GRANT, body=_json(_of("decision", decision=_DECISION, comment=_TEXT)), answers={"200": _json(_APPROVAL)}
    ),
    "GET /v1/runs/{run_id}/events": _Details(
        query={"after": _WHOLE, "limit": {"type": "integer", "minimum": 1, "maximum": 1000}}, headers={"Last-Event-ID": _TEXT},
        answers={"200": {**_json(_of("events next_after", events=_LIST, next_after=_WHOLE)), "text/event-stream": {"schema": _TEXT}}},
    ),
    "GET /v1/threads": _Details(
        query={**_PAGE, "selection": {"enum": ["own", "shared", "deleted"]}}, answers={"200": _paged("threads", _THREAD)}
    ),
    "GET /v1/threads/{thread_id}": _Details(answers={"200": _json(_THREAD)}),
    "DELETE /v1/threads/{thread_id}": _Details(
        headers=_ONCE, answers={"200": _json(_of("thread erased_at", thread=_THREAD, erased_at=_TEXT))}
    ),
    "POST /v1/threads/{thread_id}:restore": _Details(headers=_ONCE, answers={"200": _json(_THREAD)}),
    "POST /v1/threads/{thread_id}:erase": _Details(
        headers=_ONCE,
        answers={"200": _json(_of(
            "thread_id messages artifacts events runs", thread_id=_ID, messages=_WHOLE, artifacts=_WHOLE, events=_WHOLE, runs=_WHOLE
        ))},
    ),
    "GET /v1/threads/{thread_id}/grants": _Details(query={**_PAGE, "withdrawn": _FLAG}, answers={"200": _paged("grants", _GRANT)}),
    "POST /v1/threads/{thread_id}/grants": _Details(
        headers=_ONCE, body=_json(_of("access", grantee_id=_ID, email=_TEXT, access=_ACCESS)), answers={"201": _json(_GRANT)}
    ),
    "DELETE /v1/threads/{thread_id}/grants/{grantee_id}": _Details(headers=_ONCE, answers={"200": _json(_GRANT)}),
    "POST /v1/threads/{thread_id}/token": _Details(
        answers={"200": _json(_of("grant_token expires_at access", grant_token=_TEXT, expires_at=_TEXT, access=_TEXT))}
    ),
    "GET /v1/contexts": _Details(
        query={**_PAGE, "thread_id": _ID, "run_id": _ID, "open": _FLAG, "user_id": _ID}, answers={"200": _paged("contexts", _CONTEXT)}
    ),
    "GET /v1/contexts/{context_id}": _Details(query={"user_id": _ID}, answers={"200": _json(_CONTEXT)}),
    "GET /v1/contexts/audit": _Details(
        query={**_PAGE, "context_id": _ID, "thread_id": _ID, "user_id": _ID}, answers={"200": _paged("entries")}
    ),
    "GET /v1/export": _Details(answers={"200": {"application/x-ndjson": {"schema": _TEXT}}}),
    "DELETE /v1/me/data": _Details(headers=_ONCE, answers={"200": _json(_of(" ".join(_REMOVED), **_REMOVED))}),
    "GET /v1/threads/{thread_id}/messages": _Details(query=_PAGE, answers={"200": _paged("messages")}),
    "POST /v1/artifacts": _Details(
        query={"name": _TEXT, "thread_id": _ID}, needed=frozenset({"name"}), headers={**_ONCE, "X-Content-SHA256": _TEXT}, body={"*/*": {}},
        answers={"201": _json(_ARTIFACT)},
    ),
    "GET /v1/artifacts": _Details(
        query={**_PAGE, "thread_id": _ID},
        answers={"200": _paged("artifacts", _ARTIFACT, count=_WHOLE, bytes=_WHOLE, max_count=_WHOLE, max_bytes=_WHOLE)},
    ),
    "GET /v1/artifacts/{artifact_id}": _Details(
        headers={"Range": _TEXT, "If-Range": _TEXT}, answers={"200": {"*/*": {}}, "206": {"*/*": {}}}
    ),
    "DELETE /v1/artifacts/{artifact_id}": _Details(answers={"204": {}}),
    "GET /v1/tools": _Details(query={**_PAGE, **dict.fromkeys(views.TOOL_FILTERS, _TEXT)}, answers={"200": _paged("tools", _TOOL)}),
    "GET /v1/agents": _Details(answers={"200": _json(_of("agents", agents=_LIST))}),
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
        "info": {"title": "Netra", "version": "v1", "description": "Who you are comes from your token alone: no field says it."},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer", "description": "An access token, or an API key."}},
            "responses": {
                "Problem": {"description": "What went wrong.", "content": {"application/problem+json": {"schema": _ref("Problem")}}}
            },
        },
        "security": [{"bearer": []}],
    }


def _operation(name: str, endpoint: Callable[..., Any]) -> _Schema:
    details = _DETAILS.get(name, _Details())
    found: _Schema = {
        "operationId": endpoint.__name__,
        "summary": (endpoint.__doc__ or "").partition("\n")[0],
        "responses": {
            **{status: {"description": "Done.", **({"content": kinds} if kinds else {})} for status, kinds in details.answers.items()},
            "default": {"$ref": "#/components/responses/Problem"},
        },
    }
    parameters = [{"name": one, "in": "path", "required": True, "schema": _ID} for one in re.findall(r"\{(\w+)", name)]
    parameters += [
        {"name": one, "in": where, "required": one in details.needed, "schema": schema}
        for where, taken in (("query", details.query), ("header", details.headers))
        for one, schema in taken.items()
    ]
    if parameters:
        found["parameters"] = parameters
    if details.body:
        found["requestBody"] = {"required": True, "content": details.body}
    return {**found, "security": []} if details.public else found


def _remote(method: rpc.Method, schemas: dict[str, _Schema]) -> _Schema:
    request, response = method.descriptor.input_type, method.descriptor.output_type
    found: _Schema = {
        "operationId": f"{method.descriptor.containing_service.name}.{method.descriptor.name}",
        "summary": "Anybody may call it." if method.rule.public else f"Needs the permission {method.rule.permission}.",
        "requestBody": {"required": True, "content": _json(_message(request, schemas))},
        "responses": {
            "200": {"description": "Done.", "content": _json(_message(response, schemas))},
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
