"""A thread with its people, who have all begun a run that goes on: its owner, who may write, who may read, who might before, a stranger,
another tenant."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass

from google.protobuf.message import Message

from chassis import identity
from netra import ids
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2
from tests.fixtures import forge
from tests.prove.isolation import answers
from tests.prove.isolation.asking import METHODS
from tests.prove.isolation.judge import Judge
from tests.prove.isolation.people import Party, Things, canary, forms
from tests.prove.isolation.world import World

OWNER, WRITER, READER, WITHDRAWN, STRANGER, ELSEWHERE = "owner", "writer", "reader", "withdrawn", "stranger", "another tenant"
ROLES = (OWNER, WRITER, READER, WITHDRAWN, STRANGER, ELSEWHERE)
# whose runs are in the thread; what the others have is nobody else's, whoever is let into the thread
WITHIN = (OWNER, WRITER, WITHDRAWN)
_WAITING = (OWNER, WITHDRAWN)
ACCESS = {WRITER: context_pb2.ACCESS_WRITE, READER: context_pb2.ACCESS_READ, WITHDRAWN: context_pb2.ACCESS_WRITE}
OK, NONE, ENDED = "OK", "NOT_FOUND", "UNAUTHENTICATED"
# a run waits twice as long
_PACE_S = 60
_PATIENCE_S, _TRIES = 2.0, 100
# around the end of a token it may be accepted or not: a clock is not told to the millisecond, and a stream began before
_ABOUT_S = 3.0


@dataclass(slots=True)
class Shared:
    """The thread, what is in it, its people. `tokens` are grant tokens from before anything was withdrawn, `live` everybody's runs that go
    on; `judges` look for what somebody must not see who is let in, and who is not."""

    world: World
    judge: Judge
    people: dict[str, Party]
    thread_id: str = ""
    artifact_id: str = ""
    tokens: dict[str, str] = dataclasses.field(default_factory=dict)
    live: dict[str, str] = dataclasses.field(default_factory=dict)
    judges: dict[str, tuple[Judge, Judge]] = dataclasses.field(default_factory=dict)
    cases: int = 0

    def judged(self, name: str, role: str, expected: str, answer: answers.Answer, shows: Sequence[str] = ()) -> None:
        """Judge an answer: one of the `expected` codes, with what those whom it `shows` wrote; who gets no more than a refusal must see
        nothing of anybody."""
        self.cases += 1
        what, let_in = f"sharing: {name} as {role}", OK in expected.split()
        self.judges[role][0 if let_in else 1].look(what, self.people[role], (), answer)
        if not let_in and answer.code == OK:
            self.judge.findings.leaks.append(f"{what}: {answer.code}, not {expected}")
        unseen = [one for one in shows if not any(form in answer.raw for form in forms(self.people[one]))] if answer.code == OK else []
        if answer.code not in expected.split() or unseen:
            without = f" without what {' and '.join(unseen)} wrote" if unseen else ""
            self.judge.control(what, f"{answer.code} {answer.told}, not {expected}{without}")
        else:
            self.judge.control(what, "")

    def accepted(self, role: str) -> str:
        """What an old token of somebody's is answered with now; whoever has none brings the owner's."""
        if role not in self.tokens:
            return ENDED
        left_s = ends_at(self.tokens[role]) - time.time()
        return f"{OK} {ENDED}" if abs(left_s) < _ABOUT_S else OK if left_s > 0 else ENDED


def ends_at(token: str) -> float:
    """When a grant token is accepted no more."""
    return float(forge.claims_of(token)["exp"]) + identity.LEEWAY_S


async def ask(shared: Shared, rpc: str, who: Party, requests: list[Message], seconds: float = _PATIENCE_S) -> answers.Answer:
    """Ask as somebody."""
    enough = lambda found: any(getattr(one, "caught_up", False) for one in found)  # noqa: E731
    return await answers.rpc(shared.world.channels[rpc.partition(".")[0]], METHODS[rpc], requests, who.bearer, seconds, enough)


async def state(shared: Shared, role: str) -> str:
    """How somebody's own live run is; one that is just ending, how it has ended."""
    wanted = dispatcher_pb2.GetRunRequest(run_id=shared.live[role])
    for _ in range(_TRIES):
        run = (await shared.world.runs.GetRun(wanted, metadata=shared.people[role].bearer, timeout=20)).run
        if run.state != dispatcher_pb2.RUN_STATE_FINISHING:
            break
        await asyncio.sleep(0.1)
    return dispatcher_pb2.RunState.Name(run.state)


async def withdrawn(shared: Shared, role: str) -> answers.Answer:
    """The owner withdraws somebody's grant."""
    grantee = shared.people[role].user_id
    wanted = context_pb2.WithdrawGrantRequest(request_id=ids.uuid7(), thread_id=shared.thread_id, grantee_id=grantee)
    return await ask(shared, "context.WithdrawGrant", shared.people[OWNER], [wanted])


async def made(world: World, judge: Judge) -> Shared:
    """The thread, and its people: each has a token if they may, and a run that goes on; then one grant is withdrawn."""
    people = dict(zip(ROLES, await asyncio.gather(*(_person(world, role) for role in ROLES)), strict=True))
    shared, owner = Shared(world, judge, people), people[OWNER]
    shared.thread_id = await world.thread(owner)
    shared.artifact_id = (await world.kept(owner, thread_id=shared.thread_id)).artifact_id
    for role, access in ACCESS.items():
        wanted = context_pb2.GrantThreadRequest(
            request_id=ids.uuid7(), thread_id=shared.thread_id, user_id=people[role].user_id, access=access
        )  # fmt: skip
        await world.context.GrantThread(wanted, metadata=owner.bearer, timeout=20)
    for role in (OWNER, *ACCESS):
        token = context_pb2.CreateGrantTokenRequest(thread_id=shared.thread_id)
        found = await world.context.CreateGrantToken(token, metadata=people[role].bearer, timeout=20)
        shared.tokens[role] = found.grant_token
    for role in WITHIN:
        await _over(shared, role)
    # in one thread one run goes on at a time: the others wait for the writer's
    await asyncio.gather(*(_begun(shared, role) for role in ROLES if role not in _WAITING))
    for role in _WAITING:
        await _started(shared, role)
    put_up(shared)
    await withdrawn(shared, WITHDRAWN)
    return shared


async def _person(world: World, role: str) -> Party:
    who = await world.spare(world["C" if role == ELSEWHERE else "A"])
    who.name, who.canary, who.things = role, canary("s"), Things({"user_id": who.user_id, "tenant_id": who.things["tenant_id"]})
    return who


async def _begun(shared: Shared, role: str) -> None:
    """A run that goes on, and of which something is recorded."""
    who = shared.people[role]
    run_id = await _started(shared, role)
    async for part in shared.world.events.Subscribe(events_pb2.SubscribeRequest(run_id=run_id), metadata=who.bearer, timeout=60):
        if part.events:
            return


async def _over(shared: Shared, role: str) -> None:
    """A run that has ended, with what they wrote in its record."""
    who = shared.people[role]
    run = await shared.world.started(who, thread_id=shared.thread_id)
    await shared.world.ended(who, run.run_id)


async def _started(shared: Shared, role: str) -> str:
    """A run that goes on; its request id has the canary, which is in all that is told of it."""
    who, inputs = shared.people[role], json.dumps({"pace_s": _PACE_S}).encode()
    where = {"thread_id": shared.thread_id} if role in WITHIN else {}
    run = await shared.world.started(who, inputs=inputs, **where)
    shared.live[role] = run.run_id
    who.things.ids |= {"run_id": run.run_id, "message_id": run.message_id, "thread_id": run.thread_id}
    return run.run_id


def put_up(shared: Shared) -> None:
    """All six are looked for in refusals; in what is shown, those of whom nothing is in the thread (but who they are)."""
    known = [who for name, who in shared.world.parties.items() if name in "ABC" and who.things.ids]
    apart = {role: shared.people[role] for role in ROLES if role not in WITHIN}
    without = {role: dataclasses.replace(who, things=Things(_without(who))) for role, who in apart.items()}
    nobody = Judge(shared.judge.findings, [*known, *shared.people.values()])
    for role in ROLES:
        seen = Judge(shared.judge.findings, [*known, *(who for other, who in without.items() if other != role)])
        shared.judges[role] = seen, nobody


def _without(who: Party) -> dict[str, str]:
    return {kind: value for kind, value in who.things.ids.items() if kind != "user_id"}
