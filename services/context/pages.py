"""Pages of a list: how long one is, and the token of the next."""

from __future__ import annotations

import base64
import binascii

from netra import errors

_PAGE, _LARGEST_PAGE = 50, 200


def limit(page_size: int) -> int:
    """How many entries a page has. Raises `InvalidPayload`."""
    if not 0 <= page_size <= _LARGEST_PAGE:
        raise errors.InvalidPayload(f"page_size must be 1 to {_LARGEST_PAGE}, or 0 for {_PAGE}", field="page_size")
    return page_size or _PAGE


def packed(kind: str, place: str) -> str:
    """The token of a place in one kind of list."""
    return base64.urlsafe_b64encode(f"{kind}:{place}".encode()).decode().rstrip("=")


def unpacked(token: str, kind: str) -> str:
    """The place that a token of this kind of list names; empty for the first page. Raises `InvalidPayload`."""
    if not token:
        return ""
    try:
        padded = (token + "=" * (-len(token) % 4)).encode("ascii")
        found, _, place = base64.b64decode(padded, altchars=b"-_", validate=True).decode("ascii").partition(":")
    except (binascii.Error, ValueError):
        raise unknown() from None
    # what we gave out and nothing else: no second spelling of the same page
    if found != kind or not place or packed(kind, place) != token:
        raise unknown()
    return place


def unknown() -> errors.InvalidPayload:
    """The error for a token that nobody gave out."""
    return errors.InvalidPayload("page_token must be the next_page_token of the page before", field="page_token")
