"""An example of every way to ask: how its owner asks so that it works. What has none fails the proof."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.message import Message

from tests.prove.isolation.answers import OK, Answer
from tests.prove.isolation.people import Party
from tests.prove.isolation.world import World

USER, ADMIN, OPERATOR, NOBODY = "user", "admin", "operator", "nobody"
# among what is `legit`: anything in any place
ANY = ("*", "*")
Works = Callable[[Answer], bool]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Over HTTP."""

    path: dict[str, str] = field(default_factory=dict)
    query: dict[str, str] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    json: Any = None
    form: dict[str, str] | None = None
    content: bytes | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """`make` says what is asked, by a user, an administrator, nobody known, or a service by its name.

    `shows` are kinds of things that the owner's own answer must contain: else nothing is proved by their absence. `reads` is a kind that
    names what is read: it must take as long to be told that it is foreign as that it is unknown. `spare`: it costs whoever asks their
    session or more, and `signed_in` that it must be a real one. `once`: it is over when it was tried. `long`: one page does not hold all.
    `echoes`: it tells whoever asks what they have named themselves. `live`: it goes on telling what happens, so who asks in another's
    name listens until the owner has heard something.
    `rulers`: administrators may ask it of users of their tenant. `told`: kinds of which the contract says that their existence shows.
    `tells`: kinds that it tells of everybody, whoever asks.
    """

    name: str
    by: str
    make: Callable[[World, Party], Awaitable[Any]]
    shows: tuple[str, ...] = ()
    reads: str = ""
    spare: bool = False
    signed_in: bool = False
    rulers: bool = False
    once: bool = False
    long: bool = False
    echoes: bool = False
    live: bool = False
    context: bool = False
    told: frozenset[str] = frozenset()
    tells: frozenset[str] = frozenset()
    # in which place the contract lets others of the tenant, or a service, name which kinds
    legit: frozenset[tuple[str, str]] = frozenset()
    works: Works = lambda answer: answer.code == OK
    until: Callable[[Sequence[Message]], bool] = lambda _: False


class Examples:
    """All of one kind of way in, by name."""

    def __init__(self) -> None:
        self.known: dict[str, Example] = {}

    def __call__(
        self,
        name: str,
        by: str = USER,
        *,
        shows: str = "",
        told: str = "",
        tells: str = "",
        legit: Sequence[tuple[str, str]] = (),
        **more: Any,
    ) -> Callable[[Callable[[World, Party], Awaitable[Any]]], Callable[[World, Party], Awaitable[Any]]]:
        """Decorates the factory of one."""

        def keep(make: Callable[[World, Party], Awaitable[Any]]) -> Callable[[World, Party], Awaitable[Any]]:
            assert name not in self.known, name
            self.known[name] = Example(
                name, by, make, shows=tuple(shows.split()), told=frozenset(told.split()), tells=frozenset(tells.split()),
                legit=frozenset(legit), **more,
            )  # fmt: skip
            return make

        return keep


rpcs, routes, frames = Examples(), Examples(), Examples()
