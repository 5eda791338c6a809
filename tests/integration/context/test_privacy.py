"""What is kept of a user is told to them whole, and removed for good when they wish."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any

import grpc

from chassis import postgres, status
from netra import ids
from netra.context.v1 import context_pb2
from services.context import changes
from tests.fixtures.accounts import refused
from tests.fixtures.contexts import Contexts
from tests.fixtures.conversations import (
    OWN,
    READ,
    answer,
    ask,
    foreigner,
    listed,
    privacy_store,
    removal,
    said,
    system_role,
    thread_of,
)
from tests.fixtures.users import User

_OF_THREADS = ("threads", "messages", "contexts", "grants", "artifacts")
_OF_USERS = ("threads", "contexts", "artifacts", "artifact_chunks", "audit", "changes")


async def _put(contexts: Contexts, user: User, thread_id: str = "", name: str = "log.csv") -> str:
    """A file of a user."""
    header = context_pb2.ArtifactHeader(request_id=ids.uuid7(), name=name, media_type="text/csv", size=3, thread_id=thread_id)
    parts = [context_pb2.PutArtifactRequest(header=header), context_pb2.PutArtifactRequest(data=b"a,b")]
    return (await contexts.stub.PutArtifact(iter(parts), metadata=user.bearer)).artifact.artifact_id


async def _left(contexts: Contexts, tables: tuple[str, ...], column: str, value: str) -> dict[str, int]:
    """How many rows the tables still have."""
    query = "SELECT count(*) FROM context.{} WHERE {} = $1"
    return {table: await contexts.accounts.value(query.format(table, column), value) for table in tables}


async def _export(contexts: Contexts, user: User) -> list[dict[str, Any]]:
    """All lines, the last of which says so."""
    answers = contexts.stub.ExportData(context_pb2.ExportDataRequest(), metadata=user.bearer)
    whole = b"".join([part.lines async for part in answers])
    assert whole.endswith(b"\n")
    lines: list[dict[str, Any]] = [json.loads(line) for line in whole.splitlines()]
    assert lines[-1] == {"kind": "end", "lines": len(lines) - 1}
    return lines[:-1]


async def test_an_erased_thread_leaves_nothing(contexts: Contexts) -> None:
    owner, writer = await contexts.services.user(), await contexts.services.user()
    kept, thread_id = await thread_of(contexts, owner, "kept"), await thread_of(contexts, owner, "one", "two")
    await contexts.grant(owner, thread_id, writer, "write")
    opened = await contexts.open(writer, thread_id=thread_id)
    await contexts.append(opened.context_token, "three")
    files = [await _put(contexts, user, thread_id) for user in (owner, writer)]
    request_id = ids.uuid7()
    # nothing was done, and nothing is held against the request id, while the run of the other one goes on
    found = await answer(contexts, owner, "EraseThread", thread_id=thread_id, request_id=request_id)
    assert (found[0], found[2]) == ("FAILED_PRECONDITION", {"runs": opened.context.run_id, "threads": thread_id})
    assert len(await said(contexts, owner, thread_id)) == 3
    await contexts.close(opened.context_token)
    erased = await ask(contexts, owner, "EraseThread", thread_id=thread_id, request_id=request_id)
    assert (erased.messages, erased.artifacts) == (3, 2)
    assert await ask(contexts, owner, "EraseThread", thread_id=thread_id, request_id=request_id) == erased
    assert (await answer(contexts, owner, "EraseThread", thread_id=kept, request_id=request_id))[0] == "ALREADY_EXISTS"
    assert (await answer(contexts, owner, "EraseThread", thread_id=thread_id))[0] == "NOT_FOUND"
    gone = await _left(contexts, ("messages", "contexts", "grants"), "thread_id", thread_id)
    assert gone == {"messages": 0, "contexts": 0, "grants": 0}
    for user in (owner, writer):
        assert (await refused(contexts.messages(user, thread_id))).code == "NOT_FOUND"
        assert (await answer(contexts, user, "RestoreThread", thread_id=thread_id))[0] == "NOT_FOUND"
        for artifact_id in files:
            got = contexts.stub.GetArtifact(context_pb2.GetArtifactRequest(artifact_id=artifact_id), metadata=user.bearer)
            assert (await refused(got.read())).code == "NOT_FOUND"
    # the bytes go soon after, and the last of the thread with them
    async with asyncio.timeout(20):
        while sum((await _left(contexts, _OF_THREADS, "thread_id", thread_id)).values()):
            pass
    assert (await listed(contexts, owner), await said(contexts, owner, kept)) == ([kept], [(1, "kept")])
    last = (await contexts.audit(owner, thread_id=thread_id)).entries[-1]
    assert (last.action, json.loads(last.detail)["messages"]) == ("erase", 3)


async def test_a_run_begins_or_its_thread_is_erased_but_never_both(contexts: Contexts) -> None:
    user = await contexts.services.user()
    for _ in range(8):
        thread_id = await thread_of(contexts, user, "hello")
        calls = contexts.open(user, thread_id=thread_id), ask(contexts, user, "EraseThread", thread_id=thread_id)
        opened, erased = await asyncio.gather(*calls, return_exceptions=True)
        if isinstance(erased, grpc.aio.AioRpcError):
            assert status.from_rpc(erased).code == "FAILED_PRECONDITION"
            assert isinstance(opened, context_pb2.OpenContextResponse)
            assert (await contexts.append(opened.context_token, "more")).position == 2
        else:
            assert isinstance(opened, grpc.aio.AioRpcError)
            assert status.from_rpc(opened).code == "NOT_FOUND"


async def test_of_a_user_who_wishes_it_nothing_is_left(contexts: Contexts) -> None:
    user, friend = await contexts.services.user(), await contexts.services.user()
    own, deleted = await thread_of(contexts, user, "canary one"), await thread_of(contexts, user, "canary two")
    await ask(contexts, user, "DeleteThread", thread_id=deleted)
    await contexts.grant(user, own, friend, "write")
    within_own = await contexts.open(friend, thread_id=own)
    theirs = await thread_of(contexts, friend, "first")
    await contexts.grant(friend, theirs, user, "write")
    within = await contexts.open(user, thread_id=theirs)
    await contexts.append(within.context_token, "canary three")
    await _put(contexts, user, name="canary.csv")
    await _put(contexts, friend, own, name="of the friend.csv")
    request_id = ids.uuid7()
    # neither while a run of theirs goes on, nor while one of somebody else does in a thread of theirs
    assert (await answer(contexts, user, "EraseData", request_id=request_id))[0] == "FAILED_PRECONDITION"
    await contexts.close(within.context_token)
    assert (await answer(contexts, user, "EraseData", request_id=request_id))[0] == "FAILED_PRECONDITION"
    await contexts.close(within_own.context_token)
    last = await contexts.open(friend, thread_id=theirs)
    await contexts.append(last.context_token, "last")
    erased = await ask(contexts, user, "EraseData", request_id=request_id)
    assert (erased.threads, erased.messages, erased.artifacts, erased.contexts) == (2, 3, 2, 3)
    assert await ask(contexts, user, "EraseData", request_id=request_id) == erased
    assert await _left(contexts, ("contexts",), "user_id", user.user_id) == {"contexts": 0}
    assert await _left(contexts, ("messages", "contexts"), "owner_id", user.user_id) == {"messages": 0, "contexts": 0}
    # in the thread of the friend the place is left, and nothing in it; grants have ended both ways
    assert await said(contexts, friend, theirs) == [(1, "first"), (2, ""), (3, "last")]
    assert (await contexts.append(last.context_token, "next")).position == 4
    assert (await listed(contexts, friend, "SHARED"), await listed(contexts, user, "SHARED")) == ([], [])
    assert not (await ask(contexts, friend, "ListGrants", thread_id=theirs)).grants
    async with asyncio.timeout(20):
        while sum((await _left(contexts, _OF_USERS, "user_id", user.user_id)).values()) > 2:
            pass
    # that it was wished, how much was removed, and the place in the thread of the friend: that is all
    told = [(line["kind"], line.get("action"), line.get("content")) for line in await _export(contexts, user)]
    assert told == [("message", None, ""), ("audit", "erase", None), ("audit", "export", None)]
    async with contexts.accounts.database() as admin:
        for table in ("threads", "messages", "contexts", "artifacts", "grants", "audit", "changes"):
            assert not await admin.fetch(f"SELECT FROM context.{table} AS t WHERE t::text LIKE '%canary%'")
    # who begins anew has a new beginning
    assert await said(contexts, user, await thread_of(contexts, user, "anew")) == [(1, "anew")]
    assert await said(contexts, friend, theirs) == [(1, "first"), (2, ""), (3, "last"), (4, "next")]


async def test_messages_in_threads_of_others_are_blanked_afterwards_however_many_they_are(contexts: Contexts) -> None:
    user, friend, many = await contexts.services.user(), await contexts.services.user(), 1100
    left, again = [await thread_of(contexts, friend, "first") for _ in range(2)]
    for thread_id in (left, again):
        await contexts.grant(friend, thread_id, user, "write")
    change = changes.Change(ids.UserId(user.user_id), ids.RequestId("all-of-it"), "erase", actor="x")
    async with contexts.accounts.database() as admin:
        # where they are not let in again, it is no matter whose clock was right
        for thread_id, ahead in ((left, timedelta(hours=1)), (again, timedelta(0))):
            await _said_often(admin, thread_id, user, friend, many, ahead)
        held = "SELECT FROM context.messages WHERE user_id = $1 FOR UPDATE"
        async with contexts.accounts.locked(held, user.user_id), privacy_store(contexts) as kept:
            # it is wished, and waits for no message
            erased = await kept.erase_everything(change)
        assert (erased.messages, erased.threads) == (2 * many, 0)
        # who is let in again has a new beginning
        await contexts.grant(friend, again, user, "write")
        await contexts.append((await contexts.open(user, thread_id=again)).context_token, "anew")
        async with removal(contexts) as sweeping:
            await sweeping.of_user(change.user_id, change.request_id)
        query = "SELECT content, count(*) AS many FROM context.messages WHERE thread_id = $1 GROUP BY content"
        found = [{row["content"]: row["many"] for row in await admin.fetch(query, thread_id)} for thread_id in (left, again)]
        assert found == [{"first": 1, "": many}, {"first": 1, "": many, "anew": 1}]
        query = "SELECT done_at IS NOT NULL FROM context.changes WHERE user_id = $1 AND request_id = $2"
        assert await admin.value(query, user.user_id, change.request_id) is True
    # nor does who sweeps see a message of theirs any more
    async with system_role(contexts) as wall:
        assert await wall.value("SELECT count(*) FROM context.messages") == 0


async def _said_often(admin: postgres.Transaction, thread_id: str, user: User, owner: User, many: int, ahead: timedelta) -> None:
    """Messages of a user in a thread of somebody else, behind its first one; by a clock that is ahead by so much."""
    await admin.execute(
        "INSERT INTO context.messages (thread_id, position, message_id, user_id, owner_id, request_id, role, content, run_id, created_at)"
        " SELECT $1, n + 1, gen_random_uuid(), $2, $3, gen_random_uuid()::text, 'user', 'canary', gen_random_uuid(), now() + $5::interval"
        " FROM generate_series(1, $4::int) AS n", thread_id, user.user_id, owner.user_id, many, ahead,
    )  # fmt: skip
    # counted all at once: not as the service does it
    async with admin.savepoint():
        await admin.execute("ALTER TABLE context.threads DISABLE TRIGGER counted")
        await admin.execute("UPDATE context.threads SET messages = $2 WHERE thread_id = $1", thread_id, many + 1)
        await admin.execute("ALTER TABLE context.threads ENABLE TRIGGER counted")


async def test_who_deleted_a_thread_can_end_what_keeps_it_from_being_erased(contexts: Contexts) -> None:
    owner, writer = await contexts.services.user(), await contexts.services.user()
    thread_id = await thread_of(contexts, owner, "hello")
    await contexts.grant(owner, thread_id, writer, "write")
    opened = await contexts.open(writer, thread_id=thread_id)
    await ask(contexts, owner, "DeleteThread", thread_id=thread_id)
    blocked = {"runs": opened.context.run_id, "threads": thread_id}
    for rpc, fields in (("EraseThread", {"thread_id": thread_id}), ("EraseData", {})):
        found = await answer(contexts, owner, rpc, **fields)
        assert (found[0], found[2]) == ("FAILED_PRECONDITION", blocked)
    # with this the dispatcher lets them cancel it
    assert (await ask(contexts, owner, "CreateGrantToken", thread_id=thread_id)).access == OWN
    assert (await answer(contexts, writer, "CreateGrantToken", thread_id=thread_id))[0] == "NOT_FOUND"
    await contexts.close(opened.context_token)
    assert (await ask(contexts, owner, "EraseThread", thread_id=thread_id)).messages == 1


async def test_users_who_share_with_each_other_may_erase_everything_at_once(contexts: Contexts) -> None:
    pairs = [(await contexts.services.user(), await contexts.services.user()) for _ in range(6)]
    for pair in pairs:
        for owner, other in (pair, pair[::-1]):
            for _ in range(3):
                await contexts.grant(owner, await thread_of(contexts, owner, "hello"), other, "read")
    erased = await asyncio.gather(*(ask(contexts, user, "EraseData") for pair in pairs for user in pair))
    assert [(found.threads, found.messages) for found in erased] == [(3, 3)] * 12
    assert await contexts.accounts.value("SELECT count(*) FROM context.grants") == 0


async def test_a_user_with_very_many_files_has_them_erased(contexts: Contexts) -> None:
    """More than are given up before the call is answered: from then on they are there for nobody, and go one after the other."""
    user, friend, many = await contexts.services.user(), await contexts.services.user(), 17_000
    theirs = await thread_of(contexts, friend, "hello")
    await contexts.grant(friend, theirs, user, "write")
    request_id = ids.uuid7()
    kept = await _put(contexts, user, theirs)
    header = context_pb2.ArtifactHeader(request_id=request_id, name="log.csv", media_type="text/csv", size=3)
    parts = [context_pb2.PutArtifactRequest(header=header), context_pb2.PutArtifactRequest(data=b"a,b")]
    mine = (await contexts.stub.PutArtifact(iter(parts), metadata=user.bearer)).artifact.artifact_id
    async with contexts.accounts.database() as admin:
        await admin.execute(
            "INSERT INTO context.artifacts (artifact_id, user_id, request_id, state, name, media_type, reserved, size, sha256)"
            " SELECT gen_random_uuid(), $1, 'a' || n, 'complete', 'n', 'text/plain', 1, 1, sha256('x')"
            " FROM generate_series(1, $2::int) AS n",
            user.user_id, many,
        )  # fmt: skip
    page = await ask(contexts, user, "ListArtifacts")
    assert (page.count, page.bytes) == (many + 2, many + 6)
    erased = await ask(contexts, user, "EraseData")
    assert (erased.artifacts, erased.threads) == (many + 2, 0)
    assert not (await ask(contexts, user, "ListArtifacts")).artifacts
    for reader, artifact_id in ((user, mine), (user, kept), (friend, kept)):
        got = contexts.stub.GetArtifact(context_pb2.GetArtifactRequest(artifact_id=artifact_id), metadata=reader.bearer)
        assert (await refused(got.read())).code == "NOT_FOUND"
    assert [line["kind"] for line in await _export(contexts, user)] == ["audit", "audit"]
    # a new beginning
    again = await _put(contexts, user, name="anew.csv")
    async with removal(contexts) as sweeper:
        await sweeper.sweep()
    async with asyncio.timeout(60):
        while (await _left(contexts, ("artifacts",), "user_id", user.user_id))["artifacts"] > 1:
            pass
    page = await ask(contexts, user, "ListArtifacts")
    assert ([file.artifact_id for file in page.artifacts], page.count, page.bytes) == ([again], 1, 3)


async def test_what_a_process_left_half_removed_goes_with_the_next_sweep(contexts: Contexts) -> None:
    user = await contexts.services.user()
    thread_id, request_id = await thread_of(contexts, user, "one", "two"), ids.uuid7()
    async with contexts.accounts.database() as admin:
        # as if the process had died right after it was asked
        await admin.execute("UPDATE context.threads SET deleted_at = now(), erased_at = now() WHERE thread_id = $1", thread_id)
        await admin.execute(
            "INSERT INTO context.changes (user_id, request_id, asked, removed) VALUES ($1, $2, 'erase everything', '{}')",
            user.user_id, request_id,
        )  # fmt: skip
        await admin.execute(
            "INSERT INTO context.changes (user_id, request_id, asked, asked_at) VALUES ($1, 'long ago', 'x', now() - interval '3 days')",
            user.user_id,
        )  # fmt: skip
    assert (await answer(contexts, user, "GetThread", thread_id=thread_id))[0] == "NOT_FOUND"
    async with removal(contexts) as sweeper:
        await sweeper.sweep()
    assert await _left(contexts, _OF_THREADS, "thread_id", thread_id) == dict.fromkeys(_OF_THREADS, 0)
    found = await _left(contexts, ("contexts", "audit", "changes"), "user_id", user.user_id)
    assert found == {"contexts": 0, "audit": 0, "changes": 1}
    assert await contexts.accounts.value("SELECT done_at FROM context.changes WHERE request_id = $1", request_id) is not None


async def test_an_export_has_everything_of_the_user_and_nothing_of_anybody_else(contexts: Contexts) -> None:
    user, friend, outside = await contexts.services.user(), await contexts.services.user(), await foreigner(contexts)
    opened = await contexts.open(user, agent_context=b'{"note":"mine"}')
    contents = [f"message {number} \N{SNOWMAN}\n\u2028" for number in range(40)] + ["x" * 256 * 1024]
    for content in contents:
        await contexts.append(opened.context_token, content)
    own, deleted = opened.context.thread_id, await thread_of(contexts, user, "in a deleted one")
    await ask(contexts, user, "DeleteThread", thread_id=deleted)
    theirs = await thread_of(contexts, friend, "secret of the friend")
    await thread_of(contexts, outside, "secret of another tenant")
    await contexts.grant(friend, theirs, user, "write")
    await contexts.grant(user, own, friend, "read")
    within = await contexts.open(user, thread_id=theirs)
    await contexts.append(within.context_token, "mine with the friend")
    file, _ = await _put(contexts, user), await _put(contexts, friend, name="secret.csv")
    lines = await _export(contexts, user)
    of: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        of.setdefault(line["kind"], []).append(line)
    assert [line["thread_id"] for line in of["thread"]] == [own, deleted]
    assert [line["content"] for line in of["message"]] == [*contents, "in a deleted one", "mine with the friend"]
    assert [line["position"] for line in of["message"][:41]] == list(range(1, 42))
    assert [(line["artifact_id"], line["size"], line["name"]) for line in of["artifact"]] == [(file, 3, "log.csv")]
    assert [(line["thread_id"], line["grantee_id"]) for line in of["grant"]] == [(own, friend.user_id), (theirs, user.user_id)]
    assert {"note": "mine"} in [line["agent_context"] for line in of["context"]]
    assert len(of["context"]) == 3
    assert [line["action"] for line in of["audit"]].count("open") == 3
    assert of["audit"][-1]["action"] == "export"
    assert "secret" not in json.dumps(lines)
    assert {line["user_id"] for line in of["message"]} == {user.user_id}


async def test_only_who_may_erases_and_a_grant_for_reading_erases_nothing(contexts: Contexts) -> None:
    owner, reader = await contexts.services.user(), await contexts.services.user(role="readonly")
    thread_id = await thread_of(contexts, owner, "hello")
    granted = await ask(contexts, owner, "GrantThread", thread_id=thread_id, user_id=reader.user_id, access=READ)
    assert granted.grant.access == READ
    for rpc in ("EraseData", "EraseThread"):
        fields = {} if rpc == "EraseData" else {"thread_id": thread_id}
        assert (await answer(contexts, reader, rpc, **fields))[0] == "PERMISSION_DENIED"
    # what one may read one may take along, if it is one's own
    assert {line["kind"] for line in await _export(contexts, reader)} == {"grant", "audit"}
    assert await said(contexts, reader, thread_id) == [(1, "hello")]


async def test_who_sweeps_removes_nothing_that_somebody_has(contexts: Contexts) -> None:
    """The wall alone: the role that crosses users goes to the tables directly."""
    user = await contexts.services.user()
    thread_id = await thread_of(contexts, user, "hello")
    await contexts.grant(user, thread_id, await contexts.services.user(), "read")
    await _put(contexts, user, thread_id)
    attempts = (
        "DELETE FROM context.messages WHERE thread_id = $1",
        "DELETE FROM context.grants WHERE thread_id = $1",
        "DELETE FROM context.threads WHERE thread_id = $1",
        "UPDATE context.threads SET erased_at = now() WHERE thread_id = $1",
        "UPDATE context.artifacts SET state = 'discarded' WHERE thread_id = $1",
        "DELETE FROM context.artifacts WHERE thread_id = $1",
        "DELETE FROM context.audit WHERE thread_id = $1",
        "DELETE FROM context.changes WHERE $1::uuid IS NOT NULL",
    )
    async with system_role(contexts) as wall:
        for attempt in attempts:
            assert (await wall.execute(attempt, thread_id)).endswith(" 0"), attempt
    await ask(contexts, user, "EraseThread", thread_id=thread_id)
    assert await _left(contexts, ("messages", "grants"), "thread_id", thread_id) == {"messages": 0, "grants": 0}
