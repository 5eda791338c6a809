"""What keys name secrets, and the same JSON with `***` in their place; pure."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias

import orjson

_STARS = "***"
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# in the words of a key with spaces between: `AWS_SECRETKEY` names one as `secretKey` does, `tokenizer` and `compass` name none
_SECRET = re.compile(
    r"(?:\bpass |pass)(?:word|wd|phrase|code|key(?!w))"
    r"|(?:api|access|private|secret|signing|encryption|auth|session|master) ?key(?!w)"
    r"|token(?!i[sz])|secret(?!ar|iv|ion)|credential|authorization"
    r"|(?:cookie|pwd|sess(?:ion)?id)s?\b|\b(?:auth|session|bearer|jwt|t?otp)s?\b|\bpass$"
)
# no key that names a secret is without one of these
_HINTS = ("key", "pass", "token", "secret", "auth", "sess", "cookie", "credential", "pwd", "bearer", "jwt", "otp")
_HINTS_IN_JSON = tuple(hint.encode() for hint in _HINTS)
_NUMBERS = re.compile(r"tokens\b|\b(?:sessions|cookies|count|limit)\b")
_SCALAR = frozenset({str, int, float, bool, type(None)})
_MOST_PATHS = 100
# where a value is: under which key or number of what; put into words only where something is masked
_Place: TypeAlias = "tuple[_Place | None, str | int]"


def _words(key: str) -> str:
    return " ".join(_WORD.findall(key)).lower()


@functools.lru_cache(maxsize=4096)
def is_secret(key: str) -> bool:
    """Whether a key names a secret: word by word, however the words are put together."""
    lower = key.lower()
    return any(hint in lower for hint in _HINTS) and _SECRET.search(_words(key)) is not None


class Masked:
    """Masks values and remembers where. With a size, what comes after so many bytes of their JSON may be left out."""

    def __init__(self, size: float = math.inf) -> None:
        self._size = size
        self._paths: list[str] = []
        self._more = 0

    @property
    def paths(self) -> list[str]:
        """The paths of what was masked; beyond a hundred, how many more."""
        return [*self._paths, f"and {self._more} more"] if self._more else self._paths

    def of(self, value: Any, path: str) -> Any:
        """The same JSON value with `***` under keys that name secrets; what holds none is not copied."""
        shown = value if self._size == math.inf else _Beginning(self._size).of(value)
        return self._of(shown, (None, path)) if _hints(shown) else shown

    def _of(self, value: Any, place: _Place) -> Any:
        # by its very type first: there is much of these, and nothing else goes on meanwhile
        kind = type(value)
        if kind in _SCALAR:
            return value
        if kind is dict or isinstance(value, Mapping):
            changed = self._changed(value.items(), place)
            return {**value, **changed} if changed or kind is not dict else value
        if kind is list or isinstance(value, list | tuple):
            changed = {} if _SCALAR.issuperset(map(type, value)) else self._changed(enumerate(value), place)
            if not changed and kind in (list, tuple):
                return value
            return [changed.get(number, item) for number, item in enumerate(value)]
        return self._of(_fields(value), place) if _is_written_as_object(value) else value

    def _changed(self, items: Iterable[tuple[str | int, Any]], place: _Place) -> dict[str | int, Any]:
        changed: dict[str | int, Any] = {}
        for name, item in items:
            if type(name) is str and is_secret(name) and not _is_harmless(name, item):
                self._note((place, name))
                changed[name] = _STARS
            elif type(item) not in _SCALAR and (shown := self._of(item, (place, name))) is not item:
                changed[name] = shown
        return changed

    def _note(self, place: _Place) -> None:
        if len(self._paths) < _MOST_PATHS:
            self._paths.append(_path(place))
        else:
            self._more += 1


class _Beginning:
    """The beginning of a value: never fewer than so many bytes of its JSON, when that is masked, and not many more."""

    def __init__(self, size: float) -> None:
        self._left = size

    def of(self, value: Any) -> Any:
        if isinstance(value, str):
            shown = value if len(value) <= self._left else value[: int(self._left) + 1]
            self._left -= len(shown) + 2
            return shown
        if isinstance(value, Mapping):
            return dict(self._items(value))
        if isinstance(value, list | tuple):
            return list(self._elements(value))
        if _is_written_as_object(value):
            return dict(self._items(_fields(value)))
        self._left -= 1
        return value

    def _items(self, value: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for key, item in value.items():
            if self._left < 0:
                return
            self._left -= len(key)
            if is_secret(key) and not _is_harmless(key, item):
                self._left -= len(_STARS) + 2
                yield key, _STARS
            else:
                yield key, self.of(item)

    def _elements(self, value: Iterable[Any]) -> Iterator[Any]:
        for item in value:
            if self._left < 0:
                return
            yield self.of(item)


def _path(place: _Place) -> str:
    parent, name = place
    if parent is None:
        return str(name)
    return f"{_path(parent)}[{name}]" if isinstance(name, int) else f"{_path(parent)}.{name}"


def _is_written_as_object(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(value: Any) -> dict[str, Any]:
    return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}


def _hints(value: Any) -> bool:
    """Whether there may be a key in it that names a secret. Going through the value to see takes thirty times as long."""
    try:
        text = orjson.dumps(value).lower()
    except TypeError:
        return True
    return any(hint in text for hint in _HINTS_IN_JSON)


def _is_harmless(key: str, value: Any) -> bool:
    """Whether this is no secret whatever its key says: nothing, yes or no, or how many there are."""
    return value is None or type(value) is bool or (_is_numbers(value) and _counts(key))


@functools.lru_cache(maxsize=4096)
def _counts(key: str) -> bool:
    return _NUMBERS.search(_words(key)) is not None


def _is_numbers(value: Any) -> bool:
    if type(value) in _SCALAR:
        return value is None or type(value) in (int, float)
    if isinstance(value, Mapping):
        return all(map(_is_numbers, value.values()))
    return isinstance(value, list | tuple) and all(map(_is_numbers, value))
