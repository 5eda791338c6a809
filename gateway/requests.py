"""What many resources read of a request in the same way."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict, TypeVar

from starlette.requests import Request

from chassis import identity
from gateway import frames, problems, session
from netra import errors, ids

_Id = TypeVar("_Id", bound=ids.Id)
# a token, and so never in the address
_GRANT = "x-netra-grant"


class Page(TypedDict):
    """Which page is asked for."""

    page_size: int
    page_token: str


def page(query: Mapping[str, str]) -> Page:
    """Which page is asked for. Raises `InvalidPayload`."""
    return {"page_size": problems.number(query, "page_size", 1, 200, 0), "page_token": query.get("page_token", "")}


def in_path(request: Request, name: str, kind: type[_Id]) -> _Id:
    """An id of the address. Raises `NotFound` for what is none."""
    try:
        return kind(request.path_params[name])
    except errors.InvalidPayload:
        raise errors.NotFound from None


def in_query(query: Mapping[str, str], name: str) -> str:
    """An id of the query string, or nothing. Raises `InvalidPayload`."""
    return frames.optional_id(query.get(name), f"query.{name}")


def flag(query: Mapping[str, str], name: str) -> bool:
    """Whether something of the query string is `true`. Raises `InvalidPayload`."""
    text = query.get(name, "false")
    if text not in ("true", "false"):
        raise frames.wrong(f"query.{name}", "must be true or false")
    return text == "true"


def key(request: Request) -> ids.RequestId:
    """The request id: the idempotency key, or a new one. Raises `InvalidPayload`."""
    return ids.RequestId(request.headers["idempotency-key"]) if "idempotency-key" in request.headers else ids.RequestId.new()


def grant(request: Request) -> str:
    """The grant token that came along; empty when there is none."""
    return request.headers.get(_GRANT, "")


def require(edge: session.Edge, who: identity.Principal, *permissions: str) -> None:
    """Raises `PermissionDenied` unless the caller has all of them."""
    for permission in permissions:
        try:
            identity.require(edge.verifier.trust, who, permission)
        except errors.PermissionDenied as error:
            edge.entitled.refused(permission, error, who)
            raise
