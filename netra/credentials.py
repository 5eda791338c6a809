"""Where the command line finds and keeps a sign-in: what was stored by `netra login`, else the development user of a checkout."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from netra import errors
from netra.api import Api

_EARLY_S = 120
_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Standalone:
    """A stack of `make run` that runs in this checkout."""

    url: str
    email: str
    password_file: Path


def standalone(start: Path) -> Standalone | None:
    """What the nearest `.netra/state.json` at or above a folder says, if there is one."""
    for folder in (start, *start.parents):
        state = folder / ".netra" / "state.json"
        try:
            found = json.loads(state.read_text(encoding="utf-8"))
            url, email, password = found["gateway_url"], found["dev_email"], found["dev_password_file"]
            return Standalone(str(url), str(email), state.parent.parent / str(password))
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return None


class Store:
    """Sign-ins by gateway address, in one file that only its owner can read."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "credentials.json"

    def _lock(self) -> IO[str]:
        # a refresh token works once: two commands at once must not both use it
        self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        return (self._file.parent / "lock").open("a")

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._lock() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextlib.asynccontextmanager
    async def _held(self) -> AsyncIterator[None]:
        with self._lock() as lock:
            # it is held while a token is renewed: to wait for it must not stop the loop that renews
            while not _taken(lock):  # noqa: ASYNC110 - another process may hold it
                await asyncio.sleep(_PAUSE_S)
            yield

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, entries: dict[str, Any]) -> None:
        draft = self._file.with_suffix(".new")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            json.dump(entries, file)
        draft.replace(self._file)

    def has(self, url: str) -> bool:
        """Whether there is a sign-in for a gateway."""
        return url in self._read()

    def keep(self, url: str, tokens: dict[str, Any]) -> None:
        """Keep a sign-in."""
        with self._locked():
            self._write({**self._read(), url: _entry(tokens)})

    async def token(self, url: str) -> str:
        """An access token that lives for a while. Raises `Unauthenticated` when the sign-in has ended."""
        async with self._held():
            entries = self._read()
            entry = entries.get(url)
            if not isinstance(entry, dict):
                raise errors.Unauthenticated("Nobody is signed in here. Run `netra login`.")
            if entry["ends_at"] - _EARLY_S < time.time():
                entry = await self._renewed(url, entries, entry)
            return str(entry["access_token"])

    async def _renewed(self, url: str, entries: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
        try:
            async with Api(url) as api:
                fresh = _entry(await api.refresh(str(entry["refresh_token"])))
        except errors.Unauthenticated:
            self._write({known: other for known, other in entries.items() if known != url})
            raise errors.Unauthenticated("The sign-in has ended. Run `netra login`.") from None
        self._write({**entries, url: fresh})
        return fresh


def _taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _entry(tokens: dict[str, Any]) -> dict[str, Any]:
    return {
        "access_token": tokens["access_token"],
        "refresh_token": tokens["refresh_token"],
        "ends_at": time.time() + float(tokens["expires_in"]),
    }


def development(found: Standalone) -> Callable[[], Awaitable[str]]:
    """Signs in as the development user, again when the token is about to end."""
    held: dict[str, Any] = {"token": "", "ends_at": 0.0}

    async def token() -> str:
        if held["ends_at"] - _EARLY_S < time.time():
            async with Api(found.url) as api:
                tokens = await api.login(found.email, found.password_file.read_text(encoding="utf-8").strip())
            held.update(token=str(tokens["access_token"]), ends_at=time.time() + float(tokens["expires_in"]))
        return str(held["token"])

    return token
