"""Contexts, threads and messages, over a real database."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
from google.protobuf import timestamp_pb2

from chassis import status
from netra import ids
from netra.context.v1 import context_pb2
from tests.fixtures.accounts import refused as _refused
from tests.fixtures.contexts import Contexts
from tests.fixtures.conversations import answer, ask, thread_of


async def test_of_ten_who_bring_one_request_id_all_get_the_context_of_the_first(contexts: Contexts) -> None:
    user, request_id = await contexts.services.user(), ids.uuid7()
    runs = [ids.RunId.new() for _ in range(10)]
    answers = await asyncio.gather(*(contexts.open(user, request_id=request_id, run_id=run_id) for run_id in runs))
    assert len({answer.context.context_id for answer in answers}) == 1
    assert len({answer.context.run_id for answer in answers}) == 1
    assert answers[0].context.run_id in runs
    # the losers left nothing behind
    found = (await contexts.threads(user)).threads
    assert [thread.thread_id for thread in found] == [answers[0].context.thread_id]


async def test_another_question_under_the_same_request_id_is_refused(contexts: Contexts) -> None:
    user, request_id = await contexts.services.user(), ids.uuid7()
    opened = await contexts.open(user, request_id=request_id)
    changed: list[dict[str, Any]] = [{"agent_context": b'{"a":1}'}, {"thread_id": opened.context.thread_id}]
    for more in changed:
        refused = await _refused(contexts.open(user, request_id=request_id, **more))
        assert (refused.code, refused.details["field"]) == ("ALREADY_EXISTS", "request_id")
    assert len((await contexts.threads(user)).threads) == 1


async def test_two_users_may_use_one_request_id(contexts: Contexts) -> None:
    one, two, request_id = await contexts.services.user(), await contexts.services.user(), ids.uuid7()
    first, second = await contexts.open(one, request_id=request_id), await contexts.open(two, request_id=request_id)
    assert first.context.context_id != second.context.context_id
    assert (first.context.user_id, second.context.user_id) == (one.user_id, two.user_id)


async def test_a_foreign_thread_does_not_exist(contexts: Contexts) -> None:
    owner, stranger, request_id = await contexts.services.user(), await contexts.services.user(), ids.uuid7()
    thread_id = (await contexts.open(owner)).context.thread_id
    foreign = await _refused(contexts.open(stranger, thread_id=thread_id, request_id=request_id))
    missing = await _refused(contexts.open(stranger, thread_id=ids.ThreadId.new()))
    assert (foreign.code, foreign.message, foreign.details) == ("NOT_FOUND", missing.message, missing.details)
    assert foreign.details["field"] == "thread_id"
    assert (await _refused(contexts.messages(stranger, thread_id))).code == "NOT_FOUND"
    assert not (await contexts.threads(stranger)).threads
    # what was refused took neither the request id nor anything from the owner
    assert (await contexts.open(stranger, request_id=request_id)).context.thread_id != thread_id
    assert (await contexts.open(owner, thread_id=thread_id)).context.thread_id == thread_id


async def test_a_foreign_context_does_not_exist(contexts: Contexts) -> None:
    owner, stranger = await contexts.services.user(), await contexts.services.user()
    request = context_pb2.GetContextRequest(context_id=(await contexts.open(owner)).context.context_id)
    assert (await _refused(contexts.stub.GetContext(request, metadata=stranger.bearer))).code == "NOT_FOUND"
    assert (await contexts.stub.GetContext(request, metadata=owner.bearer)).context.user_id == owner.user_id


async def test_twenty_concurrent_messages_get_the_positions_one_to_twenty(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    added = await asyncio.gather(*(contexts.append(opened.context_token, f"message {number}") for number in range(20)))
    assert sorted(message.position for message in added) == list(range(1, 21))
    listed = (await contexts.messages(user, opened.context.thread_id)).messages
    assert [message.position for message in listed] == list(range(1, 21))
    assert list(listed) == sorted(added, key=lambda message: message.position)
    assert [thread.messages for thread in (await contexts.threads(user)).threads] == [20]


async def test_the_same_message_is_added_once(contexts: Contexts) -> None:
    user, request_id = await contexts.services.user(), ids.uuid7()
    opened = await contexts.open(user)
    added = await asyncio.gather(*(contexts.append(opened.context_token, "hello", request_id) for _ in range(10)))
    assert len({message.message_id for message in added}) == 1
    assert [message.content for message in (await contexts.messages(user, opened.context.thread_id)).messages] == ["hello"]
    refused = await _refused(contexts.append(opened.context_token, "something else", request_id))
    assert (refused.code, refused.details["field"]) == ("ALREADY_EXISTS", "request_id")


async def test_a_request_id_adds_to_one_of_two_threads(contexts: Contexts) -> None:
    user, request_id = await contexts.services.user(), ids.uuid7()
    opened = [await contexts.open(user) for _ in range(2)]
    calls = (contexts.append(each.context_token, "hello", request_id) for each in opened)
    answers = await asyncio.gather(*calls, return_exceptions=True)
    lost = [status.from_rpc(answer) for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert [(error.code, error.details["field"]) for error in lost] == [("ALREADY_EXISTS", "request_id")]
    # the loser's thread did not count it
    assert sorted(thread.messages for thread in (await contexts.threads(user)).threads) == [0, 1]


async def test_a_closed_context_is_neither_renewed_nor_derived_from(contexts: Contexts) -> None:
    user, request_id = await contexts.services.user(), ids.uuid7()
    opened = await contexts.open(user, request_id=request_id)
    within = contexts.within(opened.context_token)
    renewed = await contexts.stub.RenewContext(context_pb2.RenewContextRequest(), metadata=within)
    child = await contexts.derive(renewed.context_token)
    closed_at = (await contexts.stub.CloseContext(context_pb2.CloseContextRequest(), metadata=within)).closed_at
    for call in (
        contexts.stub.RenewContext(context_pb2.RenewContextRequest(), metadata=within),
        contexts.derive(opened.context_token),
        contexts.open(user, request_id=request_id),
    ):
        assert (await _refused(call)).code == "FAILED_PRECONDITION"
    # closing again keeps the first time, and the child is a context of its own
    assert (await contexts.stub.CloseContext(context_pb2.CloseContextRequest(), metadata=within)).closed_at == closed_at
    found = await contexts.stub.GetContext(context_pb2.GetContextRequest(context_id=opened.context.context_id), metadata=user.bearer)
    assert found.closed_at == closed_at
    await contexts.stub.RenewContext(context_pb2.RenewContextRequest(), metadata=contexts.within(child.context_token))


async def test_ten_generations_and_no_more(contexts: Contexts) -> None:
    opened = await contexts.open(await contexts.services.user())
    token, depths = opened.context_token, []
    for _ in range(10):
        child = await contexts.derive(token)
        token = child.context_token
        depths.append(child.context.depth)
    assert depths == list(range(1, 11))
    refused = await _refused(contexts.derive(token))
    assert (refused.code, refused.details["field"]) == ("INVALID_PAYLOAD", "depth")


async def test_the_same_child_is_derived_once_with_the_authority_of_its_parent(contexts: Contexts) -> None:
    user, request_id = await contexts.services.user(tier="early"), ids.uuid7()
    opened = await contexts.open(user, agent_context=b'{"a":1}')
    children = await asyncio.gather(*(contexts.derive(opened.context_token, request_id, b'{"b":2}') for _ in range(10)))
    assert len({child.context.context_id for child in children}) == 1
    child, parent = children[0].context, opened.context
    assert json.loads(child.agent_context) == {"a": 1, "b": 2}
    assert (child.request_id, child.parent_request_id) == (request_id, parent.request_id)
    for name in ("user_id", "tenant_id", "session_id", "thread_id", "run_id", "roles", "tier", "correlation_id"):
        assert getattr(child, name) == getattr(parent, name)
    assert (await _refused(contexts.derive(opened.context_token, request_id, b'{"b":3}'))).code == "ALREADY_EXISTS"


async def test_every_change_is_in_the_audit_trail_once(contexts: Contexts) -> None:
    user, request_id = await contexts.services.user(), ids.uuid7()
    opened = (await asyncio.gather(*(contexts.open(user, request_id=request_id) for _ in range(5))))[0]
    child = await contexts.derive(opened.context_token)
    for _ in range(2):
        await contexts.stub.CloseContext(context_pb2.CloseContextRequest(), metadata=contexts.within(opened.context_token))
    await _refused(contexts.open(user, thread_id=ids.ThreadId.new()))
    async with contexts.accounts.database() as admin:
        lines = await admin.fetch("SELECT context_id::text, actor, action, detail->>'run_id' AS run FROM context.audit ORDER BY id")
    root, below, run_id = opened.context.context_id, child.context.context_id, opened.context.run_id
    assert [tuple(line) for line in lines] == [
        (root, "dispatcher", "open", run_id), (below, "dispatcher", "derive", None), (root, "dispatcher", "close", run_id),
    ]  # fmt: skip


async def test_messages_are_paged_oldest_first(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    for number in range(5):
        await contexts.append(opened.context_token, str(number))
    pages, token = [], ""
    while True:
        answer = await contexts.messages(user, opened.context.thread_id, 2, token)
        pages.append([message.content for message in answer.messages])
        if not (token := answer.next_page_token):
            break
    assert pages == [["0", "1"], ["2", "3"], ["4"]]


async def test_a_page_of_long_messages_is_shorter_and_loses_none(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    for _ in range(10):
        await contexts.append(opened.context_token, "x" * 256 * 1024)
    first = await contexts.messages(user, opened.context.thread_id)
    rest = await contexts.messages(user, opened.context.thread_id, page=first.next_page_token)
    assert [message.position for message in (*first.messages, *rest.messages)] == list(range(1, 11))
    assert 0 < len(first.messages) < 10
    assert not rest.next_page_token


async def test_threads_are_paged_newest_first(contexts: Contexts) -> None:
    user = await contexts.services.user()
    made = [(await contexts.open(user)).context.thread_id for _ in range(5)]
    pages, token = [], ""
    while True:
        answer = await contexts.threads(user, 2, token)
        pages.append([thread.thread_id for thread in answer.threads])
        if not (token := answer.next_page_token):
            break
    assert [len(page) for page in pages] == [2, 2, 1]
    assert [thread_id for page in pages for thread_id in page] == sorted(made, reverse=True)


async def test_pages_that_cannot_be_are_refused_by_field(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    await contexts.open(user)
    of_threads = (await contexts.threads(user, 1)).next_page_token
    assert of_threads
    for call, field in (
        (contexts.messages(user, opened.context.thread_id, page=of_threads), "page_token"),
        (contexts.threads(user, page="junk"), "page_token"),
        (contexts.threads(user, -1), "page_size"),
        (contexts.messages(user, opened.context.thread_id, 201), "page_size"),
    ):
        refused = await _refused(call)
        assert (refused.code, refused.details["field"]) == ("INVALID_PAYLOAD", field)


async def test_a_context_of_which_nothing_came_holds_up_no_erasure_and_can_be_opened_again(contexts: Contexts) -> None:
    user = await contexts.services.user()
    thread_id, request_id = await thread_of(contexts, user, "hello"), ids.uuid7()
    first = await contexts.open(user, thread_id=thread_id, request_id=request_id)

    async def rest(until: timestamp_pb2.Timestamp) -> None:
        request = context_pb2.CloseContextRequest(unused=until)
        assert not (await contexts.stub.CloseContext(request, metadata=contexts.within(first.context_token))).HasField("closed_at")

    # a later token than this one was given out
    await rest(timestamp_pb2.Timestamp(seconds=first.expires_at.seconds - 1))
    assert (await answer(contexts, user, "EraseThread", thread_id=thread_id))[0] == "FAILED_PRECONDITION"
    await rest(first.expires_at)
    again = await contexts.open(user, thread_id=thread_id, request_id=request_id)
    assert again.context == first.context
    assert (await contexts.append(again.context_token, "more")).position == 2
    assert (await answer(contexts, user, "EraseThread", thread_id=thread_id))[0] == "FAILED_PRECONDITION"
    await rest(again.expires_at)
    assert (await ask(contexts, user, "EraseThread", thread_id=thread_id)).messages == 2


async def test_a_child_of_the_context_of_a_sessions_calls_is_one_calls_and_no_other_child_names_a_run(contexts: Contexts) -> None:
    user, run_id = await contexts.services.user(), ids.RunId.new()
    own, calls = await contexts.open(user), await contexts.open(user, agent_context=b'{"kind":"calls"}')
    for token, run in ((own.context_token, run_id), (calls.context_token, "")):
        refused = await _refused(contexts.derive(token, run_id=run))
        assert (refused.code, refused.details["field"]) == ("INVALID_PAYLOAD", "run_id")
    assert (await _refused(contexts.derive(calls.context_token, run_id="none"))).code == "INVALID_PAYLOAD"
    child = await contexts.derive(calls.context_token, "call", run_id=run_id)
    assert (await contexts.derive(calls.context_token, "call", run_id=run_id)).context == child.context
    assert (await _refused(contexts.derive(calls.context_token, "call", run_id=ids.RunId.new()))).code == "ALREADY_EXISTS"
    assert (child.context.run_id, child.context.depth, child.context.thread_id) == (run_id, 1, calls.context.thread_id)
    # it is a context like any other: it has children of its own run, and none of another one
    assert (await contexts.derive(child.context_token)).context.run_id == run_id
    assert (await _refused(contexts.derive(child.context_token, run_id=ids.RunId.new()))).code == "INVALID_PAYLOAD"
    entries = (await contexts.audit(user, context_id=child.context.context_id)).entries
    assert [json.loads(entry.detail)["run_id"] for entry in entries if entry.action == "derive"] == [run_id]
    await contexts.close(child.context_token)
    assert await contexts.renew(calls.context_token)
