"""The messages of a run that was rolled back are hidden from everybody, and only from who reads the thread."""

from __future__ import annotations

import json

import pytest

from netra import errors
from netra.context.v1 import context_pb2
from tests.fixtures.accounts import refused
from tests.fixtures.contexts import Contexts
from tests.fixtures.conversations import ask, role, said, thread_of
from tests.fixtures.users import User


async def _hide(contexts: Contexts, token: str) -> int:
    answer = await contexts.stub.HideMessages(context_pb2.HideMessagesRequest(), metadata=contexts.within(token))
    return answer.hidden


async def _exported(contexts: Contexts, user: User) -> list[str]:
    answers = contexts.stub.ExportData(context_pb2.ExportDataRequest(), metadata=user.bearer)
    lines = b"".join([part.lines async for part in answers]).splitlines()
    return [entry["content"] for entry in map(json.loads, lines) if entry["kind"] == "message"]


async def test_the_messages_of_a_run_are_hidden_from_everybody(contexts: Contexts) -> None:
    owner, writer, reader = [await contexts.services.user() for _ in range(3)]
    thread_id = await thread_of(contexts, owner, "first")
    await contexts.grant(owner, thread_id, writer, "write")
    await contexts.grant(owner, thread_id, reader, "read")
    opened, other = [await contexts.open(user, thread_id=thread_id) for user in (writer, owner)]
    token = opened.context_token
    await contexts.append(token, "asked")
    await contexts.append(other.context_token, "between")
    await contexts.append(token, "answered")
    assert await _hide(contexts, token) == 2
    for user in (owner, writer, reader):
        assert await said(contexts, user, thread_id) == [(1, "first"), (3, "between")]
    within = context_pb2.ListMessagesRequest(thread_id=thread_id)
    for each in (token, other.context_token):
        found = await contexts.stub.ListMessages(within, metadata=contexts.within(each))
        assert [message.position for message in found.messages] == [1, 3]
    # what the run still says is hidden as well; the order of the thread goes on
    assert (await contexts.append(token, "late")).position == 5
    assert (await contexts.append(other.context_token, "after")).position == 6
    assert await said(contexts, reader, thread_id) == [(1, "first"), (3, "between"), (6, "after")]
    assert await _exported(contexts, writer) == ["asked", "answered", "late"]
    assert await _exported(contexts, owner) == ["first", "asked", "between", "answered", "late", "after"]


async def test_nobody_hides_what_another_user_said(contexts: Contexts) -> None:
    owner, writer = await contexts.services.user(), await contexts.services.user()
    thread_id = await thread_of(contexts, owner, "first")
    await contexts.grant(owner, thread_id, writer, "write")
    theirs = (await contexts.messages(owner, thread_id)).messages[0]
    async with role(contexts, writer) as database:
        query = "INSERT INTO context.hidden_runs (user_id, run_id, thread_id) VALUES ($1, $2, $3)"
        with pytest.raises(errors.NetraError):
            async with database.savepoint():
                await database.execute(query, owner.user_id, theirs.run_id, thread_id)
        # under their own name it is no message of theirs
        await database.execute(query, writer.user_id, theirs.run_id, thread_id)
    for user in (owner, writer):
        assert await said(contexts, user, thread_id) == [(1, "first")]


async def test_hiding_again_changes_nothing(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    await contexts.append(opened.context_token, "asked")
    assert [await _hide(contexts, opened.context_token) for _ in range(2)] == [1, 0]
    # a child of the context is in the same run
    child = await contexts.derive(opened.context_token)
    assert await _hide(contexts, child.context_token) == 0
    assert await said(contexts, user, opened.context.thread_id) == []


async def test_pages_go_on_over_what_is_hidden(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    thread_id = opened.context.thread_id
    hidden = await contexts.open(user, thread_id=thread_id)
    for number in range(6):
        await contexts.append((hidden if number % 3 else opened).context_token, f"{number}")
    await _hide(contexts, hidden.context_token)
    first = await contexts.messages(user, thread_id, 1)
    rest = await contexts.messages(user, thread_id, 1, first.next_page_token)
    assert [message.content for page in (first, rest) for message in page.messages] == ["0", "3"]
    assert not (await contexts.messages(user, thread_id, 1, rest.next_page_token)).messages


async def test_a_context_that_is_closed_hides_nothing(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    await contexts.append(opened.context_token, "asked")
    await contexts.close(opened.context_token)
    assert (await refused(_hide(contexts, opened.context_token))).code == "FAILED_PRECONDITION"
    assert await said(contexts, user, opened.context.thread_id) == [(1, "asked")]


async def test_users_hide_nothing_themselves(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    call = contexts.stub.HideMessages(context_pb2.HideMessagesRequest(), metadata=user.bearer)
    assert (await refused(call)).code == "PERMISSION_DENIED"
    call = contexts.stub.HideMessages(context_pb2.HideMessagesRequest(), metadata=contexts.dispatcher)
    assert (await refused(call)).code == "UNAUTHENTICATED"
    await contexts.close(opened.context_token)


async def test_what_is_hidden_is_erased_with_its_thread(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    await contexts.append(opened.context_token, "asked")
    await _hide(contexts, opened.context_token)
    await contexts.close(opened.context_token)
    erased = await ask(contexts, user, "EraseThread", thread_id=opened.context.thread_id)
    assert erased.messages == 1
    async with contexts.accounts.database() as admin:
        for table in ("messages", "hidden_runs"):
            query = f"SELECT count(*) FROM context.{table} WHERE thread_id = $1"  # noqa: S608 - of constants
            assert await admin.value(query, opened.context.thread_id) == 0
