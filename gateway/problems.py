"""NetraError -> problem+json, and what every HTTP request is checked for; nowhere else."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from chassis import telemetry
from gateway import frames
from netra import errors

_STATUS = {
    "UNAUTHENTICATED": 401,
    "PERMISSION_DENIED": 403,
    "NOT_FOUND": 404,
    "FRAME_TOO_LARGE": 413,
    "ALREADY_EXISTS": 409,
    "BUSY": 409,
    "FENCED": 409,
    "FAILED_PRECONDITION": 409,
    "CANCELLED": 409,
    "RATE_LIMITED": 429,
    "QUOTA_EXCEEDED": 429,
    "DEADLINE_EXCEEDED": 504,
    "UNAVAILABLE": 503,
    "SANDBOX_UNAVAILABLE": 503,
    "RESOURCE_EXHAUSTED": 422,
    "SECURITY_VIOLATION": 403,
    "OWNER_LOST": 503,
}
# how long a body may take that is read whole
_BODY_S = 30.0
_NEVER_IN_URL = frozenset(
    "token access_token refresh_token id_token subject_token grant_token bearer authorization jwt api_key client_secret password".split()
)


def status_of(error: errors.NetraError) -> int:
    """The HTTP status for an error."""
    if isinstance(error, errors.InvalidPayload) and error.code not in _STATUS:
        return 400
    if isinstance(error, errors.ResourceExhausted) and frames.passes(error):
        return 429
    return _STATUS.get(error.code, 500)


def answer(value: Any, code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON that no cache keeps."""
    return Response(orjson.dumps(value), code, {"Cache-Control": "no-store", **(headers or {})}, "application/json")


def response(
    error: errors.NetraError, status: int | None = None, headers: Mapping[str, str] | None = None, more: Mapping[str, Any] | None = None
) -> Response:
    """The error as application/problem+json (RFC 9457), with `more` members."""
    code = status or status_of(error)
    body = {
        "type": "about:blank",
        "title": error.code.replace("_", " ").capitalize(),
        "status": code,
        "detail": error.message,
        **frames.described(error, telemetry.correlation_id()),
        **(more or {}),
    }
    extra = dict(headers or {})
    if code == 401:
        extra.setdefault("WWW-Authenticate", "Bearer")
    if error.retry_after_ms is not None:
        extra["Retry-After"] = str(-(-error.retry_after_ms // 1000))
    return Response(orjson.dumps(body), code, {"Cache-Control": "no-store", **extra}, "application/problem+json")


def bearer(headers: Mapping[str, str]) -> str:
    """The token in `Authorization`; empty when there is none. Raises `Unauthenticated` when there are two."""
    if isinstance(headers, Headers) and len(headers.getlist("authorization")) > 1:
        raise errors.Unauthenticated("Authorization is there more than once.")
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def refuse_tokens_in(query: Iterable[tuple[str, str]]) -> None:
    """Addresses end up in logs and histories. Raises `InvalidPayload`."""
    for name, _ in query:
        if name.lower() in _NEVER_IN_URL:
            raise errors.InvalidPayload(f"{name} must not be in the address. Send Authorization: Bearer.", field=f"query.{name}")


async def body_of(request: Request, max_bytes: int) -> dict[str, Any]:
    """The JSON object in the body. Raises `InvalidPayload` and its kind."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise errors.InvalidPayload("Send the body as application/json.", field="Content-Type")
    value = frames.strict(_utf8(await raw_body(request, max_bytes)))
    if not isinstance(value, dict):
        raise errors.NotAnObject("The body must be a JSON object.")
    return value


async def raw_body(request: Request, max_bytes: int) -> bytes:
    """The body. Raises `TooLarge`, `DeadlineExceeded`, or `Cancelled` when the client is gone."""
    body = bytearray()
    try:
        async with asyncio.timeout(_BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise errors.TooLarge(f"The body has at most {max_bytes} bytes.", limit=max_bytes)
    except TimeoutError:
        raise errors.DeadlineExceeded(f"The body did not come within {_BODY_S:g} s. Send it again.") from None
    except ClientDisconnect:
        raise errors.Cancelled("The client went away.") from None
    return bytes(body)


def _utf8(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        raise errors.BadJson("The body is not UTF-8.") from None


def required(body: Mapping[str, Any], name: str, max_length: int = 4096) -> str:
    """A string that must be there. Raises `InvalidPayload`."""
    value = body.get(name)
    if not isinstance(value, str) or not value or len(value) > max_length or "\x00" in value:
        raise frames.wrong(name, f"is required: a string of 1 to {max_length} characters")
    return value


def number(query: Mapping[str, str], name: str, low: int, high: int, default: int) -> int:
    """An integer of the query string. Raises `InvalidPayload`."""
    text = query.get(name, "")
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 19 and low <= int(text) <= high):
        raise frames.wrong(f"query.{name}", f"must be an integer from {low} to {high}")
    return int(text)
