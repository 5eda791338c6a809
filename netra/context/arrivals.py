"""What comes in with a call or a request, as far as contexts are made of it: who, by which token, from where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, TypeVar

from netra import errors, ids

MAX_TEXT = 256
_BEARER = "bearer "
_HEADERS = frozenset({b"user-agent", b"content-type", b"x-correlation-id"})
Frame = TypeVar("Frame", covariant=True)


class Who(Protocol):
    """A signed-in user, as a verified token describes them."""

    @property
    def user_id(self) -> ids.UserId:
        """The user."""
        ...

    @property
    def tenant_id(self) -> ids.TenantId:
        """Their organisation."""
        ...

    @property
    def session_id(self) -> ids.SessionId:
        """Their sign-in."""
        ...

    @property
    def roles(self) -> tuple[str, ...]:
        """Their roles."""
        ...

    @property
    def tier(self) -> str:
        """Their tier."""
        ...

    @property
    def scope(self) -> frozenset[str] | None:
        """The permissions their token is narrowed to; None when it is not."""
        ...


class Verifies(Protocol[Frame]):
    """Believes tokens, or does not."""

    async def service(self, token: str) -> str:
        """The service of a service token. Raises `Unauthenticated`."""
        ...

    async def context(self, token: str, service: str) -> Frame:
        """The context of a context token that was signed for this service. Raises `Unauthenticated`."""
        ...


class Call(Protocol):
    """A gRPC call at its server."""

    def invocation_metadata(self) -> Any:
        """Pairs of name and value."""
        ...


def tokens(call: Call | Iterable[tuple[str, str | bytes]]) -> tuple[str, str]:
    """The bearer and the context token of a call. Raises `Unauthenticated` when one of them is missing, or there twice."""
    pairs = call if isinstance(call, Iterable) else call.invocation_metadata() or ()
    found: dict[str, list[str]] = {"authorization": [], "x-netra-context": []}
    for name, value in pairs:
        if name in found and isinstance(value, str):
            found[name].append(value)
    # two are none: nobody may choose which one counts
    if any(len(values) != 1 for values in found.values()):
        raise errors.Unauthenticated("This call needs one service token and one execution context in x-netra-context.")
    bearer = found["authorization"][0]
    if bearer[: len(_BEARER)].lower() != _BEARER:
        raise errors.Unauthenticated("This call needs a service token as bearer.")
    return bearer[len(_BEARER) :], found["x-netra-context"][0]


def origin(request: object, kind: str) -> tuple[dict[str, str], str | None]:
    """Where an ASGI request came from, for the audit metadata, and its correlation id if it brings one.

    Takes the scope, or whatever has it as `scope`: requests and sockets of FastAPI and Starlette. Nothing that may be a secret is
    taken along: no query, no cookie, no authorization, no header beyond the named ones. Raises `InvalidContext`.
    """
    scope = request if isinstance(request, Mapping) else getattr(request, "scope", None)
    if not isinstance(scope, Mapping) or scope.get("type") != kind:
        raise errors.InvalidContext(f"request must be an ASGI request of the type {kind}", field="request")
    headers = _headers(scope.get("headers") or ())
    client = scope.get("client")
    told = {
        "protocol": kind,
        "client_ip": client[0] if client else "",
        "method": scope.get("method", ""),
        "path": scope.get("path", ""),
        "user_agent": headers.get("user-agent", ""),
        "content_type": headers.get("content-type", ""),
    }
    known = headers.get("x-correlation-id", "")
    return {name: text for name, value in told.items() if (text := _text(value))}, known if ids.is_correlation_id(known) else None


def _headers(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in pairs:
        if name.lower() in _HEADERS:
            # the first of several counts, as for every server
            found.setdefault(name.lower().decode(), value.decode("latin-1"))
    return found


def _text(value: object) -> str:
    """What can be shown and stored: at most 256 characters, none of them a control character or half of a pair."""
    return "".join(character for character in str(value)[:MAX_TEXT] if character.isprintable())
