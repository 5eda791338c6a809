"""What keys name secrets, and the same JSON with `***` in their place; pure."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_STARS = "***"
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
# as a word of a key, or the end of one: `accesstoken` names one too
_ENDINGS = ("password", "passwd", "passphrase", "secret", "token", "credential", "cookie", "apikey", "accesskey", "privatekey")
_WORDS = frozenset({"auth", "authorization", "session", "pwd"})
_BEFORE_KEY = frozenset({"api", "access", "private", "signing", "encryption"})
_NUMBERS = frozenset({"tokens", "sessions", "cookies", "count", "limit"})
# tokens that a language model reads and writes: `input_tokens` names no secret, whatever is there
_USED = frozenset(
    {"input", "output", "prompt", "completion", "context", "generated", "reasoning", "cached", "uncached", "cache", "total", "max"}
)
_MOST_PATHS = 100


def _words(key: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(key)]


@functools.lru_cache(maxsize=4096)
def is_secret(key: str) -> bool:
    """Whether a key names a secret: word by word, however the words are put together."""
    words = _words(key)
    if not _USED.isdisjoint(words):
        words = [word for word in words if word != "tokens"]
    singular = [word.removesuffix("s") for word in words]
    if any(word in _WORDS or word.endswith(_ENDINGS) for word in (*words, *singular)):
        return True
    return any(before in _BEFORE_KEY and word == "key" for before, word in zip(words, singular[1:], strict=False))


class Masked:
    """Masks values and remembers where. With a size, what comes after so many bytes of their JSON may be left out."""

    def __init__(self, size: float = math.inf) -> None:
        self._left = size
        self._paths: list[str] = []
        self._more = 0

    @property
    def paths(self) -> list[str]:
        """The paths of what was masked; beyond a hundred, how many more."""
        return [*self._paths, f"and {self._more} more"] if self._more else self._paths

    def of(self, value: Any, path: str) -> Any:
        """The same JSON value with `***` under keys that name secrets."""
        if isinstance(value, Mapping):
            return dict(self._items(value, path))
        if isinstance(value, list | tuple):
            return list(self._elements(value, path))
        if isinstance(value, str):
            return self._text(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            # written as an object of its fields
            return dict(self._items({each.name: getattr(value, each.name) for each in dataclasses.fields(value)}, path))
        self._left -= 1
        return value

    def _items(self, value: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
        for key, item in value.items():
            if self._left < 0:
                return
            # fewer bytes than there are, so that never too little is kept
            self._left -= len(key)
            under = f"{path}.{key}"
            if item is None or not is_secret(key) or _counts(key, item):
                yield key, self.of(item, under)
            else:
                self._note(under)
                yield key, self._text(_STARS)

    def _elements(self, value: list[Any] | tuple[Any, ...], path: str) -> Iterator[Any]:
        for place, item in enumerate(value):
            if self._left < 0:
                return
            yield self.of(item, path if isinstance(item, str | int | float) else f"{path}[{place}]")

    def _text(self, value: str) -> str:
        shown = value if len(value) <= self._left else value[: int(self._left) + 1]
        self._left -= len(shown) + 2
        return shown

    def _note(self, path: str) -> None:
        if len(self._paths) < _MOST_PATHS:
            self._paths.append(path)
        else:
            self._more += 1


def _counts(key: str, value: Any) -> bool:
    """Whether this says how many there are, and nothing else."""
    if isinstance(value, Mapping):
        return all(_counts(key, item) for item in value.values())
    return isinstance(value, int | float) and not _NUMBERS.isdisjoint(_words(key))
