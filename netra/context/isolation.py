"""Proves that contexts of different users hold nothing in common; for tests and for whoever doubts."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping

from netra import errors
from netra.context.execution import UserExecutionContext
from netra.context.payload import Payload


class Isolation:
    """Knows the contexts it was shown for as long as they live, and what each of them holds: by identity, not by value.

    One instance per test or per doubt; it is no state of the module.
    """

    def __init__(self) -> None:
        self._living: dict[int, weakref.ref[UserExecutionContext]] = {}
        # who holds an object: keys of `_living`
        self._holders: dict[int, set[int]] = {}
        self._shared: dict[int, tuple[object, str]] = {}

    def __len__(self) -> int:
        return len(self._living)

    def share(self, thing: object, name: str) -> None:
        """Declare something to belong to the whole process, so that no context may hold it."""
        self._shared[id(thing)] = (thing, name)

    def watch(self, context: UserExecutionContext) -> UserExecutionContext:
        """Remember the context, weakly, and return it."""
        key = id(context)
        if key not in self._living:
            held = {id(part) for part, _ in _parts(context)}
            for part in held:
                self._holders.setdefault(part, set()).add(key)
            self._living[key] = weakref.ref(context, lambda _: self._forget(key, held))
        return context

    def verify(self, context: UserExecutionContext) -> UserExecutionContext:
        """The context, watched from now on. Raises `ContextIsolation` naming the field that another user's context holds as well."""
        self.watch(context)
        for part, name in _parts(context):
            if id(part) in self._shared:
                raise errors.ContextIsolation(f"{name} is {self._shared[id(part)][1]}, which belongs to the whole process", field=name)
            for key in self._holders.get(id(part), ()):
                other = self._living[key]()
                if other is not None and (other.user_id, other.tenant_id) != (context.user_id, context.tenant_id):
                    raise errors.ContextIsolation(f"{name} is the same object in a context of another user", field=name)
        return context

    def verify_all(self) -> int:
        """How many contexts were verified: all that live."""
        living = [context for reference in list(self._living.values()) if (context := reference()) is not None]
        for context in living:
            self.verify(context)
        return len(living)

    def clear(self) -> None:
        """Forget everything."""
        self._living.clear()
        self._holders.clear()
        self._shared.clear()

    def _forget(self, key: int, held: set[int]) -> None:
        self._living.pop(key, None)
        for part in held:
            holders = self._holders.get(part, set())
            holders.discard(key)
            if not holders:
                self._holders.pop(part, None)


def _parts(context: UserExecutionContext) -> Iterator[tuple[object, str]]:
    """What could carry something from one user to another, with the name of the field it hangs on."""
    for name, payload in (("agent_context", context._agent_context), ("audit_metadata", context._audit_metadata)):
        yield payload, name
        yield from ((part, name) for part in _containers(payload))
    for name, attached in (("transaction", context._transaction), ("connection", context._connection)):
        if attached is not None:
            yield attached, name


def _containers(payload: Payload) -> Iterator[object]:
    pending: list[object] = [payload.content]
    while pending:
        part = pending.pop()
        # the empty tuple is one and the same everywhere, and text and numbers cannot be changed
        if isinstance(part, Mapping):
            yield part
            pending += part.values()
        elif isinstance(part, tuple) and part:
            yield part
            pending += part
