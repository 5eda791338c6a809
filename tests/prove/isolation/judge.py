"""What was found out: leaks, answers that tell foreign from unknown, controls that fail, ways in that have no example."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.prove.isolation.answers import AWAY, OK, Answer
from tests.prove.isolation.people import ID_FIELDS, Party, forms

_FAULTY = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS", "500"})
# who is asked too much says nothing of what was asked
TOO_MUCH = frozenset({"RATE_LIMITED", "QUOTA_EXCEEDED"})
# what is refused for its form, or for who asks, before anybody looks whose it is
_FORM = frozenset("INVALID_PAYLOAD UNAUTHENTICATED TOO_LARGE FRAME_TOO_LARGE BAD_JSON UNKNOWN_TYPE 400 401 413 415 422".split())
BEFORE = TOO_MUCH | AWAY | _FORM
# where in a text something is depends on what was sent
_WHERE = re.compile(r"is not valid JSON: .*?\(char \d+\)")
# how many of each kind are told
_TOLD = 40


@dataclass(slots=True)
class Findings:
    """Of one proof."""

    probes: int = 0
    # frames that sockets got by themselves
    heard: int = 0
    # streams that were listened to until their owner's had heard something
    held: int = 0
    # examples of which a probe got as far as to be asked whose it is, and whether one did that names such a thing in its place
    past: set[str] = field(default_factory=set)
    named: dict[str, bool] = field(default_factory=dict)
    outcomes: Counter[str] = field(default_factory=Counter)
    leaks: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    controls: int = 0
    controls_failed: list[str] = field(default_factory=list)
    covered: set[str] = field(default_factory=set)
    # what is made up, and must be found
    forged: set[str] = field(default_factory=set)

    @property
    def ok(self) -> bool:
        """Whether nothing is off."""
        return not (self.leaks or self.differences or self.wrong or self.controls_failed)

    @property
    def off(self) -> list[str]:
        """Everything that is off, but for controls."""
        return [*self.leaks, *self.differences, *self.wrong]

    def told(self, name: str) -> list[str]:
        """The first ones."""
        found: list[str] = getattr(self, name)
        return found[:_TOLD]


class Judge:
    """Looks at every answer that somebody got, for what belongs to others."""

    def __init__(self, findings: Findings, parties: Iterable[Party]) -> None:
        self.findings = findings
        self._parties = [one for one in parties if one.things.ids]
        self._forms = {one.canary: forms(one) for one in self._parties}

    def others(self, who: Party) -> list[Party]:
        """Whose things somebody must not see: administrators see those of their tenant."""
        return [one for one in self._parties if one.things is not who.things and not (who.rules and _of_one_tenant(who, one))]

    def look(self, what: str, who: Party, known: Iterable[str], answer: Answer, quiet: bool = True) -> None:
        """Judge one answer; `known` are ids that it may repeat."""
        self.findings.probes += 1
        self.findings.outcomes[answer.code] += 1
        self.search(what, who, answer, known)
        # a stream that breaks is no fault of whoever answers
        if answer.code in _FAULTY and (quiet or "upport code" in answer.told):
            self.findings.wrong.append(f"{what}: {answer.code} {answer.told}")
        if quiet and answer.code in AWAY | TOO_MUCH:
            self.findings.wrong.append(f"{what}: {answer.code} {answer.told}")

    def weigh(self, name: str, answer: Answer, *, named: bool, before: frozenset[str] = BEFORE) -> None:
        """Note whether a probe of an example was answered by what looks whose a thing is; `named`: it named one where it belongs."""
        past = answer.code not in before
        if past:
            self.findings.past.add(name)
        if named:
            self.findings.named[name] = past or self.findings.named.get(name, False)

    def shallow(self, names: Iterable[str]) -> None:
        """Of these examples, those are wrong of which no probe got past validation: they have shown nothing."""
        for name in names:
            if name not in self.findings.past or not self.findings.named.get(name, True):
                self.findings.wrong.append(f"{name}: every probe was refused before anybody looked whose it is")

    def search(self, what: str, who: Party, answer: Answer, known: Iterable[str] = ()) -> None:
        """Whether an answer has something of somebody else in it; to see ids that are known says nothing."""
        raw, named = answer.raw, {text for name, text in answer.fields() if name in ID_FIELDS}
        for other in self.others(who):
            if "leak" in self.findings.forged and other.name == "A":
                self.findings.forged.remove("leak")
                raw += other.canary.encode()
            found = [f"what {other.name} wrote"] if any(form in raw for form in self._forms[other.canary]) else []
            found += [f"a hidden id of {other.name}" for one in other.things.hidden if one.encode() in raw]
            own = {*who.things.ids.values(), *known}
            found += [f"{kind} of {other.name}" for kind, one in other.things.ids.items() if one in named and one not in own]
            self.findings.leaks += [f"{what}: {one}" for one in found[:3]]

    def compare(self, what: str, value: str, foreign: Answer, other: str, unknown: Answer) -> None:
        """What is somebody else's and what does not exist must be answered alike."""
        first, second = _said(foreign, value), _said(unknown, other)
        if "difference" in self.findings.forged:
            self.findings.forged.remove("difference")
            first = ("OK", "made up")
        if first != second and not {foreign.code, unknown.code} & (AWAY | {"RATE_LIMITED"}):
            self.findings.differences.append(f"{what}: {first} for what is foreign, {second} for what does not exist")

    def control(self, what: str, failure: str) -> None:
        """Note a control: an owner's own call."""
        self.findings.controls += 1
        if "control" in self.findings.forged:
            self.findings.forged.remove("control")
            failure = "made up"
        if failure:
            self.findings.controls_failed.append(f"{what}: {failure}")


def _said(answer: Answer, value: str) -> tuple[str, str]:
    """What counts when two answers are compared: which values were sent does not."""
    if answer.code == OK:
        return OK, " ".join(sorted(answer.shape))
    return answer.code, _WHERE.sub("", answer.told.replace(value, "..."))


def _of_one_tenant(one: Party, other: Party) -> bool:
    return one.things["tenant_id"] == other.things["tenant_id"]
