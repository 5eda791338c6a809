"""Messages with which runs begin and end: stored with the opening of their context, and before its close, or not at all."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from google.protobuf import timestamp_pb2

from netra import ids
from netra.context.v1 import context_pb2
from services.context import drafts
from tests.fixtures.accounts import refused
from tests.fixtures.contexts import Contexts
from tests.fixtures.conversations import ask, said, thread_of
from tests.fixtures.users import User

_THREAD = "SELECT thread_id FROM context.threads WHERE thread_id = $1 FOR UPDATE"


def _message(content: str, role: str = "user", name: str = "request") -> context_pb2.RunMessage:
    return context_pb2.RunMessage(name=name, role=role, content=content)


async def _close(contexts: Contexts, token: str, content: str = "Four.", **more: Any) -> context_pb2.CloseContextResponse:
    """Close a context with an answer."""
    message = _message(content, more.pop("role", "assistant"), more.pop("name", "answer"))
    return await contexts.stub.CloseContext(context_pb2.CloseContextRequest(message=message, **more), metadata=contexts.within(token))


async def _found(contexts: Contexts, user: User, thread_id: str) -> list[tuple[str, int, str, str]]:
    """Id, place, role and content of what a user sees in a thread."""
    page = (await contexts.messages(user, thread_id)).messages
    return [(message.message_id, message.position, message.role, message.content) for message in page]


# ---------------------------------------------------------------- at the begin


async def test_a_new_thread_begins_with_the_message_of_its_run(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user, message=_message("What is two and two?"))
    thread_id = opened.context.thread_id
    (message,) = (await contexts.messages(user, thread_id)).messages
    assert (message.message_id, message.position, message.content) == (opened.message_id, 1, "What is two and two?")
    assert (message.run_id, message.user_id, message.role) == (opened.context.run_id, user.user_id, "user")
    thread = (await ask(contexts, user, "GetThread", thread_id=thread_id)).thread
    assert (thread.messages, thread.updated_at) == (1, message.created_at)
    # it counts on from there
    assert (await contexts.append(opened.context_token, "And three?")).position == 2
    assert await contexts.actions(user, opened.context.context_id) == [("dispatcher", "open")]


async def test_a_context_without_a_message_has_no_id_of_one(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    assert opened.message_id == ""
    assert await said(contexts, user, opened.context.thread_id) == []


async def test_a_message_comes_behind_those_of_its_thread(contexts: Contexts) -> None:
    user = await contexts.services.user()
    thread_id = await thread_of(contexts, user, "first", "second")
    opened = [await contexts.open(user, thread_id=thread_id, message=_message(f"{number}")) for number in range(2)]
    assert await said(contexts, user, thread_id) == [(1, "first"), (2, "second"), (3, "0"), (4, "1")]
    assert [found[0] for found in await _found(contexts, user, thread_id)][2:] == [each.message_id for each in opened]
    assert (await ask(contexts, user, "GetThread", thread_id=thread_id)).thread.messages == 4


async def test_the_same_request_says_it_once_whatever_run_it_proposes(contexts: Contexts) -> None:
    user, request_id = await contexts.services.user(), ids.uuid7()
    opened = [await contexts.open(user, request_id=request_id, message=_message("Hello.")) for _ in range(2)]
    assert opened[0].context == opened[1].context
    assert opened[0].message_id == opened[1].message_id != ""
    # what an older caller adds by itself is the same message
    again = await contexts.append(opened[0].context_token, "Hello.", f"{opened[0].context.run_id}:request")
    assert again.message_id == opened[0].message_id
    error = await refused(contexts.open(user, request_id=request_id, message=_message("Bye.")))
    assert (error.code, error.details["field"]) == ("ALREADY_EXISTS", "request_id")
    assert await said(contexts, user, opened[0].context.thread_id) == [(1, "Hello.")]


async def test_the_same_request_at_once_says_it_once(contexts: Contexts) -> None:
    user, request_id = await contexts.services.user(), ids.uuid7()
    opened = await asyncio.gather(*(contexts.open(user, request_id=request_id, message=_message("Hello.")) for _ in range(6)))
    assert len({each.message_id for each in opened}) == len({each.context.context_id for each in opened}) == 1
    assert await said(contexts, user, opened[0].context.thread_id) == [(1, "Hello.")]


async def test_a_context_that_was_opened_without_it_gets_its_message_afterwards(contexts: Contexts) -> None:
    user, request_id = await contexts.services.user(), ids.uuid7()
    first = await contexts.open(user, request_id=request_id)
    again = await contexts.open(user, request_id=request_id, message=_message("Hello."))
    assert again.context == first.context
    assert await _found(contexts, user, first.context.thread_id) == [(again.message_id, 1, "user", "Hello.")]


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (_message("Hello.", "system"), "role"),
        (_message(" \n"), "content"),
        (_message("a\0b"), "message.content"),
        (_message("x" * (drafts.MAX_CONTENT + 1)), "content"),
        (_message("Hello.", name=""), "name"),
        (_message("Hello.", name="x" * 28), "name"),
        (_message("Hello.", name="a b"), "name"),
    ],
    ids=["role", "blank", "NUL", "long", "no name", "long name", "odd name"],
)
async def test_what_no_message_can_be_opens_and_closes_nothing(contexts: Contexts, message: context_pb2.RunMessage, field: str) -> None:
    user = await contexts.services.user()
    assert (await refused(contexts.open(user, message=message))).details["field"] == field
    assert not (await contexts.page(user)).contexts
    opened = await contexts.open(user)
    closing = context_pb2.CloseContextRequest(message=message)
    error = await refused(contexts.stub.CloseContext(closing, metadata=contexts.within(opened.context_token)))
    assert error.details["field"] == field
    assert len((await contexts.page(user, open=True)).contexts) == 1


async def test_the_longest_message_begins_and_ends_a_run(contexts: Contexts) -> None:
    user = await contexts.services.user()
    # the sign that parts texts which go together is one of it
    longest = "é\x1f" + "x" * (drafts.MAX_CONTENT - 3)
    opened = await contexts.open(user, message=_message(longest))
    await _close(contexts, opened.context_token, longest)
    assert [entry[3] for entry in await _found(contexts, user, opened.context.thread_id)] == [longest] * 2


async def test_in_a_thread_of_somebody_else_who_may_write_says_something_and_nobody_else(contexts: Contexts) -> None:
    owner, writer, reader, stranger = [await contexts.services.user() for _ in range(4)]
    thread_id = await thread_of(contexts, owner, "first")
    await contexts.grant(owner, thread_id, writer, "write")
    await contexts.grant(owner, thread_id, reader, "read")
    opened = await contexts.open(writer, thread_id=thread_id, message=_message("second"))
    codes = [(await refused(contexts.open(user, thread_id=thread_id, message=_message("no")))).code for user in (reader, stranger)]
    assert codes == ["PERMISSION_DENIED", "NOT_FOUND"]
    await _close(contexts, opened.context_token, "third")
    assert await said(contexts, owner, thread_id) == [(1, "first"), (2, "second"), (3, "third")]
    assert [message.user_id for message in (await contexts.messages(owner, thread_id)).messages][1:] == [writer.user_id] * 2
    await contexts.withdraw(owner, thread_id, writer)
    assert (await refused(contexts.open(writer, thread_id=thread_id, message=_message("no")))).code == "NOT_FOUND"


async def test_in_a_deleted_thread_nothing_begins_and_what_goes_on_ends(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user, message=_message("Hello."))
    thread_id = opened.context.thread_id
    await ask(contexts, user, "DeleteThread", thread_id=thread_id)
    assert (await refused(contexts.open(user, thread_id=thread_id, message=_message("no")))).code == "NOT_FOUND"
    await _close(contexts, opened.context_token)
    await ask(contexts, user, "RestoreThread", thread_id=thread_id)
    assert await said(contexts, user, thread_id) == [(1, "Hello."), (2, "Four.")]


async def test_a_message_of_another_request_opens_nothing(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user, message=_message("Hello."))
    error = await refused(contexts.open(user, run_id=opened.context.run_id, message=_message("Hello.")))
    assert (error.code, error.details["field"]) == ("ALREADY_EXISTS", "request_id")
    assert len((await contexts.page(user)).contexts) == 1
    assert len((await contexts.threads(user)).threads) == 1


async def test_messages_of_many_runs_in_one_thread_have_one_order(contexts: Contexts) -> None:
    owner, writer = await contexts.services.user(), await contexts.services.user()
    thread_id = await thread_of(contexts, owner, "first")
    await contexts.grant(owner, thread_id, writer, "write")
    async with asyncio.timeout(60):
        opened = await asyncio.gather(
            *(
                contexts.open((owner, writer)[number % 2], thread_id=thread_id, message=_message(f"{number}"))
                for number in range(24)
            )
        )  # fmt: skip
        await asyncio.gather(*(_close(contexts, each.context_token, f"to {number}") for number, each in enumerate(opened)))
    found = await _found(contexts, owner, thread_id)
    assert [place for _, place, _, _ in found] == list(range(1, 50))
    assert sorted(content for _, _, _, content in found[1:25]) == sorted(f"{number}" for number in range(24))
    times = [message.created_at.ToNanoseconds() for message in (await contexts.messages(owner, thread_id)).messages]
    assert times[1:] == sorted(times[1:])


# ---------------------------------------------------------------- at the end


async def test_a_context_is_closed_behind_its_last_message(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user, message=_message("What is two and two?"))
    ended = await _close(contexts, opened.context_token)
    thread_id = opened.context.thread_id
    assert await _found(contexts, user, thread_id) == [
        (opened.message_id, 1, "user", "What is two and two?"), (ended.message_id, 2, "assistant", "Four."),
    ]  # fmt: skip
    assert (await contexts.get(user, opened.context.context_id)).closed_at == ended.closed_at
    assert await contexts.actions(user, opened.context.context_id) == [("dispatcher", "open"), ("dispatcher", "close")]
    assert (await refused(contexts.append(opened.context_token, "late"))).code == "FAILED_PRECONDITION"
    assert (await refused(contexts.renew(opened.context_token))).code == "FAILED_PRECONDITION"
    # nothing goes on in the thread any more
    assert (await ask(contexts, user, "EraseThread", thread_id=thread_id)).messages == 2


async def test_the_same_again_answers_the_same_message_of_a_context_that_is_closed(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    first = await _close(contexts, opened.context_token)
    assert await _close(contexts, opened.context_token) == first
    # so does the message alone, and closing alone
    again = context_pb2.AppendMessageRequest(request_id=f"{opened.context.run_id}:answer", role="assistant", content="Four.")
    found = await contexts.stub.AppendMessage(again, metadata=contexts.within(opened.context_token))
    assert found.message.message_id == first.message_id
    assert await contexts.close(opened.context_token) == first.closed_at
    # another one is not said any more, under this name or another
    assert (await refused(_close(contexts, opened.context_token, "Five."))).code == "ALREADY_EXISTS"
    again.content = "Five."
    assert (await refused(contexts.stub.AppendMessage(again, metadata=contexts.within(opened.context_token)))).code == "ALREADY_EXISTS"
    assert (await refused(_close(contexts, opened.context_token, name="more"))).code == "FAILED_PRECONDITION"
    assert await said(contexts, user, opened.context.thread_id) == [(1, "Four.")]


async def test_several_who_close_it_at_once_are_told_the_same(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    ended = await asyncio.gather(*(_close(contexts, opened.context_token) for _ in range(6)))
    assert len({(each.message_id, each.closed_at.ToNanoseconds()) for each in ended}) == 1
    assert await said(contexts, user, opened.context.thread_id) == [(1, "Four.")]
    assert await contexts.actions(user) == [("dispatcher", "open"), ("dispatcher", "close")]


async def test_a_message_that_was_added_before_is_the_one_it_is_closed_with(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    wanted = context_pb2.AppendMessageRequest(request_id=f"{opened.context.run_id}:answer", role="assistant", content="Four.")
    added = (await contexts.stub.AppendMessage(wanted, metadata=contexts.within(opened.context_token))).message
    ended = await _close(contexts, opened.context_token)
    assert ended.message_id == added.message_id
    assert (await contexts.get(user, opened.context.context_id)).closed_at == ended.closed_at


@pytest.mark.parametrize("other", [{"content": "Five."}, {"role": "user"}])
async def test_another_message_under_the_same_name_closes_nothing(contexts: Contexts, other: dict[str, str]) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    wanted = {"request_id": f"{opened.context.run_id}:answer", "role": "assistant", "content": "Four."} | other
    request = context_pb2.AppendMessageRequest(**wanted)
    await contexts.stub.AppendMessage(request, metadata=contexts.within(opened.context_token))
    error = await refused(_close(contexts, opened.context_token))
    assert (error.code, error.details["field"]) == ("ALREADY_EXISTS", "request_id")
    assert not (await contexts.get(user, opened.context.context_id)).HasField("closed_at")


async def test_a_context_that_was_closed_without_it_takes_no_message(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    await contexts.close(opened.context_token)
    assert (await refused(_close(contexts, opened.context_token))).code == "FAILED_PRECONDITION"
    assert await said(contexts, user, opened.context.thread_id) == []


async def test_who_waits_while_their_context_is_closed_says_nothing(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    thread_id, token = opened.context.thread_id, opened.context_token
    async with asyncio.TaskGroup() as group, contexts.accounts.locked(_THREAD, thread_id):
        closing = group.create_task(refused(_close(contexts, token)))
        await contexts.accounts.until_waiting(1, "netra_context", "SELECT outcome")
        await contexts.close(token)
    assert closing.result().code == "FAILED_PRECONDITION"
    assert await said(contexts, user, thread_id) == []


async def test_who_may_not_write_any_more_closes_without_a_message(contexts: Contexts) -> None:
    owner, writer = await contexts.services.user(), await contexts.services.user()
    thread_id = await thread_of(contexts, owner, "first")
    await contexts.grant(owner, thread_id, writer, "write")
    opened = await contexts.open(writer, thread_id=thread_id)
    await contexts.grant(owner, thread_id, writer, "read")
    assert (await refused(_close(contexts, opened.context_token))).code == "PERMISSION_DENIED"
    await contexts.withdraw(owner, thread_id, writer)
    assert (await refused(_close(contexts, opened.context_token))).code == "NOT_FOUND"
    assert not (await contexts.get(writer, opened.context.context_id)).HasField("closed_at")
    await contexts.close(opened.context_token)
    assert await said(contexts, owner, thread_id) == [(1, "first")]


async def test_a_session_that_was_withdrawn_says_nothing_at_its_end(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    await contexts.disable(user)
    await contexts.until_closed(opened.context.context_id)
    assert (await refused(_close(contexts, opened.context_token))).code == "FAILED_PRECONDITION"
    query = "SELECT count(*) FROM context.messages WHERE thread_id = $1"
    assert await contexts.accounts.value(query, opened.context.thread_id) == 0


async def test_what_an_older_service_takes_for_a_context_that_rests_is_closed_with_its_message(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    # to a service that does not know of messages the request is this one: it does nothing
    older = context_pb2.CloseContextRequest(unused=timestamp_pb2.Timestamp())
    answer = await contexts.stub.CloseContext(older, metadata=contexts.within(opened.context_token))
    assert answer == context_pb2.CloseContextResponse()
    assert (await ask_erase(contexts, user, opened.context.thread_id)) == "FAILED_PRECONDITION"
    ended = await _close(contexts, opened.context_token, unused=timestamp_pb2.Timestamp())
    assert await _found(contexts, user, opened.context.thread_id) == [(ended.message_id, 1, "assistant", "Four.")]
    assert (await contexts.get(user, opened.context.context_id)).closed_at == ended.closed_at


async def ask_erase(contexts: Contexts, user: User, thread_id: str) -> str:
    """The code with which the erasure of a thread is refused."""
    return (await refused(ask(contexts, user, "EraseThread", thread_id=thread_id))).code


async def test_the_messages_of_a_run_that_ended_with_one_can_still_be_hidden(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user, message=_message("Hello."))
    await _close(contexts, opened.context_token)
    hiding = context_pb2.HideMessagesRequest()
    hidden = [(await contexts.stub.HideMessages(hiding, metadata=contexts.within(opened.context_token))).hidden for _ in range(2)]
    assert hidden == [2, 0]
    assert await said(contexts, user, opened.context.thread_id) == []


async def test_what_a_run_said_goes_with_all_that_is_of_its_user(contexts: Contexts) -> None:
    owner, writer = await contexts.services.user(), await contexts.services.user()
    thread_id = await thread_of(contexts, owner, "first")
    await contexts.grant(owner, thread_id, writer, "write")
    opened = await contexts.open(writer, thread_id=thread_id, message=_message("Hello."))
    ended = await _close(contexts, opened.context_token)
    assert (await ask(contexts, writer, "EraseData")).messages == 2
    # nobody finds it again by what it was asked under
    assert (await refused(_close(contexts, opened.context_token))).code == "FAILED_PRECONDITION"
    assert await said(contexts, owner, thread_id) == [(1, "first"), (2, ""), (3, "")]
    assert [found[0] for found in await _found(contexts, owner, thread_id)][1:] == [opened.message_id, ended.message_id]
