"""A thread and everybody who may stand to it in some way: its owner, who may write, who may read, who might before, a stranger, another
tenant. Each asks everything that there is to ask about a thread."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message

from netra import ids
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2
from tests.prove.isolation import answers
from tests.prove.isolation.asking import METHODS
from tests.prove.isolation.judge import Judge
from tests.prove.isolation.people import Party, Things, canary, forms
from tests.prove.isolation.world import World

OWNER, WRITER, READER, WITHDRAWN, STRANGER, ELSEWHERE = "owner", "writer", "reader", "withdrawn", "stranger", "another tenant"
OUTSIDE = (WITHDRAWN, STRANGER, ELSEWHERE)
_OK, _NO, _NONE = "OK", "PERMISSION_DENIED", "NOT_FOUND"
# who sees the thread may be told that this is not for them, or that there is none of theirs
_NOT_THEIRS = f"{_NO} {_NONE}"


@dataclass(slots=True)
class Shared:
    """The thread, what is in it, and its people; `tokens` are their grant tokens."""

    world: World
    people: dict[str, Party]
    thread_id: str
    run_id: str
    artifact_id: str
    tokens: dict[str, str]


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
    # whether the answer must show what the owner wrote
    shows: bool = False


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
    return [
        context_pb2.WithdrawGrantRequest(
            request_id=ids.uuid7(), thread_id=thread_id, grantee_id=shared.people[WITHDRAWN].user_id
        )
    ]  # fmt: skip


def _start(_: Shared, __: str, thread_id: str) -> list[Message]:
    wanted = dispatcher_pb2.StartRunRequest(request_id=ids.uuid7(), agent="text-analyst", user_request="More of it.", thread_id=thread_id)
    return [wanted]


ROWS = (
    Row("GetThread", "context.GetThread", _of(context_pb2.GetThreadRequest), _OK, _OK, _OK),
    Row("ListMessages", "context.ListMessages", _of(context_pb2.ListMessagesRequest), _OK, _OK, _OK, shows=True),
    Row("ListArtifacts", "context.ListArtifacts", _of(context_pb2.ListArtifactsRequest), _OK, _OK, _OK, shows=True),
    Row("CreateGrantToken", "context.CreateGrantToken", _of(context_pb2.CreateGrantTokenRequest), _OK, _OK, _OK),
    Row("PutArtifact", "context.PutArtifact", _put, _OK, _OK, _NO),
    Row("StartRun", "dispatcher.StartRun", _start, _OK, _OK, _NO),
    Row("ListGrants", "context.ListGrants", _of(context_pb2.ListGrantsRequest), _OK, _NOT_THEIRS, _NOT_THEIRS),
    Row("WithdrawGrant", "context.WithdrawGrant", _withdraw, _OK, _NOT_THEIRS, _NOT_THEIRS),
    # what would end the thread comes from the others first, and from its owner last
    Row("DeleteThread", "context.DeleteThread", _of(context_pb2.DeleteThreadRequest), "", _NO, _NO),
    Row("RestoreThread", "context.RestoreThread", _of(context_pb2.RestoreThreadRequest), "", _NOT_THEIRS, _NOT_THEIRS),
    Row("EraseThread", "context.EraseThread", _of(context_pb2.EraseThreadRequest), "", _NOT_THEIRS, _NOT_THEIRS),
    Row("GrantThread", "context.GrantThread", _grant, "", _NOT_THEIRS, _NOT_THEIRS),
)


async def probe(world: World, judge: Judge) -> int:
    """The whole matrix; how many cases."""
    shared = await _made(world)
    cases = 0
    for row in ROWS:
        for role in (OWNER, WRITER, READER, *OUTSIDE):
            if expected := {OWNER: row.owner, WRITER: row.writer, READER: row.reader}.get(role, _NONE):
                cases += 1
                await _case(shared, judge, row, role, expected)
    async for name, role, expected, answer in _by_tokens(shared):
        cases += 1
        _judged(shared, judge, name, role, expected, answer, shows=expected == _OK)
    return cases + await _ended(shared, judge)


async def _case(shared: Shared, judge: Judge, row: Row, role: str, expected: str) -> None:
    answer = await _ask(shared, row.rpc, shared.people[role], row.make(shared, role, shared.thread_id))
    _judged(shared, judge, row.name, role, expected, answer, shows=row.shows and expected == _OK)
    if role in OUTSIDE:
        unknown = ids.uuid7()
        other = await _ask(shared, row.rpc, shared.people[role], row.make(shared, role, unknown))
        judge.compare(f"sharing: {row.name} as {role}", shared.thread_id, answer, unknown, other)


def _judged(shared: Shared, judge: Judge, name: str, role: str, expected: str, answer: answers.Answer, *, shows: bool) -> None:
    what = f"sharing: {name} as {role}"
    judge.look(what, shared.people[role], (), answer)
    sees = any(form in answer.raw for form in forms(shared.people[OWNER]))
    if role in OUTSIDE and (sees or answer.code == _OK):
        judge.findings.leaks.append(f"{what}: {answer.code}")
    if answer.code not in expected.split() or (shows and not sees):
        judge.control(what, f"{answer.code} {answer.told}, not {expected}{'' if sees or not shows else ' with what the owner wrote'}")
    else:
        judge.control(what, "")


async def _ask(shared: Shared, rpc: str, who: Party, requests: list[Message], seconds: float = 2.0) -> answers.Answer:
    service = rpc.partition(".")[0]
    enough = lambda found: any(getattr(one, "caught_up", False) for one in found)  # noqa: E731
    return await answers.rpc(shared.world.channels[service], METHODS[rpc], requests, who.bearer, seconds, enough)


async def _by_tokens(shared: Shared) -> AsyncIterator[tuple[str, str, str, answers.Answer]]:
    """What a grant token opens, for whom it was signed and for everybody else."""
    for role, who in shared.people.items():
        token = shared.tokens.get(role) or shared.tokens[OWNER]
        expected = _OK if role in shared.tokens else "UNAUTHENTICATED"
        run = dispatcher_pb2.GetRunRequest(run_id=shared.run_id, grant_token=token)
        page = events_pb2.ListThreadEventsRequest(grant_token=token, run_id=shared.run_id)
        asked: dict[str, Message] = {
            "dispatcher.ListRuns": dispatcher_pb2.ListRunsRequest(grant_token=token), "dispatcher.GetRun": run,
            "events.FollowThread": events_pb2.FollowThreadRequest(grant_token=token), "events.ListThreadEvents": page,
        }  # fmt: skip
        for rpc, request in asked.items():
            yield f"{rpc} by token", role, expected, await _ask(shared, rpc, who, [request], 5.0)
        cancel = dispatcher_pb2.CancelRunRequest(run_id=shared.run_id, grant_token=token)
        found = await _ask(shared, "dispatcher.CancelRun", who, [cancel])
        # the owner ends what is in the thread, the others what is theirs
        wanted = {OWNER: _OK, WRITER: _NOT_THEIRS, READER: _NOT_THEIRS}.get(role, expected)
        if role != OWNER:
            yield "dispatcher.CancelRun by token", role, wanted, found
        file = await _ask(shared, "context.GetArtifact", who, [context_pb2.GetArtifactRequest(artifact_id=shared.artifact_id)])
        yield "context.GetArtifact", role, _OK if role in shared.tokens else _NONE, file


async def _ended(shared: Shared, judge: Judge) -> int:
    """Deleted, restored, withdrawn, erased: each counts at once for everybody."""
    steps: list[tuple[str, Callable[[], Awaitable[Any]], dict[str, str]]] = [
        ("deleted", lambda: _by_owner(shared, "context.DeleteThread", _of(context_pb2.DeleteThreadRequest)), {}),
        (
            "restored", lambda: _by_owner(shared, "context.RestoreThread", _of(context_pb2.RestoreThreadRequest)),
            {OWNER: _OK, WRITER: _OK, READER: _OK},
        ),
        ("withdrawn", lambda: _withdrawn(shared, READER), {OWNER: _OK, WRITER: _OK}),
        ("erased", lambda: _by_owner(shared, "context.EraseThread", _of(context_pb2.EraseThreadRequest)), {}),
    ]  # fmt: skip
    cases = 0
    for name, step, sees in steps:
        answer = await step()
        judge.control(f"sharing: {name} by the owner", "" if answer.code == _OK else f"{answer.code} {answer.told}")
        for role in shared.people:
            for row in ROWS[1:3]:
                cases += 1
                found = await _ask(shared, row.rpc, shared.people[role], row.make(shared, role, shared.thread_id))
                # what is deleted its owner may still find in the list of what can be restored
                expected = sees.get(role, f"{_NONE} {_OK}" if name == "deleted" and role == OWNER else _NONE)
                _judged(shared, judge, f"{row.name} once it is {name}", role, expected, found, shows=False)
    return cases


async def _by_owner(shared: Shared, rpc: str, make: Make) -> answers.Answer:
    # runs that go on with the thread keep it from being erased
    for _ in range(30):
        answer = await _ask(shared, rpc, shared.people[OWNER], make(shared, OWNER, shared.thread_id))
        if answer.code != "FAILED_PRECONDITION":
            break
        await _quiet(shared)
    return answer


async def _quiet(shared: Shared) -> None:
    for role in (OWNER, WRITER):
        who = shared.people[role]
        runs = (await shared.world.runs.ListRuns(dispatcher_pb2.ListRunsRequest(), metadata=who.bearer, timeout=20)).runs
        for run in runs:
            await shared.world.ended(who, run.run_id)


async def _withdrawn(shared: Shared, role: str) -> answers.Answer:
    grantee = shared.people[role].user_id
    wanted = context_pb2.WithdrawGrantRequest(request_id=ids.uuid7(), thread_id=shared.thread_id, grantee_id=grantee)
    return await _ask(shared, "context.WithdrawGrant", shared.people[OWNER], [wanted])


async def _made(world: World) -> Shared:
    people = {}
    for role in (OWNER, WRITER, READER, WITHDRAWN, STRANGER, ELSEWHERE):
        who = await world.spare(world["C" if role == ELSEWHERE else "A"])
        who.name, who.canary, who.things = role, canary("s"), Things({"user_id": who.user_id, "tenant_id": who.things["tenant_id"]})
        people[role] = who
    owner = people[OWNER]
    run = await world.started(owner)
    await world.ended(owner, run.run_id)
    file = await world.kept(owner, thread_id=run.thread_id)
    shared = Shared(world, people, run.thread_id, run.run_id, file.artifact_id, {})
    for role, access in {WRITER: context_pb2.ACCESS_WRITE, READER: context_pb2.ACCESS_READ, WITHDRAWN: context_pb2.ACCESS_WRITE}.items():
        wanted = context_pb2.GrantThreadRequest(
            request_id=ids.uuid7(), thread_id=run.thread_id, user_id=people[role].user_id, access=access
        )  # fmt: skip
        await world.context.GrantThread(wanted, metadata=owner.bearer, timeout=20)
    await _withdrawn(shared, WITHDRAWN)
    for role in (OWNER, WRITER, READER):
        token = context_pb2.CreateGrantTokenRequest(thread_id=run.thread_id)
        found = await world.context.CreateGrantToken(token, metadata=people[role].bearer, timeout=20)
        shared.tokens[role] = found.grant_token
    return shared
