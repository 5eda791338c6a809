"""The verdict over runs, out of what was accepted, what the record and the clients have, and what tools did outside; pure."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tests.prove.runs import tools
from tests.prove.runs.outside import Line

Frame = dict[str, Any]
ENDS = frozenset({"agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"})
# what begins with this and these many digits is the mark of a run; a user's have the same first part
MARK = re.compile(r"kx[0-9a-f]{12}n\d+")
_USER = slice(0, 14)
# between the clocks of two processes of one machine, and the time at which an event is stamped and the one at which it is there
_SLACK_S = 0.1
_MOST = 20


@dataclass(frozen=True, slots=True)
class Accepted:
    """A run that the platform took on, and what it may come to: one of these results, or another end."""

    run_id: str
    user_id: str
    agent: str
    mark: str
    results: Sequence[Mapping[str, Any]] = ()
    end: str = "agent_completed"


@dataclass(slots=True)
class Evidence:
    """What is known: runs; by user the record in its order, and what their client saw; what tools did, and which runs may pay again."""

    accepted: list[Accepted] = field(default_factory=list)
    records: dict[str, list[Frame]] = field(default_factory=dict)
    seen: dict[str, list[Frame]] = field(default_factory=dict)
    effects: list[Line] = field(default_factory=list)
    again: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class Verdict:
    """What is wrong, by kind: how often, and the first of each in words."""

    found: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    events: int = 0
    effects: int = 0
    # what was done again before anybody knew that it was done: nothing is wrong with that
    repeated: int = 0

    def wrong(self, kind: str, what: str) -> None:
        """Take note of something."""
        self.found[kind] += 1
        if self.found[kind] <= _MOST // 4 and len(self.first) < _MOST:
            self.first.append(f"{kind}: {what}")

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.found


# every one is shown in the report, whether it was found or not
KINDS = (
    "lost", "stuck", "another_end", "wrong_result", "holes", "doubles", "unpaired", "after_the_end", "foreign", "committed_twice", "unmade",
    "seen_differently",
)  # fmt: skip


def judged(evidence: Evidence) -> Verdict:
    """The verdict."""
    verdict = Verdict(effects=len(evidence.effects))
    by_user: dict[str, dict[str, Accepted]] = defaultdict(dict)
    for run in evidence.accepted:
        by_user[run.user_id][run.run_id] = run
    committed: dict[str, float] = {}
    for user_id in by_user.keys() | evidence.records.keys():
        record = evidence.records.get(user_id, [])
        verdict.events += len(record)
        _record(verdict, user_id, record, by_user[user_id])
        _seen(verdict, user_id, record, evidence.seen.get(user_id))
        _runs(verdict, record, by_user[user_id])
        committed |= _committed(record)
    _effects(verdict, evidence, committed)
    return verdict


def _record(verdict: Verdict, user_id: str, record: Sequence[Frame], runs: Mapping[str, Accepted]) -> None:
    """A user's record as such: no hole, nothing twice, nothing of others."""
    if (cursors := [frame["cursor"] for frame in record]) != list(range(1, len(record) + 1)):
        verdict.wrong("holes", f"the cursors of {user_id} are {_odd(cursors)}")
    for event_id, times in Counter(frame["event_id"] for frame in record).items():
        if times > 1:
            verdict.wrong("doubles", f"event {event_id} is there {times} times")
    mine = {run.mark[_USER] for run in runs.values()}
    for frame in record:
        marks = {mark[_USER] for mark in MARK.findall(json.dumps(frame["data"]))}
        if frame["user_id"] != user_id or (frame["run_id"] and frame["run_id"] not in runs) or marks - mine:
            verdict.wrong("foreign", f"{frame['type']} of run {frame['run_id']} is in the record of {user_id}")


def _odd(numbers: Sequence[int]) -> str:
    at = next((at for at, number in enumerate(numbers, 1) if number != at), len(numbers))
    return f"not contiguous from {at} on: {list(numbers[max(at - 2, 0) : at + 2])}"


def _seen(verdict: Verdict, user_id: str, record: Sequence[Frame], seen: Sequence[Frame] | None) -> None:
    """What the client saw, over all of its sockets, is the record: in its order, once, whole."""
    if seen is not None and list(seen) != list(record):
        at = next((at for at, (one, other) in enumerate(zip(seen, record, strict=False)) if one != other), min(len(seen), len(record)))
        verdict.wrong("seen_differently", f"the client of {user_id} saw {len(seen)} events of {len(record)}, other ones from {at + 1} on")


def _runs(verdict: Verdict, record: Sequence[Frame], runs: Mapping[str, Accepted]) -> None:
    events: dict[str, list[Frame]] = {run_id: [] for run_id in runs}
    for frame in record:
        if frame["run_id"] in events:
            events[frame["run_id"]].append(frame)
    for run_id, run in runs.items():
        if events[run_id]:
            _run(verdict, run, events[run_id])
        else:
            verdict.wrong("lost", f"{run.agent} {run_id} was accepted, and the record has nothing of it")


def _run(verdict: Verdict, run: Accepted, events: Sequence[Frame]) -> None:
    about = f"{run.agent} {run.run_id}"
    if (seqs := [frame["seq"] for frame in events]) != list(range(1, len(events) + 1)):
        verdict.wrong("holes", f"the seqs of {about} are {_odd(seqs)}")
    for told, times in Counter(_said(frame) for frame in events).items():
        if told and times > 1:
            verdict.wrong("doubles", f"{about} tells {times} times: {told}")
    _pairs(verdict, about, events)
    ends = [at for at, frame in enumerate(events) if frame["type"] in ENDS]
    if not ends:
        verdict.wrong("stuck", f"{about} has {len(events)} events and no end; the last one is {events[-1]['type']}")
        return
    if ends != [len(events) - 1]:
        verdict.wrong("after_the_end", f"{about} ends at {ends} of {len(events)}")
    end = events[ends[0]]
    if end["type"] != run.end:
        why = end["data"].get("error", {})
        verdict.wrong("another_end", f"{about} ends with {end['type']}: {why.get('code', '')} {why.get('message', '')}")
    elif run.results and end["data"].get("result") not in run.results:
        verdict.wrong("wrong_result", f"{about} came to {end['data'].get('result')}, not {list(run.results)}")


def _said(frame: Frame) -> str:
    """What an event says that no run of the proof says twice; empty when that is nothing."""
    data = frame["data"]
    match frame["type"]:
        case "agent_thinking":
            return f"thought {data['reasoning']}"
        case "tool_executing":
            # where the tool has one
            return f"call {data['parameters']['key']}" if "key" in data["parameters"] else ""
        case "approval_requested" | "approval_resolved":
            return f"{frame['type']} {data['approval_id']}"
        case "message_created":
            return f"message {data['message_id']}"
        case "agent_started":
            return "began"
    return ""


def _pairs(verdict: Verdict, about: str, events: Iterable[Frame]) -> None:
    """Each call begins once and is over once, in this order."""
    under_way, known = set[str](), set[str]()
    for frame in events:
        call = frame["data"].get("tool_call_id", "")
        if frame["type"] == "tool_executing":
            if call in known:
                verdict.wrong("unpaired", f"{about}: call {call} begins twice")
            under_way.add(call)
            known.add(call)
        elif frame["type"] == "tool_completed":
            if call not in under_way:
                verdict.wrong("unpaired", f"{about}: call {call} is over that is not under way")
            under_way.discard(call)
    if under_way:
        verdict.wrong("unpaired", f"{about}: {len(under_way)} calls are never over")


def _committed(record: Iterable[Frame]) -> dict[str, float]:
    """When the outcome of each step with an effect was in the record, by its key outside."""
    keys, found = dict[str, str](), dict[str, float]()
    for frame in record:
        data = frame["data"]
        if frame["type"] == "tool_executing" and data["tool_name"] in tools.EFFECTS:
            keys[data["tool_call_id"]] = data["parameters"]["key"]
        elif frame["type"] == "tool_completed" and data["status"] == "success" and data["tool_call_id"] in keys:
            found[keys[data["tool_call_id"]]] = told_at(frame)
    return found


def _effects(verdict: Verdict, evidence: Evidence, committed: Mapping[str, float]) -> None:
    """Nothing was done again that was committed, nothing twice that may be done once, and all that was committed was done."""
    done: dict[str, list[Line]] = defaultdict(list)
    for line in evidence.effects:
        done[line.of].append(line)
    for key, lines in done.items():
        late = [line for line in lines if line.at > committed.get(key, line.at) + _SLACK_S]
        for line in late:
            kind = "unmade" if len(late) == len(lines) else "committed_twice"
            verdict.wrong(kind, f"{line.name} {key} by {line.pid}, {line.at - committed[key]:.2f} s after it was committed")
        allowed = 1 + evidence.again[key] if lines[0].name in tools.ONCE else len(lines)
        if len(lines) - len(late) > allowed:
            when = ", ".join(f"by {line.pid} after {line.at - lines[0].at:.3f} s" for line in lines)
            verdict.wrong("committed_twice", f"{lines[0].name} {key}, which may be done once, was done {len(lines)} times: {when}")
        verdict.repeated += len(lines) - 1 - len(late)
    for key in committed.keys() - done.keys():
        verdict.wrong("unmade", f"{key} is committed, and was never done")


@dataclass(frozen=True, slots=True)
class Bound:
    """How long something takes for all but one in a hundred: as promised where nothing else works, and what is wrong anywhere."""

    promised_ms: float
    gross_ms: float

    def exceeded(self, what: str, times: Iterable[float], *, alone: bool) -> list[str]:
        """What is wrong, in words; where others work on the machine, only what is grossly so."""
        limit, found = self.promised_ms if alone else self.gross_ms, percentiles(times)
        return [f"{what}: {found['p99']} ms (p99 of {found['n']}), more than {limit:g}"] if found.get("p99", 0.0) > limit else []


def percentiles(values: Iterable[float]) -> dict[str, float]:
    """How many there are, the middle one and the one that a hundredth exceeds (nearest rank)."""
    ordered = sorted(values)
    if not ordered:
        return {"n": 0}
    at = {name: ordered[max(0, -(-len(ordered) * share // 100) - 1)] for name, share in (("p50", 50), ("p99", 99))}
    return {"n": len(ordered), **{name: round(value, 1) for name, value in at.items()}, "max": round(ordered[-1], 1)}


def told_at(frame: Frame) -> float:
    """When an event was recorded, in seconds since the epoch."""
    return datetime.fromisoformat(frame["timestamp"]).timestamp()
