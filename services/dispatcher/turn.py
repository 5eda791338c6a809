"""What an agent may do, each a step with a deterministic key, answered from the record when the agent is run again."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import inspect
import random
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, NoReturn

from chassis import lifecycle
from netra import agent as agent_
from netra import errors, ids
from netra.agent import AgentSpec
from netra.context import UserExecutionContext
from services.dispatcher import approvals, journal, ledger, parking, past, runs
from services.dispatcher.life import Heart, Life, Outside
from services.dispatcher.tools import calls, dispatch

__all__ = ["MAX_DEPTH", "Heart", "Life", "Outside", "Turn", "narrowed"]
_MAX_SLEEP_S = 86_400.0
# a shorter sleep is taken again from its beginning
_BRIEF_S = 1.0
_MAX_REASONING = 16 * 1024
# an approval ends by the clock of the database: should that be behind, it is looked at again
_AGAIN_S = 0.5
MAX_DEPTH = 10
# the record takes keys of up to 200 characters
_MAX_NAME, _MAX_PREFIX = 80, 100
_KIND = re.compile(r"[a-z_]{1,64}")
_DECISION = {approvals.APPROVED: agent_.APPROVE, approvals.REJECTED: agent_.REJECT, approvals.EXPIRED: agent_.EXPIRED}


# of the code that executes; none is the first one of its run
_strand: ContextVar[parking.Strand | None] = ContextVar("strand", default=None)


class Turn:
    """The turn of one agent in one run: `netra.agent.Turn`, told to the record. Step keys count calls in the order of the code.

    `agents` finds those that may do a part of the work, and raises for others. `only` are the tools that may be called; None is any.
    """

    def __init__(
        self, request: str, inputs: Mapping[str, Any], context: UserExecutionContext,
        bridge: journal.AgentWebSocketBridge, tools: dispatch.UnifiedToolDispatcher, agents: Callable[[str], AgentSpec],
        life: Life | None = None, only: frozenset[str] | None = None,
    ) -> None:  # fmt: skip
        self.request, self.inputs, self.context = request, inputs, context
        self._bridge, self._tools, self._agents, self._only, self._depth = bridge, tools, agents, only, context.depth
        self._life = life or Life()
        self._parking = self._life.parking or parking.Parking(self._life.root)
        self._life.parking = self._parking
        self._life.root.at = self._life.root.at or context.created_at.timestamp()

    @property
    def steps(self) -> int:
        """Steps so far, those of children among them."""
        return self._life.steps

    def _here(self) -> parking.Strand:
        return _strand.get() or self._life.root

    def _next(self, strand: parking.Strand, name: str) -> str:
        """The key of the next step. Raises `NonDeterministicAgent` when the record has another there."""
        self._life.steps += 1
        return self._asked(functools.partial(self._life.past.at, strand.next(), name[:_MAX_NAME].replace(past.MARK, "_")))

    def _asked(self, find: Callable[[], str]) -> str:
        if self._bridge.left:
            raise errors.Fenced("The process has let go of the run.")
        if self._life.differs is not None:
            raise self._life.differs
        try:
            return find()
        except errors.NonDeterministicAgent as differs:
            self._life.differs = differs
            self._life.notice()
            raise

    @contextlib.contextmanager
    def _step(self, strand: parking.Strand) -> Iterator[None]:
        strand.under_way += 1
        self._life.heart.step_began()
        try:
            yield
        finally:
            strand.under_way -= 1
            self._life.heart.step_over()

    async def _again(self, strand: parking.Strand, over: Mapping[str, Any]) -> None:
        """A step that is in the record is not taken; whoever only takes such lets others go on at each."""
        strand.at = over.get("at", strand.at)
        await asyncio.sleep(0)

    async def _fresh(self, strand: parking.Strand) -> None:
        """Returns when the strand may do what is not in the record."""
        if self._life.differs is not None:
            raise self._life.differs
        if strand.frozen is not None:
            strand.stand_still()
            await asyncio.Event().wait()
        await self._parking.gate()

    async def think(self, reasoning: str, *, progress: float | None = None) -> None:
        """Show what the agent considers. Raises `InvalidPayload` when that is empty or longer than 16 Ki characters."""
        if not reasoning or len(reasoning) > _MAX_REASONING:
            raise errors.InvalidPayload(f"reasoning must have 1 to {_MAX_REASONING} characters", field="reasoning")
        strand = self._here()
        key = self._next(strand, "think")
        with self._step(strand):
            if (over := self._life.past.found(key).over) is not None:
                self._life.thoughts += 1
                return await self._again(strand, over)
            await self._fresh(strand)
            await self._bridge.room()
            self._life.thoughts += 1
            strand.at = time.time()
            self._bridge.thinking(reasoning, self._life.thoughts, progress, key, strand.at)

    def delta(self, text: str) -> None:
        """Show text as it is produced; dropped where it cannot be shown, and when it has more than 16 KiB."""
        self._life.heart.beat()
        if text:
            self._bridge.delta(text)

    async def emit(self, kind: str, **data: object) -> None:
        """Tell something of the agent's own kind. Raises `InvalidPayload` for a kind of the platform's, and for data that is no JSON."""
        if not _KIND.fullmatch(kind):
            raise errors.InvalidPayload(f"kind must match {_KIND.pattern}", field="kind")
        strand = self._here()
        key = self._next(strand, f"emit:{kind}")
        with self._step(strand):
            if (over := self._life.past.found(key).over) is not None:
                return await self._again(strand, over)
            await self._fresh(strand)
            await self._bridge.room()
            strand.at = time.time()
            try:
                self._bridge.custom(kind, data, (key, {"at": strand.at}))
            except TypeError as error:
                raise errors.InvalidPayload(f"the data of {kind} cannot be written as JSON: {error}", field="data") from None

    async def tool(self, name: str, /, **arguments: object) -> Any:
        """Call a tool and return its result. Raises what went wrong."""
        strand = self._here()
        key = self._next(strand, f"tool:{name}")
        self._life.calls += 1
        with self._step(strand):
            left = self._life.past.call(key)
            if left is not None and not left.is_open:
                return await self._kept(strand, left)
            await self._fresh(strand)
            await self._bridge.room()
            if left is not None:
                ask = functools.partial(self._may_repeat, strand)
                outcome = await self._life.settle(left, ask=ask, only=self._only)
            else:
                outcome = await self._tools.execute(name, arguments, step_key=key, reporter=self._bridge, only=self._only)
            strand.at = outcome.at
            return outcome.unwrap()

    async def _kept(self, strand: parking.Strand, call: ledger.Call) -> Any:
        """What a call came to by the record. Raises what went wrong; one that was stopped is waited for until it is stopped again."""
        await self._again(strand, {"at": call.at} if call.at else {})
        if call.stopped:
            if strand.frozen is not None:
                strand.stand_still()
            await asyncio.Event().wait()
        kept = call.kept or {}
        if (found := kept.get("error") or (await self._life.whole(kept["error_ref"]) if "error_ref" in kept else None)) is not None:
            error = errors.by_code(found["code"])(found["message"])
            error.details.update(found["details"])
            raise error
        return await self._life.whole(kept["result_ref"]) if "result_ref" in kept else kept.get("result")

    async def _may_repeat(self, strand: parking.Strand, left: ledger.Call) -> bool:
        message = (
            f"The process that called {left.tool} died. Whether the call was made, and what it changed, is not known."
            " Approve to have it made again; otherwise it stays as it is."
        )
        if self._life.outside is None:
            return False
        return (await self._decided(strand, f"{left.key}{past.MARK}ask{left.attempts}", message, 1, self._life.longest_s, left)).approved

    async def model(self, prompt: str, **arguments: object) -> Any:
        """Ask the language model: a call of the tool `model`."""
        return await self.tool("model", prompt=prompt, **arguments)

    async def child(
        self,
        agent: str,
        *,
        request: str | None = None,
        tools: Sequence[str] | None = None,
        deadline_s: float | None = None,
        **inputs: object,
    ) -> Any:
        """Have another agent do a part of the work, in this run, and return its result. Raises what it raises.

        It gets this run's request and inputs; those given win. It may call the tools that this agent may and it declares, of them those
        given. Raises `NotFound`, `PermissionDenied` when its feature is not part of the user's tier, `DepthExceeded` for the eleventh
        generation, and `DeadlineExceeded` when it did not finish within `deadline_s` of running time.
        """
        spec = self._agents(agent)
        other = self._of(spec, request, inputs, tools)
        strand = self._here()
        key = self._asked(functools.partial(self._life.past.at, strand.next(), f"child:{agent}"))
        below = parking.Strand(_short(f"{key}/"), strand.at, strand.frozen)
        over = self._life.past.found(key).over
        if over is not None and over["timed_out"]:
            self._life.past.skip(below.prefix)
            await self._again(strand, over)
            raise _late(agent, deadline_s)
        group, outer = parking.Group([below]), _strand.set(below)
        strand.under_way += 1
        strand.groups.append(group)
        try:
            # one that ended in time does so again, however long that takes
            if deadline_s is None or over is not None:
                result = await spec.function(other)
            else:
                result = await self._in_time(spec, other, strand, key, deadline_s)
            self._life.check_result(spec, result)
            return result
        finally:
            _strand.reset(outer)
            strand.under_way -= 1
            strand.groups.remove(group)
            below.over, strand.at = True, max(strand.at, below.at)

    async def _in_time(self, spec: AgentSpec, other: Turn, strand: parking.Strand, key: str, deadline_s: float) -> Any:
        begun = self._life.past.found(key).begun
        if begun is None:
            await self._fresh(strand)
            begun = {"ran_s": self._life.ran_s()}
            self._bridge.step(f"{key}{past.BEGIN}", begun, opens=key)
        limit = asyncio.timeout(deadline_s - (self._life.ran_s() - begun["ran_s"]))
        try:
            async with limit:
                return await spec.function(other)
        except asyncio.CancelledError:
            # what was stopped may say so in its own way
            if not limit.expired() or lifecycle.told_to_stop():
                raise
        except TimeoutError:
            if not limit.expired():
                raise
        finally:
            if not limit.expired() and not lifecycle.told_to_stop():
                self._bridge.step(key, {"timed_out": False})
        await self._fresh(strand)
        self._life.past.skip(_short(f"{key}/"))
        strand.at = time.time()
        self._bridge.step(key, {"timed_out": True, "at": strand.at})
        raise _late(spec.name, deadline_s)

    def _of(self, spec: AgentSpec, request: str | None, inputs: Mapping[str, object], tools: Sequence[str] | None) -> Turn:
        if self._depth >= MAX_DEPTH:
            raise errors.DepthExceeded(f"{spec.name} would be generation {MAX_DEPTH + 1}; at most {MAX_DEPTH} are allowed.", field="depth")
        asked = self.request if request is None else request
        only, given = narrowed(narrowed(self._only, spec.tools), tools), {**self.inputs, **inputs}
        self._life.check_inputs(spec, given)
        other = Turn(asked, given, self.context, self._bridge.under(spec.name), self._tools, self._agents, self._life, only)
        other._depth = self._depth + 1
        return other

    async def gather(self, *steps: Awaitable[Any]) -> list[Any]:
        """Take steps at the same time; their results in the order given. When one raises, the others are stopped, then that is raised."""
        strand = self._here()
        place = strand.next()
        key = self._asked(functools.partial(self._life.past.gather, place))
        over, failed = self._life.past.found(key).over, list[BaseException]()
        first = None if over is None else int(over["failed"])
        # when one has failed before, the others go no further than they went then
        still = None if first is None else asyncio.Event()
        strands = [
            parking.Strand(_short(f"{place}.{number}:"), strand.at, strand.frozen if first in (None, number) else still)
            for number in range(len(steps))
        ]
        # not a TaskGroup: up to Python 3.12 one that failed leaves its task looking cancelled
        tasks, group = lifecycle.Tasks(on_failure=failed.append), parking.Group(strands)
        strand.under_way += 1
        strand.groups.append(group)
        branches = [
            tasks.spawn(_branch(one, step), one.prefix) for one, step in zip(strands, steps, strict=True)
        ]  # fmt: skip
        for one, branch in zip(strands, branches, strict=True):
            branch.add_done_callback(functools.partial(self._ended, one, still))
        try:
            if first is not None and still is not None:
                await _failed_again(strands, branches, first, still)
            elif branches:
                await asyncio.wait(branches, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            # from here on this strand goes on, whatever the others do
            group.failed = True
            await tasks.close()
            for step in steps:
                if inspect.iscoroutine(step):
                    step.close()  # one that was stopped before it began
            strand.at = max([strand.at, *(one.at for one in strands)])
            strand.groups.remove(group)
            strand.under_way -= 1
        if failed:
            await self._failed(strand, place, branches, failed[0], over)
        return [branch.result() for branch in branches]

    async def _failed(
        self, strand: parking.Strand, place: str, branches: Sequence[asyncio.Task[Any]], error: BaseException,
        before: Mapping[str, Any] | None,
    ) -> NoReturn:  # fmt: skip
        """Keep which strand it was that failed, as another may be the first one to when they are taken again; raises its error."""
        self._life.past.skip(f"{place}.")
        if before is not None:
            strand.at = before["at"]
            error = branches[before["failed"]].exception() or error
        else:
            with self._step(strand):
                await self._fresh(strand)
                number = next(number for number, branch in enumerate(branches) if not branch.cancelled() and branch.exception() is error)
                self._bridge.step(f"{place}:{past.GATHER}", {"failed": number, "at": strand.at})
        raise error

    def _ended(self, strand: parking.Strand, still: asyncio.Event | None, _branch: object) -> None:
        strand.over = True
        if still is not None:
            still.set()
        self._parking.look()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        if not 0 <= seconds <= _MAX_SLEEP_S:
            raise errors.InvalidPayload(f"seconds must be from 0 to {_MAX_SLEEP_S:g}", field="seconds")
        strand = self._here()
        key = self._next(strand, "sleep")
        with self._step(strand):
            found = self._life.past.found(key)
            if found.over is not None:
                return await self._again(strand, found.over)
            await self._fresh(strand)
            await self._bridge.room()
            if seconds <= _BRIEF_S:
                await asyncio.sleep(seconds)
            else:
                until = self._until(key, found, seconds)
                while time.time() < until:
                    await self._parking.wait(strand, parking.Wait(parking.TIMER, until))
            strand.at = time.time()
            self._bridge.step(key, {"at": strand.at})

    def _until(self, key: str, found: past.Found, seconds: float) -> float:
        """When a wait that begins, or has begun before, is over, in seconds since 1970."""
        if found.begun is not None:
            return float(found.begun["until"])
        until = time.time() + seconds
        self._bridge.step(f"{key}{past.BEGIN}", {"until": until}, opens=key)
        return until

    async def wait_for_message(self, *, timeout_s: float | None = None) -> agent_.Message:
        """The next message that is sent to this run. Raises `DeadlineExceeded` when none comes in time."""
        longest_s = _checked(timeout_s, self._life.longest_s)
        strand = self._here()
        key = self._next(strand, past.MESSAGE)
        with self._step(strand):
            found = self._life.past.found(key)
            over = found.over
            if over is not None:
                await self._again(strand, over)
            else:
                await self._fresh(strand)
                over = await self._received(strand, key, self._until(key, found, longest_s))
        if "number" not in over:
            raise errors.DeadlineExceeded(f"No message came within {longest_s:g} s.")
        return agent_.Message(over["text"], over["message_id"], over["user_id"])

    async def _received(self, strand: parking.Strand, key: str, until: float) -> Mapping[str, Any]:
        outside = self._outside()
        while (mail := await self._mail(outside)) is None and time.time() < until:
            await self._parking.wait(strand, parking.Wait(parking.MESSAGE, until))
        strand.at = time.time()
        if mail is None:
            result: dict[str, Any] = {"timed_out": True, "at": strand.at}
            self._bridge.step(key, result)
        else:
            about = {"number": mail.number, "message_id": mail.message_id, "user_id": mail.user_id, "text": mail.content}
            result = {**about, "at": strand.at}
            self._bridge.message_created(mail.message_id, "user", mail.content, (key, result))
        return result

    async def _mail(self, outside: Outside) -> runs.Mail | None:
        """The first message that nobody in this run has taken; it is taken then."""
        heard, after = self._life.heard, self._life.heard_until
        found = await outside.mail(self.context.run_id, after)
        # another strand may have been faster
        mail = next((one for one in found if one.number not in heard), None)
        if mail is not None:
            heard.add(mail.number)
        return mail

    async def approve(self, message: str, *, quorum: int = 1, timeout_s: float | None = None) -> agent_.Decision:
        """Ask people whether to go on. Raises `InvalidPayload` for a message or a quorum that cannot be."""
        if not message.strip() or len(message) > _MAX_REASONING or "\0" in message:
            raise errors.InvalidPayload(f"message must have 1 to {_MAX_REASONING} characters, none of them NUL", field="message")
        if not 1 <= quorum <= approvals.MAX_QUORUM:
            raise errors.InvalidPayload(f"quorum must be from 1 to {approvals.MAX_QUORUM}", field="quorum")
        longest_s = _checked(timeout_s, self._life.longest_s)
        strand = self._here()
        key = self._next(strand, "approve")
        with self._step(strand):
            return await self._decided(strand, key, message, quorum, longest_s)

    async def _decided(
        self, strand: parking.Strand, key: str, message: str, quorum: int, longest_s: float, about: ledger.Call | None = None
    ) -> agent_.Decision:
        """What people decide, kept under this key; about a call, or about what the agent says."""
        found = self._life.past.found(key)
        if found.over is not None:
            await self._again(strand, found.over)
            return agent_.Decision(found.over["decision"], tuple(found.over["by"]), found.over["comment"])
        await self._fresh(strand)
        outside, run_id = self._outside(), self.context.run_id
        approval_id = str(uuid.uuid5(uuid.UUID(run_id), key))
        wanted = approvals.Wanted(approval_id, run_id, key, message, quorum, longest_s)
        if about is not None:
            wanted = approvals.Wanted(approval_id, run_id, key, message, quorum, longest_s, about.tool, about.arguments or {})
        # before it is told: whoever sees it may answer at once
        approval = await outside.ask(wanted, self.context)
        if found.begun is None:
            call = None if about is None else calls.Call(ids.ToolCallId(about.tool_call_id), about.tool, about.version, wanted.parameters)
            begun = (f"{key}{past.BEGIN}", {"approval_id": approval_id, "at": time.time()})
            self._bridge.approval_requested(approval_id, message, call, approval.expires_at.isoformat(), quorum, begun)
        while approval.state == approvals.PENDING:
            until = max(approval.expires_at.timestamp(), time.time() + _AGAIN_S)
            await self._parking.wait(strand, parking.Wait(parking.APPROVAL, until, approval_id))
            approval = await outside.approval(run_id, approval_id)
        return self._resolved(strand, key, approval)

    def _resolved(self, strand: parking.Strand, key: str, approval: approvals.Approval) -> agent_.Decision:
        decision = _DECISION[approval.state]
        votes = [vote for vote in approval.votes if vote.decision == decision]
        by, comment = tuple(vote.user_id for vote in votes), votes[-1].comment if votes else ""
        strand.at = time.time()
        kept = {"decision": decision, "by": list(by), "comment": comment, "at": strand.at}
        together = by if len(by) > 1 else ()
        last = by[-1] if by else None
        self._bridge.approval_resolved(approval.approval_id, decision, last, comment or None, together, (key, kept))
        return agent_.Decision(decision, by, comment)

    def _outside(self) -> Outside:
        if self._life.outside is None:
            raise errors.FailedPrecondition("Nobody can be asked here.")
        return self._life.outside

    def now(self) -> datetime:
        """When the last step of this strand ended, by the record; before the first one, when the run was asked for."""
        return datetime.fromtimestamp(self._here().at, UTC)

    def random(self) -> random.Random:
        """Chance that is the same whenever the agent is run again; another one at each call."""
        strand = self._here()
        strand.chances += 1
        return random.Random(f"{self.context.run_id} {strand.prefix} {strand.chances}")  # noqa: S311 - it must repeat itself

    def alive(self) -> None:
        """Say that the agent is at work."""
        self._life.heart.beat()


async def _branch(strand: parking.Strand, step: Awaitable[Any]) -> Any:
    _strand.set(strand)
    return await step


async def _failed_again(strands: Sequence[parking.Strand], branches: Sequence[asyncio.Task[Any]], first: int, still: asyncio.Event) -> None:
    """Returns when the strand is over that failed before, and the others are as far as they came then."""
    while True:
        still.clear()
        others = [one for number, one in enumerate(strands) if number != first]
        if branches[first].done() and all(one.over or one.idle() for one in others):
            return
        await still.wait()


def narrowed(only: frozenset[str] | None, tools: Sequence[str] | None) -> frozenset[str] | None:
    """The tools that both allow; None is any."""
    return only if tools is None else frozenset(tools) if only is None else only & frozenset(tools)


def _late(agent: str, deadline_s: float | None) -> errors.DeadlineExceeded:
    return errors.DeadlineExceeded(f"The agent {agent} did not finish within {deadline_s or 0:g} s.", agent=agent)


def _checked(timeout_s: float | None, longest_s: float) -> float:
    if timeout_s is not None and not timeout_s > 0:
        raise errors.InvalidPayload("timeout_s must be more than 0", field="timeout_s")
    return longest_s if timeout_s is None else min(timeout_s, longest_s)


def _short(prefix: str) -> str:
    return prefix if len(prefix) <= _MAX_PREFIX else f"{hashlib.sha256(prefix.encode()).hexdigest()[:32]}/"
