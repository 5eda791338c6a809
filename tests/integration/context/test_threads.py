"""Threads go on, keep one order, are deleted and come back, over a real database."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest

from netra import ids
from netra.context.v1 import context_pb2
from services.context import wiring as context_wiring
from services.context.settings import ContextSettings
from standalone import prepare
from tests.fixtures.accounts import Accounts, refused
from tests.fixtures.contexts import Contexts, serving
from tests.fixtures.conversations import OWN, WRITE, answer, ask, foreigner, listed, removal, said, thread_of
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User


async def test_a_thread_goes_on_over_sockets_sessions_and_restarts(services: Services, stores: Standalone, database: str) -> None:
    await services.auth()
    accounts = Accounts(services, prepare.on_database(stores.postgres_admin_url, database))

    @contextlib.asynccontextmanager
    async def process() -> AsyncIterator[Contexts]:
        async with context_wiring.build(ContextSettings(**services.settings("context"))) as service:
            services.ports["context"] = service.port
            await serving(services)
            yield Contexts(services, accounts, await services.service_token("dispatcher"))

    user = await services.user()
    async with process() as contexts:
        first = await contexts.open(user, connection_id=ids.ConnectionId.new())
        thread_id = first.context.thread_id
        await contexts.append(first.context_token, "over one socket")
        second = await contexts.open(user, thread_id=thread_id, connection_id=ids.ConnectionId.new())
        await contexts.append(second.context_token, "over another")
        await contexts.close(second.context_token)
    async with process() as contexts:
        # a context that was opened before the restart goes on after it
        await contexts.append(first.context_token, "by the run that outlived the process")
        again = await contexts.login(user)
        third = await contexts.open(again, thread_id=thread_id)
        assert third.context.session_id != first.context.session_id
        await contexts.append(third.context_token, "in another session")
        assert await said(contexts, again, thread_id) == [
            (1, "over one socket"), (2, "over another"), (3, "by the run that outlived the process"), (4, "in another session"),
        ]  # fmt: skip
        assert await listed(contexts, again) == [thread_id]


async def test_owner_and_grantee_at_once_keep_one_order(contexts: Contexts) -> None:
    owner, writer = await contexts.services.user(), await contexts.services.user()
    thread_id = await thread_of(contexts, owner)
    await contexts.grant(owner, thread_id, writer, "write")
    tokens = [(user, (await contexts.open(user, thread_id=thread_id)).context_token) for user in (owner, writer)]
    added = await asyncio.gather(*(contexts.append(token, f"{number} of {user.user_id}") for number in range(15) for user, token in tokens))
    assert sorted(message.position for message in added) == list(range(1, 31))
    for reader in (owner, writer):
        found = (await contexts.messages(reader, thread_id)).messages
        assert list(found) == sorted(added, key=lambda message: message.position)
        assert all(message.content.endswith(message.user_id) for message in found)
    assert {message.user_id for message in added} == {owner.user_id, writer.user_id}
    thread = (await ask(contexts, writer, "GetThread", thread_id=thread_id)).thread
    assert (thread.messages, thread.owner_id, thread.access) == (30, owner.user_id, WRITE)


async def test_a_closed_context_neither_reads_nor_writes(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened, other = await contexts.open(user), await contexts.open(user)
    thread_id, request_id = opened.context.thread_id, ids.uuid7()
    first = await contexts.append(opened.context_token, "hello", request_id)
    request = context_pb2.ListMessagesRequest(thread_id=thread_id)
    assert len((await contexts.stub.ListMessages(request, metadata=contexts.within(opened.context_token))).messages) == 1
    await contexts.close(opened.context_token)
    # the same request has the same answer; it writes nothing
    assert await contexts.append(opened.context_token, "hello", request_id) == first
    for call in (
        contexts.append(opened.context_token, "more"),
        contexts.stub.ListMessages(request, metadata=contexts.within(opened.context_token)),
    ):
        assert (await refused(call)).code == "FAILED_PRECONDITION"
    # the user reads on by themselves, and so does another run
    assert await said(contexts, user, thread_id) == [(1, "hello")]
    assert len((await contexts.stub.ListMessages(request, metadata=contexts.within(other.context_token))).messages) == 1


async def test_a_deleted_thread_is_hidden_from_everybody_and_comes_back(contexts: Contexts) -> None:
    owner, writer = await contexts.services.user(), await contexts.services.user()
    kept, thread_id = await thread_of(contexts, owner, "kept"), await thread_of(contexts, owner, "hello")
    await contexts.grant(owner, thread_id, writer, "write")
    goes_on = await contexts.open(owner, thread_id=thread_id)
    request_id = ids.uuid7()
    first = await ask(contexts, owner, "DeleteThread", thread_id=thread_id, request_id=request_id)
    assert first.erased_at.ToDatetime() - first.thread.deleted_at.ToDatetime() == timedelta(days=30)
    # again, under the same request id or another one, keeps the first time
    assert await ask(contexts, owner, "DeleteThread", thread_id=thread_id, request_id=request_id) == first
    assert await ask(contexts, owner, "DeleteThread", thread_id=thread_id) == first
    assert (await answer(contexts, owner, "DeleteThread", thread_id=kept, request_id=request_id))[0] == "ALREADY_EXISTS"
    assert await listed(contexts, owner) == [kept]
    assert (await listed(contexts, owner, "DELETED"), await listed(contexts, writer, "SHARED")) == ([thread_id], [])
    for user in (owner, writer):
        missing = await answer(contexts, user, "GetThread", thread_id=ids.ThreadId.new())
        assert missing[0] == "NOT_FOUND"
        for rpc in ("GetThread", "ListMessages", "ListGrants"):
            assert await answer(contexts, user, rpc, thread_id=thread_id) == missing
        assert (await refused(contexts.open(user, thread_id=thread_id))).code == "NOT_FOUND"
    assert (await answer(contexts, writer, "CreateGrantToken", thread_id=thread_id))[0] == "NOT_FOUND"
    # the run that goes on with it may end there
    await contexts.append(goes_on.context_token, "the answer")
    restored = (await ask(contexts, owner, "RestoreThread", thread_id=thread_id)).thread
    assert (restored.messages, restored.access, restored.HasField("deleted_at")) == (2, OWN, False)
    assert await said(contexts, writer, thread_id) == [(1, "hello"), (2, "the answer")]
    assert (await listed(contexts, owner), await listed(contexts, owner, "DELETED")) == ([thread_id, kept], [])
    # a late double of the first request does not delete it again
    late = await ask(contexts, owner, "DeleteThread", thread_id=thread_id, request_id=request_id)
    assert (late.thread.HasField("deleted_at"), late.HasField("erased_at")) == (False, False)
    trail = [(entry.actor, entry.action) for entry in (await contexts.audit(owner, thread_id=thread_id)).entries]
    assert [action for actor, action in trail if actor == owner.user_id] == ["grant", "delete", "restore"]


async def test_who_does_not_own_a_thread_does_not_delete_it(contexts: Contexts) -> None:
    owner, writer, stranger = [await contexts.services.user() for _ in range(3)]
    outside, thread_id = await foreigner(contexts), await thread_of(contexts, owner, "hello")
    await contexts.grant(owner, thread_id, writer, "write")
    for rpc in ("DeleteThread", "RestoreThread", "EraseThread"):
        assert (await answer(contexts, writer, rpc, thread_id=thread_id))[0] == "PERMISSION_DENIED"
        for user in (stranger, outside):
            request_id = ids.uuid7()
            foreign = await answer(contexts, user, rpc, thread_id=thread_id, request_id=request_id)
            assert foreign == await answer(contexts, user, rpc, thread_id=ids.ThreadId.new(), request_id=request_id)
            assert foreign[0] == "NOT_FOUND"
    assert await said(contexts, owner, thread_id) == [(1, "hello")]


async def test_a_deleted_thread_is_erased_when_its_time_has_passed(contexts: Contexts) -> None:
    owner, writer = await contexts.services.user(), await contexts.services.user()
    old, young, busy = [await thread_of(contexts, owner, "hello") for _ in range(3)]
    await contexts.grant(owner, old, writer, "write")
    await contexts.open(owner, thread_id=busy)
    for thread_id in (old, young, busy):
        await ask(contexts, owner, "DeleteThread", thread_id=thread_id)
    async with contexts.accounts.database() as admin:
        later = "UPDATE context.threads SET deleted_at = deleted_at - interval '31 days' WHERE thread_id = ANY($1::uuid[])"
        await admin.execute(later, [old, busy])
    assert (await answer(contexts, owner, "RestoreThread", thread_id=old))[0] == "NOT_FOUND"
    async with removal(contexts) as sweeper:
        await sweeper.sweep()
    for table in ("threads", "messages", "contexts", "grants"):
        query = f"SELECT count(*) FROM context.{table} WHERE thread_id = $1"  # noqa: S608 - of constants
        assert await contexts.accounts.value(query, old) == 0
    assert await listed(contexts, owner, "DELETED") == [busy, young]
    assert (await contexts.audit(owner, thread_id=old)).entries[-1].action == "erase"
    await ask(contexts, owner, "RestoreThread", thread_id=young)
    assert await said(contexts, owner, young) == [(1, "hello")]


@pytest.mark.parametrize("selection", ["OWN", "SHARED", "DELETED"])
async def test_each_list_of_threads_is_paged_newest_first_by_tokens_of_its_own(contexts: Contexts, selection: str) -> None:
    owner, reader = await contexts.services.user(), await contexts.services.user()
    made = [await thread_of(contexts, owner) for _ in range(3)]
    await thread_of(contexts, reader)
    for thread_id in made:
        if selection == "SHARED":
            await contexts.grant(owner, thread_id, reader, "read")
        elif selection == "DELETED":
            await ask(contexts, owner, "DeleteThread", thread_id=thread_id)
    user: User = reader if selection == "SHARED" else owner
    wanted = context_pb2.ThreadSelection.Value(f"THREAD_SELECTION_{selection}")
    first = await ask(contexts, user, "ListThreads", selection=wanted, page_size=2)
    rest = await ask(contexts, user, "ListThreads", selection=wanted, page_size=2, page_token=first.next_page_token)
    assert [[thread.thread_id for thread in page.threads] for page in (first, rest)] == [[made[2], made[1]], [made[0]]]
    assert not rest.next_page_token
    for other in {1, 2, 3} - {wanted}:
        found = await answer(contexts, user, "ListThreads", selection=other, page_token=first.next_page_token)
        assert (found[0], found[2]["field"]) == ("INVALID_PAYLOAD", "page_token")
    assert (await answer(contexts, user, "ListThreads", selection=9))[2]["field"] == "selection"
