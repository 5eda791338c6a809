"""What a run did with its time, and why it ended as it did, read from its record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from netra.api import TERMINAL

# what a person can do about it; `{run}` and `{correlation}` are filled in
REMEDIES = {
    "INVALID_PAYLOAD": "Correct what the message names, then start the run again.",
    "FRAME_TOO_LARGE": "Send less, or attach it as a file with --file.",
    "UNAUTHENTICATED": "Sign in again: netra login.",
    "PERMISSION_DENIED": "`netra tools` and `netra agents` list what you may use; an administrator grants more.",
    "NOT_FOUND": "Check the name or id: `netra agents`, `netra tools` and `netra artifacts` list what there is.",
    "FAILED_PRECONDITION": "Do first what the message asks for, then start the run again.",
    "RATE_LIMITED": "Wait a little, then start the run again.",
    "QUOTA_EXCEEDED": "Wait until the quota is renewed, or have your tier raised.",
    "DEADLINE_EXCEEDED": "Give it more time with --deadline, or less to do.",
    "SANDBOX_UNAVAILABLE": "An operator must make the sandbox available; nothing runs without it.",
    "RESOURCE_EXHAUSTED": "Have the tool do less at a time; an operator may raise the limits of a call.",
    "SECURITY_VIOLATION": "The tool tried what its sandbox forbids; an operator finds what in the audit trail.",
    "TOOL_FAILED": "Look where it failed: netra trace {correlation}; the dispatcher's log has the cause under that id.",
    "AGENT_FAILED": "Look where it failed: netra trace {correlation}; the dispatcher's log has the cause under that id.",
    "OWNER_LOST": "The process that ran it died. Start the run again.",
    "UNAVAILABLE": "A part of the platform was away. Start the run again; `netra doctor` says what is missing.",
    "INTERNAL": "A fault of the platform: give an operator the support code and the correlation id {correlation}.",
}


@dataclass(frozen=True, slots=True)
class Moment:
    """An event, when it came after the run was accepted, and after what silence."""

    seq: int
    type: str
    agent: str
    at_s: float
    gap_s: float
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a tool. `beside` says that another call ran at the same time."""

    tool: str
    agent: str
    tool_call_id: str
    began_s: float
    took_s: float
    status: str
    error: str
    beside: bool = False

    @property
    def ended_s(self) -> float:
        """When it was over."""
        return self.began_s + self.took_s


@dataclass(frozen=True, slots=True)
class Share:
    """What took time. Shares of calls that ran side by side add up to more than the whole."""

    what: str
    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class Ending:
    """How it ended; `state` is empty while it has not."""

    state: str
    code: str
    message: str
    details: Mapping[str, str]
    where: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Account:
    """The whole of it."""

    run: Mapping[str, Any]
    request: str
    total_s: float
    moments: Sequence[Moment]
    calls: Sequence[Call]
    shares: Sequence[Share]
    ending: Ending
    next_commands: Sequence[str]


def account(run: Mapping[str, Any], events: Sequence[Mapping[str, Any]], now: datetime | None = None) -> Account:
    """The account of a run (as `GET /v1/runs/ID` shows it) with all events of its record."""
    began = _time(run["created_at"])
    end = _time(run["ended_at"]) if run.get("ended_at") else now or datetime.now(UTC)
    end = max([end, *(_time(event["timestamp"]) for event in events)])
    total = _seconds(began, end)
    moments = _moments(began, events)
    calls = _beside(_calls(moments, total))
    ending = _ending(run, moments, calls)
    return Account(
        run=run,
        request=next((str(moment.data.get("content", "")) for moment in moments if moment.data.get("role") == "user"), ""),
        total_s=total,
        moments=moments,
        calls=calls,
        shares=_shares(_waited(began, run, moments, total), calls, total),
        ending=ending,
        next_commands=_next(run, moments, ending),
    )


def summary(found: Account) -> dict[str, Any]:
    """The account as JSON, times in seconds; the events themselves are in the record."""
    entries = asdict(found)
    entries["moments"] = [{name: value for name, value in moment.items() if name != "data"} for moment in entries["moments"]]
    return {name: _rounded(value) for name, value in entries.items()}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 6) if isinstance(value, float) else value


def _time(text: str) -> datetime:
    return datetime.fromisoformat(text)


def _seconds(since: datetime, until: datetime) -> float:
    return max((until - since).total_seconds(), 0.0)


def _moments(began: datetime, events: Iterable[Mapping[str, Any]]) -> list[Moment]:
    found: list[Moment] = []
    before = 0.0
    for event in events:
        at = _seconds(began, _time(event["timestamp"]))
        data = event["data"]
        found.append(Moment(int(event["seq"]), str(event["type"]), str(data.get("agent_name", "")), at, max(at - before, 0.0), data))
        before = at
    return found


def _calls(moments: Sequence[Moment], total: float) -> list[Call]:
    """Calls in the order in which they began; one that is open lasts until the end."""
    completed = {str(moment.data["tool_call_id"]): moment for moment in moments if moment.type == "tool_completed"}
    found = []
    for moment in moments:
        if moment.type != "tool_executing":
            continue
        data, over = moment.data, completed.get(str(moment.data["tool_call_id"]))
        if over is None:
            took, status, error = total - moment.at_s, "open", ""
        else:
            # events are timed when they are recorded, several at once; the tool's own time is exact
            took = float(over.data.get("execution_time_ms", 0.0)) / 1000
            status, error = str(over.data.get("status", "")), str((over.data.get("error") or {}).get("code", ""))
        found.append(Call(str(data["tool_name"]), moment.agent, str(data["tool_call_id"]), moment.at_s, max(took, 0.0), status, error))
    return found


def _beside(calls: Sequence[Call]) -> list[Call]:
    return [replace(call, beside=any(_together(call, other) for other in calls if other is not call)) for call in calls]


def _together(one: Call, other: Call) -> bool:
    return one.began_s < other.ended_s and other.began_s < one.ended_s


def _waited(began: datetime, run: Mapping[str, Any], moments: Sequence[Moment], total: float) -> float:
    if run.get("started_at"):
        return min(_seconds(began, _time(run["started_at"])), total)
    return moments[0].at_s if moments else total


def _shares(waited: float, calls: Sequence[Call], total: float) -> list[Share]:
    """What took the time, the longest first."""
    taken = {f"tool {call.tool}": 0.0 for call in calls}
    for call in calls:
        taken[f"tool {call.tool}"] += call.took_s
    taken["waiting to begin"] = waited
    taken["the agent and the platform"] = max(total - waited - _covered(calls), 0.0)
    found = [Share(what, seconds, seconds / total if total else 0.0) for what, seconds in taken.items()]
    return sorted(found, key=lambda share: -share.seconds)


def _covered(calls: Sequence[Call]) -> float:
    """How long at least one call was running."""
    covered, until = 0.0, 0.0
    for call in sorted(calls, key=lambda call: call.began_s):
        covered += max(call.ended_s - max(call.began_s, until), 0.0)
        until = max(until, call.ended_s)
    return covered


def _ending(run: Mapping[str, Any], moments: Sequence[Moment], calls: Sequence[Call]) -> Ending:
    last = moments[-1] if moments and moments[-1].type in TERMINAL else None
    if last is None:
        return _open_ending(run, moments, calls)
    data = last.data
    state = last.type.removeprefix("agent_")
    error = data.get("error") or {}
    code = str(error.get("code", ""))
    details = {str(name): str(value) for name, value in (error.get("details") or {}).items()}
    return Ending(state, code, _message(moments, error), details, _where(code, calls), _remedy(code, run))


def _message(moments: Sequence[Moment], error: Mapping[str, Any]) -> str:
    last, data = moments[-1], moments[-1].data
    if last.type == "agent_cancelled":
        left = [str(tool["tool_call_id"]) for tool in data.get("tools_stopped", ()) if not tool.get("confirmed")]
        unconfirmed = f"; not known to have stopped: {', '.join(left)}" if left else ""
        return f"Cancelled by {data.get('by') or 'somebody'}, over after {float(data.get('after_ms', 0.0)):.0f} ms{unconfirmed}."
    if last.type == "agent_completed":
        result = data.get("result")
        message = result.get("message") if isinstance(result, dict) else result
        said = [str(moment.data.get("content", "")) for moment in moments if moment.data.get("role") == "assistant"]
        return message if isinstance(message, str) else said[-1] if said else "It has a result."
    return str(error.get("message") or data.get("message") or "")


def _where(code: str, calls: Sequence[Call]) -> str:
    """The call that an error came from, if one did."""
    source = next((call for call in reversed(calls) if call.error and call.error == code), None)
    return f"tool {source.tool} of {source.agent}" if source is not None else ""


def _remedy(code: str, run: Mapping[str, Any]) -> str:
    return REMEDIES.get(code, "").format(run=run["run_id"], correlation=run.get("correlation_id", ""))


def _open_ending(run: Mapping[str, Any], moments: Sequence[Moment], calls: Sequence[Call]) -> Ending:
    state = str(run.get("state", ""))
    working = [f"tool {call.tool} of {call.agent} since {call.took_s:.1f} s" for call in calls if call.status == "open"]
    if run.get("ended_at"):
        tool = run.get("kind") == "tool" and moments
        return Ending(state, "", "It was a call of one tool." if tool else "It ended without an event.", {}, "", "")
    if not moments:
        return Ending("", "", f"It is {state}: nothing has begun it yet.", {}, "", "Free a slot by ending other runs, or wait.")
    told = f"It is {state} and has not ended. The last event is {moments[-1].type}."
    return Ending("", "", told, {}, ", ".join(working), "")


def _next(run: Mapping[str, Any], moments: Sequence[Moment], ending: Ending) -> list[str]:
    run_id, correlation = run["run_id"], run.get("correlation_id", "")
    if not ending.state:
        return [f"netra events {run_id} --follow", f"netra cancel {run_id}"]
    found = [f"netra trace {correlation}"] if correlation else []
    if not moments:
        return found
    result = moments[-1].data.get("result")
    kept = [result.get(name) for name in ("chart", "report")] if isinstance(result, dict) else [moments[-1].data.get("result_ref")]
    found += [f"netra artifacts download {entry['artifact_id']}" for entry in kept if isinstance(entry, dict) and entry.get("artifact_id")]
    return [*found, f"netra events {run_id} --json"]
