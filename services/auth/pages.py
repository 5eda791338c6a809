"""Pages of a list: how long they may be, and the token that leads to the next one."""

from __future__ import annotations

import base64
import binascii

from netra import errors

MOST, USUAL = 200, 50


def size(wanted: int) -> int:
    """How many entries a page has. Raises `InvalidPayload`."""
    if not 0 <= wanted <= MOST:
        raise errors.InvalidPayload(f"page_size must be from 1 to {MOST}, or 0 for {USUAL}", field="page_size")
    return wanted or USUAL


def token(last: str) -> str:
    """What leads to the entries after the last one of this page."""
    return base64.urlsafe_b64encode(last.encode()).decode()


def after(text: str) -> str:
    """The last entry of the page before; empty for the first page. Raises `InvalidPayload`."""
    try:
        last = base64.b64decode(text, altchars=b"-_", validate=True).decode()
    except (binascii.Error, ValueError):
        raise wrong() from None
    if text and not last:
        raise wrong()
    return last


def wrong() -> errors.InvalidPayload:
    """The error of a token that was not made here."""
    return errors.InvalidPayload("page_token must be a next_page_token of this method", field="page_token")
