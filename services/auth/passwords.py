"""argon2id in a bounded pool."""

from __future__ import annotations

import asyncio
import secrets
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import argon2

from netra import errors

MIN_LENGTH, MAX_LENGTH = 12, 1024
_RESULT = TypeVar("_RESULT")
_RETRY_MS = 1000
# OWASP Password Storage Cheat Sheet, Argon2id
_PASSES, _MEMORY_KIB = 2, 19 * 1024


def check(password: str, field: str) -> None:
    """Raise `InvalidPayload` unless this may be a password."""
    if not MIN_LENGTH <= len(password) <= MAX_LENGTH:
        raise errors.InvalidPayload(f"{field} must have {MIN_LENGTH} to {MAX_LENGTH} characters", field=field)


class Passwords:
    """Hashes and verifies. At most `threads` work at the same time and `queue` wait; more are refused."""

    def __init__(self, threads: int = 2, queue: int = 64) -> None:
        self._hasher = argon2.PasswordHasher(time_cost=_PASSES, memory_cost=_MEMORY_KIB, parallelism=1)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="password")
        self._limit = threads + queue
        self._pending = 0
        # verified for unknown users, so that the time of an answer does not tell who exists
        self._nobody = self._hasher.hash(secrets.token_urlsafe(16))

    async def hash(self, password: str) -> str:
        """The hash to store, parameters included."""
        return await self._run(lambda: self._hasher.hash(_normal(password)))

    async def verify(self, stored: str | None, password: str) -> bool:
        """Whether the password is the one; as slow for a missing hash as for a wrong password."""
        usable = stored is not None and len(password) <= MAX_LENGTH
        matched = await self._run(lambda: self._matches(stored or self._nobody, password[:MAX_LENGTH]))
        return usable and matched

    def outdated(self, stored: str) -> bool:
        """Whether the hash was made with other parameters than those of today."""
        return self._hasher.check_needs_rehash(stored)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _matches(self, stored: str, password: str) -> bool:
        try:
            return self._hasher.verify(stored, _normal(password))
        except (argon2.exceptions.VerificationError, argon2.exceptions.InvalidHashError):
            return False

    async def _run(self, work: Callable[[], _RESULT]) -> _RESULT:
        if self._pending >= self._limit:
            raise errors.RateLimited("Too many sign-ins at the same time. Try again.", retry_after_ms=_RETRY_MS)
        self._pending += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        finally:
            self._pending -= 1


def _normal(password: str) -> str:
    # the same letters typed on another keyboard are the same password
    return unicodedata.normalize("NFC", password)
