"""Tokens that say nothing by themselves: random, prefixed so that secret scanners find them, stored as digests."""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets

_FORM = re.compile(r"(nrt|nrs)_[A-Za-z0-9_\-]{43}", re.ASCII)
REFRESH, RESET = "nrt", "nrs"


def new(kind: str) -> str:
    """A token of 256 random bits."""
    return f"{kind}_{secrets.token_urlsafe(32)}"


def looks_like(kind: str, text: str) -> bool:
    """Whether the text has the form of such a token."""
    found = _FORM.fullmatch(text)
    return found is not None and found[1] == kind


def digest(token: str) -> bytes:
    """What is stored of a token."""
    return hashlib.sha256(token.encode()).digest()


class Family:
    """Derives each refresh token from the one before, so that the same answer can be given twice without being stored."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def child(self, parent: str) -> str:
        """The one refresh token that follows the parent."""
        derived = hmac.digest(self._key, parent.encode(), "sha256")
        return f"{REFRESH}_{base64.urlsafe_b64encode(derived).rstrip(b'=').decode()}"

    def mark(self, *parts: str) -> bytes:
        """A digest of something that could be guessed; only who has the key can look for it."""
        return hmac.digest(self._key, "\0".join(("mark", *parts)).encode(), "sha256")
