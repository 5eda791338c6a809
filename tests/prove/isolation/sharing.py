"""Everybody who may stand to a thread in some way asks everything that there is to ask about it, before and after each thing that its owner
may do with it; with grant tokens from before, which are good until they end, and not a moment longer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from netra import ids
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2
from tests.prove.isolation import answers
from tests.prove.isolation import shared as shared_
from tests.prove.isolation.judge import Judge
from tests.prove.isolation.shared import (
    ELSEWHERE,
    ENDED,
    OWNER,
    READER,
    ROLES,
    STRANGER,
    WITHDRAWN,
    WITHIN,
    WRITER,
    Shared,
    ask,
)
from tests.prove.isolation.world import World

OUTSIDE = (WITHDRAWN, STRANGER, ELSEWHERE)
_OK, _NO, _NONE = "OK", "PERMISSION_DENIED", "NOT_FOUND"
# who sees the thread may be told that this is not for them, or that there is none of theirs
_NOT_THEIRS = f"{_NO} {_NONE}"
_GOES_ON, _CANCELLED = ("RUN_STATE_QUEUED", "RUN_STATE_RUNNING", "RUN_STATE_SUSPENDED"), ("RUN_STATE_CANCELLED",)

Make = Callable[[Shared, str, str], list[Message]]


@dataclass(frozen=True, slots=True)
class Row:
    """What is asked about a thread, and the codes that owner, writer and reader may get; all others are told that there is none."""

    name: str
    rpc: str
    make: Make
    owner: str
    writer: str
    reader: str
    # whose words the answer must show
    shows: tuple[str, ...] = ()
    # what the owner of a deleted thread gets
    deleted: str = f"{_NONE} {_OK}"

    def expected(self, access: str) -> str:
        """What who has this access may get."""
        return {"own": self.owner, "write": self.writer, "read": self.reader, "deleted": self.deleted}.get(access, _NONE)


def _of(message: Callable[..., Message], **more: Any) -> Make:
    """A request with the thread, with a request id where it takes one."""

    def make(_: Shared, __: str, thread_id: str) -> list[Message]:
        once = {"request_id": ids.uuid7()} if "request_id" in message.DESCRIPTOR.fields_by_name else {}  # type: ignore[attr-defined]
        return [message(thread_id=thread_id, **once, **more)]

    return make


def _put(_: Shared, __: str, thread_id: str) -> list[Message]:
    header = context_pb2.ArtifactHeader(request_id=ids.uuid7(), name="more.txt", media_type="text/plain", size=4, thread_id=thread_id)
    return [context_pb2.PutArtifactRequest(header=header), context_pb2.PutArtifactRequest(data=b"more")]


def _grant(shared: Shared, _: str, thread_id: str) -> list[Message]:
    other = shared.people[STRANGER].user_id
    wanted = context_pb2.GrantThreadRequest(request_id=ids.uuid7(), thread_id=thread_id, user_id=other, access=context_pb2.ACCESS_READ)
    return [wanted]


def _withdraw(shared: Shared, _: str, thread_id: str) -> list[Message]:
    grantee = shared.people[WITHDRAWN].user_id
    return [context_pb2.WithdrawGrantRequest(request_id=ids.uuid7(), thread_id=thread_id, grantee_id=grantee)]


def _start(_: Shared, __: str, thread_id: str) -> list[Message]:
    wanted = dispatcher_pb2.StartRunRequest(request_id=ids.uuid7(), agent="text-analyst", user_request="More of it.", thread_id=thread_id)
    return [wanted]


# asked again after each thing that the owner does
READS = (
    Row("GetThread", "context.GetThread", _of(context_pb2.GetThreadRequest), _OK, _OK, _OK),
    Row("ListMessages", "context.ListMessages", _of(context_pb2.ListMessagesRequest), _OK, _OK, _OK, shows=WITHIN),
    Row("ListArtifacts", "context.ListArtifacts", _of(context_pb2.ListArtifactsRequest), _OK, _OK, _OK, shows=(OWNER,)),
    Row("CreateGrantToken", "context.CreateGrantToken", _of(context_pb2.CreateGrantTokenRequest), _OK, _OK, _OK, deleted=_OK),
    Row("StartRun", "dispatcher.StartRun", _start, _OK, _OK, _NO, deleted=_NONE),
)
ROWS = (
    *READS,
    Row("PutArtifact", "context.PutArtifact", _put, _OK, _OK, _NO),
    Row("ListGrants", "context.ListGrants", _of(context_pb2.ListGrantsRequest), _OK, _NOT_THEIRS, _NOT_THEIRS),
    Row("WithdrawGrant", "context.WithdrawGrant", _withdraw, _OK, _NOT_THEIRS, _NOT_THEIRS),
    # what would end the thread comes from the others first, and from its owner last
    Row("DeleteThread", "context.DeleteThread", _of(context_pb2.DeleteThreadRequest), "", _NO, _NO),
    Row("RestoreThread", "context.RestoreThread", _of(context_pb2.RestoreThreadRequest), "", _NOT_THEIRS, _NOT_THEIRS),
    Row("EraseThread", "context.EraseThread", _of(context_pb2.EraseThreadRequest), "", _NOT_THEIRS, _NOT_THEIRS),
    Row("GrantThread", "context.GrantThread", _grant, "", _NOT_THEIRS, _NOT_THEIRS),
)
_LET_IN = {OWNER: "own", WRITER: "write", READER: "read"}


async def probe(world: World, judge: Judge) -> Shared:
    """The whole matrix, but for what comes when tokens have ended: see `over`."""
    shared = await shared_.made(world, judge)
    for row in ROWS:
        for role in ROLES:
            if expected := row.expected(_LET_IN.get(role, "")):
                await _case(shared, row, role, expected)
    await _by_tokens(shared, "by token", shows=True)
    for role in ROLES:
        file = await ask(
            shared, "context.GetArtifact", shared.people[role], [context_pb2.GetArtifactRequest(artifact_id=shared.artifact_id)]
        )
        shared.judged("context.GetArtifact", role, _OK if role in _LET_IN else _NONE, file, (OWNER,))
    await _cancelled(shared)
    await _ended(shared)
    return shared


async def over(shared: Shared) -> int:
    """Once all tokens have ended they open nothing any more; how many cases there were in all."""
    await asyncio.sleep(max(max(map(shared_.ends_at, shared.tokens.values())) - time.time() + 5, 0))
    await _by_tokens(shared, "by a token that has ended", shows=False)
    return shared.cases


async def _case(shared: Shared, row: Row, role: str, expected: str) -> None:
    answer = await ask(shared, row.rpc, shared.people[role], row.make(shared, role, shared.thread_id))
    shared.judged(row.name, role, expected, answer, row.shows if expected == _OK else ())
    if role in OUTSIDE:
        unknown = ids.uuid7()
        other = await ask(shared, row.rpc, shared.people[role], row.make(shared, role, unknown))
        shared.judge.compare(f"sharing: {row.name} as {role}", shared.thread_id, answer, unknown, other)


async def _by_tokens(shared: Shared, name: str, *, shows: bool) -> None:
    """What a grant token opens, for whom it was signed and for everybody else; also for whom it was withdrawn, as long as it lasts."""
    for role, who in shared.people.items():
        token = shared.tokens.get(role, shared.tokens[OWNER])
        asked: dict[str, tuple[Message, tuple[str, ...]]] = {
            "dispatcher.ListRuns": (dispatcher_pb2.ListRunsRequest(grant_token=token, page_size=200), WITHIN),
            "dispatcher.GetRun": (dispatcher_pb2.GetRunRequest(run_id=shared.live[OWNER], grant_token=token), (OWNER,)),
            "events.FollowThread": (events_pb2.FollowThreadRequest(grant_token=token), WITHIN),
            "events.ListThreadEvents": (events_pb2.ListThreadEventsRequest(grant_token=token, run_id=shared.live[WRITER]), (WRITER,)),
        }
        for rpc, (request, whose) in asked.items():
            expected = shared.accepted(role)
            answer = await ask(shared, rpc, who, [request], 5.0)
            shared.judged(f"{rpc} {name}", role, expected, answer, whose if shows and expected == _OK else ())


async def _cancelled(shared: Shared) -> None:
    """The owner ends what goes on in the thread, and nothing else; the others end what is theirs."""

    async def cancel(role: str, whose: str, token: str, expected: str) -> None:
        wanted = dispatcher_pb2.CancelRunRequest(run_id=shared.live[whose], grant_token=token)
        answer = await ask(shared, "dispatcher.CancelRun", shared.people[role], [wanted])
        shared.judged(f"CancelRun of {whose}'s {'by' if token else 'without a'} token", role, expected, answer)

    for role in ROLES:
        if role != OWNER:
            token = shared.tokens.get(role, shared.tokens[OWNER])
            await cancel(role, OWNER, token, _NO if role in shared.tokens else ENDED)
            await cancel(role, OWNER, "", _NONE)
    token = await _fresh(shared)
    for whose in (READER, STRANGER, ELSEWHERE):
        await cancel(OWNER, whose, token, _NONE)
    await cancel(OWNER, WRITER, "", _NONE)
    await cancel(OWNER, WRITER, token, _OK)
    await shared.world.ended(shared.people[WRITER], shared.live[WRITER])
    # what was not cancelled by now has not been
    for role in ROLES:
        found, wanted = await shared_.state(shared, role), _CANCELLED if role == WRITER else _GOES_ON
        shared.judge.control(f"sharing: the run of {role} after all this", "" if found in wanted else f"{found}, not {wanted}")


async def _ended(shared: Shared) -> None:
    """Deleted, restored, withdrawn, erased: each counts at once for everybody, but for tokens from before."""
    steps: list[tuple[str, Callable[[], Awaitable[answers.Answer]], dict[str, str]]] = [
        ("deleted", lambda: _by_owner(shared, "context.DeleteThread", _of(context_pb2.DeleteThreadRequest)), {OWNER: "deleted"}),
        ("restored", lambda: _by_owner(shared, "context.RestoreThread", _of(context_pb2.RestoreThreadRequest)), _LET_IN),
        ("withdrawn", lambda: shared_.withdrawn(shared, READER), {OWNER: "own", WRITER: "write"}),
        ("erased", lambda: _erased(shared), {}),
    ]
    for name, step, access in steps:
        answer = await step()
        shared.judge.control(f"sharing: {name} by the owner", "" if answer.code == _OK else f"{answer.code} {answer.told}")
        for role in ROLES:
            for row in READS:
                expected = row.expected(access.get(role, ""))
                found = await ask(shared, row.rpc, shared.people[role], row.make(shared, role, shared.thread_id))
                shared.judged(f"{row.name} once it is {name}", role, expected, found, row.shows if expected == _OK else ())
        await _by_tokens(shared, f"by an old token once it is {name}", shows=name != "erased")


async def _by_owner(shared: Shared, rpc: str, make: Make) -> answers.Answer:
    return await ask(shared, rpc, shared.people[OWNER], make(shared, OWNER, shared.thread_id))


async def _erased(shared: Shared) -> answers.Answer:
    """Runs that go on keep the thread from being erased: the owner ends them all."""
    refused = await _by_owner(shared, "context.EraseThread", _of(context_pb2.EraseThreadRequest))
    going_on = "FAILED_PRECONDITION"
    shared.judge.control("sharing: nothing is erased under a run", "" if refused.code == going_on else f"{refused.code} {refused.told}")
    for _ in range(30):
        await _quiet(shared)
        answer = await _by_owner(shared, "context.EraseThread", _of(context_pb2.EraseThreadRequest))
        if answer.code != going_on:
            break
    return answer


async def _quiet(shared: Shared) -> None:
    token = await _fresh(shared)
    for role in WITHIN:
        cancel = dispatcher_pb2.CancelRunRequest(run_id=shared.live[role], grant_token=token)
        await shared.world.runs.CancelRun(cancel, metadata=shared.people[OWNER].bearer, timeout=20)
    for role in WITHIN:
        who = shared.people[role]
        for run in (await shared.world.runs.ListRuns(dispatcher_pb2.ListRunsRequest(), metadata=who.bearer, timeout=20)).runs:
            await shared.world.ended(who, run.run_id)


async def _fresh(shared: Shared) -> str:
    """A grant token of the owner's that lasts."""
    wanted, owner = context_pb2.CreateGrantTokenRequest(thread_id=shared.thread_id), shared.people[OWNER]
    return (await shared.world.context.CreateGrantToken(wanted, metadata=owner.bearer, timeout=20)).grant_token
