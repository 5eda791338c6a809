"""Everything that is sent: each example in the names of others, with the owner's ids wherever something can be written."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import httpx
import websockets

from tests.prove.isolation import leaves
from tests.prove.isolation.answers import OK, Answer, Metadata
from tests.prove.isolation.asking import PEOPLE, Asked, Rpc, Way
from tests.prove.isolation.example import ADMIN, ANY, NOBODY, OPERATOR, Example
from tests.prove.isolation.judge import BEFORE, TOO_MUCH, Judge
from tests.prove.isolation.people import Party, twin
from tests.prove.isolation.pulse import BROKEN, LIVE
from tests.prove.isolation.settle import granted
from tests.prove.isolation.world import World

# what names something; elsewhere some of the values do
_NAMING, _OF_TEXT = ("_id", "token", "email", "state", "code", "Event-ID"), 2
_TRIES = 3
# until who has asked too much may ask again
_PAUSE_S = 2.0
_ONCE = ("request_id", "Idempotency-Key")


@dataclass(slots=True)
class Prober:
    """Sends, and has it judged. `share` is the part of the places that is tried. `quiet`: nothing else goes on, so answers can be
    compared."""

    world: World
    judge: Judge
    chance: random.Random
    share: float = 1.0
    quiet: bool = True
    # how many values of each place, where not all
    values: int | None = None
    room: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(8))

    async def course(self, way: Way, example: Example, name: str) -> None:
        """One example, by everybody who is not the owner."""
        victim = self.world["A"]
        for attacker in self.attackers(example):
            async with self.room:
                await self._by(_Course(self, way, example, name, attacker, victim))

    async def _by(self, course: _Course) -> None:
        try:
            await course.whole()
            await course.places()
            await course.beside()
        except (*BROKEN, LookupError, AttributeError) as error:
            if self.quiet:
                self.judge.findings.wrong.append(f"{course.what}: {type(error).__name__} {error}"[:300])

    def attackers(self, example: Example) -> list[Party]:
        """Who asks: another user of the tenant, one of another tenant, and who rules that one, where rulers ask."""
        names = ["B", "C", "F"] if example.rulers or example.by in (ADMIN, OPERATOR) else ["B", "C"]
        return [self.world[name] for name in names if self.world[name].things.ids]


@dataclass(slots=True)
class _Course:
    prober: Prober
    way: Way
    example: Example
    name: str
    attacker: Party
    victim: Party
    base: Asked | None = None
    unknown: dict[tuple[leaves.Path, str], tuple[str, Answer]] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """For the report."""
        return f"{self.name} as {self.attacker.name}"

    @property
    def may(self) -> bool:
        """Whether the attacker may ask it at all, of what is their own."""
        return self.example.by != OPERATOR and (self.example.by != ADMIN or self.attacker.rules)

    async def _base(self) -> Asked:
        if self.base is None:
            self.base = await self._ready()
        return self.base

    async def _ready(self, as_: Party | None = None) -> Asked:
        for _ in range(_TRIES - 1):
            with contextlib.suppress(OSError, httpx.TransportError):
                return await self.way.ready(self.example, self.attacker, as_)
        return await self.way.ready(self.example, self.attacker, as_)

    async def _ask(self, what: str, asked: Asked, sent: set[str], extra: Metadata = (), *, judged: bool = True) -> Answer:
        answer = await self._answered(asked, extra)
        if answer.code == OK or self.example.once:
            self.base = None  # what works once may not work again
        known = self._told_of_all()
        if judged:
            self.prober.judge.look(what, self.attacker, {*known, *sent} if self.example.echoes else known, answer, self.prober.quiet)
        else:
            self.prober.judge.search(what, self.attacker, answer, known)
        return answer

    def _told_of_all(self) -> set[str]:
        """What of others the contract has this answer tell."""
        everybody = [self.prober.world[name] for name in ("A", "B", "C")]
        return {one.things.ids[kind] for one in everybody for kind in self.example.tells if kind in one.things.ids}

    async def _answered(self, asked: Asked, extra: Metadata) -> Answer:
        """The answer. A connection that was kept may just be closed by the other end: it is asked again, as where it was asked too much."""
        for at in range(_TRIES):
            try:
                answer = await self.way.ask(asked, extra)
            except (OSError, httpx.HTTPError, websockets.WebSocketException, TimeoutError, EOFError) as error:
                if not self.prober.quiet:
                    return Answer("UNAVAILABLE", str(error))
                if at + 1 == _TRIES:
                    raise
            else:
                if not self.prober.quiet or answer.code not in TOO_MUCH or at + 1 == _TRIES:
                    return answer
                await asyncio.sleep(_PAUSE_S)
        raise TimeoutError

    def _weigh(self, answer: Answer, *, named: bool) -> None:
        """Note whether somebody looked whose it is. Who is nobody yet, and who may not ask at all, is refused as who they are."""
        if self.prober.quiet and (self.may or self.example.by == OPERATOR):
            before = BEFORE - {"UNAUTHENTICATED", "401"} if self.example.by == NOBODY else BEFORE
            self.prober.judge.weigh(self.name, answer, named=named, before=before)

    async def whole(self) -> None:
        """What the owner would ask, asked by another, who also asks what is not for them at all."""
        # where a service may name what is anybody's, there is nothing to find in all of it at once
        if not (self.example.legit and self.example.by not in PEOPLE):
            asked = await self._ready(self.victim)
            self._weigh(await self._ask(f"{self.what}: all of A's", asked, {self.victim.user_id}), named=False)
            if self.example.live and LIVE in self.victim.things.ids:
                asked = await self._ready(_with(self.victim, run_id=self.victim.things[LIVE]))
                await self._ask(f"{self.what}: all of A's that goes on", asked, {self.victim.user_id})
        if self.example.by not in PEOPLE and isinstance(self.way, Rpc):
            base = await self._base()
            asked = Asked(self.example, base.who, base.body, self.attacker.bearer)
            answer = await self._ask(f"{self.what}: a user for a service", asked, set())
            if not await self._denied(asked, (), answer, "PERMISSION_DENIED"):
                self.prober.judge.findings.wrong.append(f"{self.what}: a user for a service: {answer.code}")

    async def places(self) -> None:
        """Each value of the owner's in each place; all of it again when what it was written into does not work any more."""
        works = ""
        for _ in range(_TRIES):
            await self._places()
            if not self.prober.quiet or not (works := await self._fails()):
                return
            self.base, self.unknown = None, {}
        self.prober.judge.findings.wrong.append(f"{self.what}: the places show nothing, for as it is, it is not answered well: {works}")

    async def _places(self) -> None:
        places = list(self.way.places(await self._base()))
        if any("grant_token" in place for place in places):
            # they do not last
            self.victim.things.grant_token = await granted(self.prober.world, self.victim)
        for place in places:
            if self.prober.chance.random() < self.prober.share:
                for kind, value in self._values(place):
                    await self._one(place, kind, value)

    async def _fails(self) -> str:
        """Why what was last asked with something foreign in it does not work without, or nothing. Whoever may not ask is told so."""
        asked, missing = self.way.anew(await self._base()), _missing(self.example, self.attacker)
        for _ in range(_TRIES):
            answer = await self.way.ask(asked, until=lambda found: not missing(found))
            self.prober.judge.search(f"{self.what}: as it is", self.attacker, answer, self._told_of_all())
            self.base = None if answer.code == OK or self.example.once else self.base
            if self.may and answer.code == OK and (not isinstance(self.way, Rpc) or self.example.works(answer)):
                return ""
            if not self.may and answer.code == "PERMISSION_DENIED":
                return ""
            if answer.code not in TOO_MUCH:
                break
            await asyncio.sleep(_PAUSE_S)
        return f"{answer.code} {answer.told}"

    def _values(self, place: leaves.Path) -> Iterator[tuple[str, str]]:
        last = next((str(part) for part in reversed(place) if isinstance(part, str) and part != "{}"), "")
        things, own = self.victim.things, set(self.attacker.things.ids.values())
        found = dict(things.ids)
        if last == "page_token":
            found |= things.pages
        if last == "grant_token":
            found["grant"] = things.grant_token
        found["request_id"] = self.victim.request_ids.get(self.name, found["request_id"])
        names = [name for name in found if found[name] not in own and not self._may(last, name)]
        if last in _ONCE or place == ("id",):
            # whatever is there counts once for whoever sends it
            names = ["request_id"]
        else:
            # those which belong there, if there are some, and some of the others
            most = self.prober.values or (self.way.most if last.endswith(_NAMING) else min(_OF_TEXT, self.way.most))
            most = max(most, sum(_kind(name) == last for name in names))
            names = sorted(names, key=lambda name: (_kind(name) != last, self.prober.chance.random()))[:most]
        yield from ((name, found[name]) for name in names)

    def _may(self, last: str, kind: str) -> bool:
        """Whether the contract lets this one name that there: who is of the tenant, or a service."""
        near = self.attacker.boss is self.victim.boss or self.example.by not in PEOPLE
        return ANY in self.example.legit or (near and bool({(last, _kind(kind)), (last, "*")} & self.example.legit))

    async def _one(self, place: leaves.Path, kind: str, value: str) -> None:
        where = ".".join(map(str, place))
        what = f"{self.what}: {kind} in {where}"
        asked = self.way.written(self.way.anew(await self._base()), place, value)
        answer = await self._ask(what, asked, {value})
        self._weigh(answer, named=_kind(kind) == place[-1])
        if self.prober.quiet and not {_kind(kind), "*"} & self.example.told and kind != "grant":
            other, unknown = await self._unknown(place, kind, value)
            for _ in range(_TRIES - 1):
                if answer.silent == unknown.silent or answer.code == unknown.code:
                    break
                # who says nothing may only be slow
                answer = await self._ask(what, self.way.written(self.way.anew(await self._base()), place, value), {value})
                self.unknown.clear()
                other, unknown = await self._unknown(place, kind, value)
            # a page begins where its token says, or behind this text in the order of texts, whoever has what is there
            begins = kind.startswith("page:") or place[-1] == "after"
            if not (begins and answer.code == unknown.code == OK):
                self.prober.judge.compare(what, value, answer, other, unknown)

    async def _unknown(self, place: leaves.Path, kind: str, value: str) -> tuple[str, Answer]:
        """What is answered about something that does not exist."""
        form = kind if kind in ("email", "request_id", "correlation_id", "prefix") or kind.startswith("page:") else "id"
        if (place, form) not in self.unknown:
            other = twin(kind, value)
            asked = self.way.written(self.way.anew(await self._base()), place, other)
            self.unknown[place, form] = other, await self._ask(f"{self.what}: nothing", asked, set(), judged=False)
        return self.unknown[place, form]

    async def beside(self) -> None:
        """The owner's name beside a request that says nothing of them: in metadata and headers."""
        if self.way.kind == "frame" or ANY in self.example.legit:
            return
        things, token = self.victim.things, self.victim.token
        extras: dict[str, Metadata] = {
            "who is named": (
                ("x-user-id", things["user_id"]),
                ("x-netra-user-id", things["user_id"]),
                ("x-tenant-id", things["tenant_id"]),
            ),
            "what is named": (("x-thread-id", things["thread_id"]), ("x-run-id", things["run_id"]), ("x-session-id", things["session_id"])),
            "baggage": (("baggage", f"user_id={things['user_id']},run_id={things['run_id']},tenant_id={things['tenant_id']}"),),
            "correlation": (
                ("x-correlation-id", things["correlation_id"]),
                ("traceparent", f"00-{things['correlation_id']}-{'1' * 16}-01"),
            ),
        }
        inside = isinstance(self.way, Rpc) and not self.example.context
        if self.example.by in PEOPLE or inside:
            extras["a context"] = (("x-netra-context", things.context_token),)
        if self.example.by in PEOPLE[:3]:
            extras["a token more"] = (("authorization", f"Bearer {token}"),)
        for name, extra in extras.items():
            answer = await self._ask(f"{self.what}: {name}", await self._base(), set(), extra)
            if name == "a token more" and not await self._denied(await self._base(), extra, answer, "UNAUTHENTICATED"):
                self.prober.judge.findings.wrong.append(f"{self.what}: two tokens: {answer.code} {answer.told}")

    async def _denied(self, asked: Asked, extra: Metadata, answer: Answer, code: str) -> bool:
        """Whether it was refused. A stream that says nothing may only be slow: it is asked again, where it is to be quick."""
        for _ in range(3):
            if not answer.silent:
                break
            if not self.prober.quiet:
                return True
            answer = await self.way.ask(asked, extra)
        return answer.code == code or (not self.prober.quiet and answer.code != OK)


def _kind(name: str) -> str:
    """Of what kind a thing is, of which somebody has several."""
    return name.partition("#")[0]


def _with(party: Party, **ids_: str) -> Party:
    """Somebody with others of their things in the place of these."""
    found = party.with_things_of(party)
    found.things = dataclasses.replace(party.things, ids={**party.things.ids, **ids_})
    return found


def controls_of(world: World, example: Example) -> list[Party]:
    """Whose own calls must succeed."""
    if example.by == OPERATOR:
        return [world["operator"]]
    if example.by == ADMIN:
        return [world["operator"], world["F"]]
    return [world[name] for name in ("A", "B", "C") if world[name].things.ids]


async def control(world: World, judge: Judge, way: Way, example: Example, name: str, who: Party, tries: int = 1) -> None:
    """The owner's own call: it succeeds, and shows what it must."""
    for _ in range(tries):
        try:
            failure = await _own(way, example, name, who, later=tries > 1)
        except (*BROKEN, LookupError, AttributeError) as error:
            failure = f"{type(error).__name__} {error}"[:300]
        if not failure:
            break
    judge.control(f"{name} as {who.name}", failure)


def _missing(example: Example, who: Party, *, later: bool = False) -> Callable[[Answer], list[str]]:
    """What an answer does not show of what it must."""
    # those who try everything have more in the end than one page holds, and so has everybody
    shows = () if example.long and (later or who.name in ("B", "C", "F")) else example.shows

    def missing(answer: Answer) -> list[str]:
        found = [kind for kind in shows if kind != "canary" and who.things[kind].encode() not in answer.raw]
        return found + (["canary"] if "canary" in shows and who.canary.encode() not in answer.raw else [])

    return missing


async def _own(way: Way, example: Example, name: str, who: Party, *, later: bool) -> str:
    """Why it failed, or nothing."""
    missing = _missing(example, who, later=later)
    asked = await way.ready(example, who)
    if request_id := way.request_id(asked):
        who.request_ids[name] = request_id
    answer = await way.ask(asked, until=lambda found: not missing(found))
    # over HTTP the example of an RPC has no message to look at
    works = answer.code == OK and (not isinstance(way, Rpc) or example.works(answer))
    if works and not missing(answer):
        return ""
    return f"{answer.code} {answer.told}{f' without {found}' if (found := missing(answer)) else ''}"
