"""Who sees which contexts: their users, page by page; administrators of the tenant, and that is told in two places."""

from __future__ import annotations

import asyncio
import json

import pytest

from chassis import channel
from netra import errors, ids
from netra.context.v1 import context_pb2
from tests.fixtures.accounts import refused
from tests.fixtures.contexts import Contexts
from tests.fixtures.users import User


async def _all(contexts: Contexts, user: User, size: int, **wanted: str | bool) -> list[list[str]]:
    """Ids of all pages."""
    pages, token = [], ""
    while True:
        answer = await contexts.page(user, page_size=size, page_token=token, **wanted)
        pages.append([each.context.context_id for each in answer.contexts])
        if not (token := answer.next_page_token):
            return pages


async def test_contexts_are_paged_newest_first_and_narrowed(contexts: Contexts) -> None:
    user, other = await contexts.services.user(), await contexts.services.user()
    opened = [await contexts.open(user) for _ in range(4)]
    child = await contexts.derive(opened[1].context_token)
    again = await contexts.open(user, thread_id=opened[2].context.thread_id)
    await contexts.open(other)
    await contexts.close(opened[0].context_token)
    roots = [each.context.context_id for each in (*opened, again)]
    made = sorted([*roots, child.context.context_id], reverse=True)
    pages = await _all(contexts, user, 4)
    assert [len(page) for page in pages] == [4, 2]
    assert [context_id for page in pages for context_id in page] == made
    of_run = await _all(contexts, user, 1, run_id=opened[1].context.run_id)
    assert of_run == [[child.context.context_id], [opened[1].context.context_id]]
    of_thread = await _all(contexts, user, 0, thread_id=opened[2].context.thread_id)
    assert of_thread == [[again.context.context_id, opened[2].context.context_id]]
    still = await contexts.page(user, open=True)
    assert opened[0].context.context_id not in {each.context.context_id for each in still.contexts}
    assert len(still.contexts) == 5
    whole = {each.context.context_id: each for each in (await contexts.page(user)).contexts}
    assert whole[child.context.context_id].context == child.context
    assert whole[opened[0].context.context_id].HasField("closed_at")


async def test_a_page_of_long_contexts_is_shorter_and_loses_none(contexts: Contexts) -> None:
    user = await contexts.services.user()
    long = json.dumps({"text": "x" * 63 * 1024}).encode()
    await asyncio.gather(*(contexts.open(user, agent_context=long) for _ in range(40)))
    pages = await _all(contexts, user, 200)
    assert [len(page) for page in pages] == [32, 8]
    found = [context_id for page in pages for context_id in page]
    assert found == sorted(set(found), reverse=True)


async def test_the_trail_is_paged_oldest_first_and_narrowed(contexts: Contexts) -> None:
    user, other = await contexts.services.user(), await contexts.services.user()
    opened, second = await contexts.open(user), await contexts.open(user)
    child = await contexts.derive(opened.context_token)
    await contexts.open(other)
    await contexts.close(opened.context_token)
    first = await contexts.audit(user, page_size=3)
    rest = await contexts.audit(user, page_size=3, page_token=first.next_page_token)
    found = [(entry.context_id, entry.action) for entry in (*first.entries, *rest.entries)]
    root = opened.context.context_id
    assert found == [(root, "open"), (second.context.context_id, "open"), (child.context.context_id, "derive"), (root, "close")]
    assert not rest.next_page_token
    assert await contexts.actions(user, root) == [("dispatcher", "open"), ("dispatcher", "close")]
    told = first.entries[0]
    assert (told.correlation_id, json.loads(told.detail)["run_id"]) == (opened.context.correlation_id, opened.context.run_id)
    assert not (await contexts.audit(other, context_id=root)).entries


async def test_pages_that_cannot_be_are_refused_by_field(contexts: Contexts) -> None:
    user = await contexts.services.user()
    await contexts.open(user)
    await contexts.open(user)
    of_contexts = (await contexts.page(user, page_size=1)).next_page_token
    assert of_contexts
    for call, field in (
        (contexts.audit(user, page_token=of_contexts), "page_token"),
        (contexts.page(user, page_token="junk"), "page_token"),
        (contexts.page(user, page_size=201), "page_size"),
        (contexts.audit(user, page_size=-1), "page_size"),
        (contexts.page(user, run_id="junk"), "run_id"),
        (contexts.audit(user, context_id="junk"), "context_id"),
    ):
        error = await refused(call)
        assert (error.code, error.details["field"]) == ("INVALID_PAYLOAD", field)


async def test_an_administrator_reads_contexts_of_the_tenant_and_both_trails_tell(contexts: Contexts) -> None:
    user, admin = await contexts.services.user(), await contexts.services.user(role="admin")
    opened = await contexts.open(user)
    context_id = opened.context.context_id
    assert (await contexts.get(admin, context_id, user.user_id)).context == opened.context
    listed = await contexts.page(admin, user_id=user.user_id, page_size=1)
    assert [each.context.context_id for each in listed.contexts] == [context_id]
    lines = (await contexts.audit(admin, user_id=user.user_id)).entries
    read = (admin.user_id, "read")
    assert [(line.actor, line.action) for line in lines] == [("dispatcher", "open"), read, read]
    # the user sees who looked, and at what
    seen = (await contexts.audit(user)).entries
    assert [(line.actor, line.context_id, json.loads(line.detail)["what"]) for line in seen[1:]] == [
        (admin.user_id, context_id, "context"), (admin.user_id, "", "contexts"), (admin.user_id, "", "audit trail"),
    ]  # fmt: skip
    told = [line for line in await contexts.accounts.audited(user.user_id) if line[1] == "read_contexts"]
    assert (
        told == [(f"service:context for user:{admin.user_id}", "read_contexts", "asked")] * 3
        or told == [(f"user:{admin.user_id}", "read_contexts", "asked")] * 3
    )
    # looking at one's own is nobody's business
    await contexts.get(user, context_id, user.user_id)
    assert len((await contexts.audit(user)).entries) == 4


async def test_who_may_not_read_others_learns_nothing_of_them(contexts: Contexts) -> None:
    user, stranger = await contexts.services.user(), await contexts.services.user()
    context_id = (await contexts.open(user)).context.context_id
    whose = (user.user_id, ids.uuid7(), "junk")
    for user_id in whose:
        for call in (
            contexts.get(stranger, context_id, user_id), contexts.page(stranger, user_id=user_id),
            contexts.audit(stranger, user_id=user_id),
        ):  # fmt: skip
            error = await refused(call)
            assert (error.code, error.details) == ("PERMISSION_DENIED", {"permission": "contexts:audit"})
    assert await contexts.actions(user) == [("dispatcher", "open")]


async def test_an_administrator_of_another_tenant_finds_nobody(contexts: Contexts) -> None:
    user, foreign = await contexts.services.user(), await contexts.accounts.foreign_admin()
    context_id = (await contexts.open(user)).context.context_id
    for user_id in (user.user_id, ids.uuid7()):
        error = await refused(contexts.get(foreign, context_id, user_id))
        assert (error.code, error.message, error.details) == ("NOT_FOUND", "There is no such context.", {})
        assert await contexts.page(foreign, user_id=user_id) == context_pb2.ListContextsResponse()
        assert await contexts.audit(foreign, user_id=user_id) == context_pb2.ListContextAuditResponse()
    assert await contexts.actions(user) == [("dispatcher", "open")]


async def test_what_cannot_be_recorded_is_not_read(contexts: Contexts) -> None:
    user, admin = await contexts.services.user(), await contexts.services.user(role="admin")
    context_id = (await contexts.open(user)).context.context_id
    async with contexts.accounts.locked():
        calls = (
            contexts.get(admin, context_id, user.user_id), contexts.page(admin, user_id=user.user_id),
            contexts.audit(admin, user_id=user.user_id),
        )  # fmt: skip
        found = await asyncio.gather(*(refused(call) for call in calls))
    assert {error.code for error in found} == {"UNAVAILABLE"}
    assert await contexts.actions(user) == [("dispatcher", "open")]


async def test_within_a_context_only_its_own_user_is_seen_and_only_while_it_is_open(contexts: Contexts) -> None:
    user, other = await contexts.services.user(role="admin"), await contexts.services.user()
    opened, foreign = await contexts.open(user), await contexts.open(other)

    async def get(context_id: str, user_id: str = "") -> context_pb2.GetContextResponse:
        request = context_pb2.GetContextRequest(context_id=context_id, user_id=user_id)
        return await contexts.stub.GetContext(request, metadata=contexts.within(opened.context_token))

    assert (await get(opened.context.context_id)).context == opened.context
    assert (await refused(get(foreign.context.context_id))).code == "NOT_FOUND"
    # a run has no more than it needs, whatever its user may
    assert (await refused(get(foreign.context.context_id, other.user_id))).code == "PERMISSION_DENIED"
    await contexts.close(opened.context_token)
    assert (await refused(get(opened.context.context_id))).code == "FAILED_PRECONDITION"
    assert (await contexts.get(user, opened.context.context_id)).HasField("closed_at")


@pytest.mark.parametrize("scope", [("contexts:audit", "contexts:read"), ("contexts:read",)])
async def test_a_key_that_is_narrower_than_its_administrator_reads_no_others(contexts: Contexts, scope: tuple[str, ...]) -> None:
    user, admin = await contexts.services.user(), await contexts.services.user(role="admin")
    await contexts.open(user)
    token = (await contexts.accounts.program(admin, *scope)).access_token
    call = contexts.stub.ListContexts(context_pb2.ListContextsRequest(user_id=user.user_id), metadata=channel.bearer(token))
    if "contexts:audit" in scope:
        assert len((await call).contexts) == 1
    else:
        error = await refused(call)
        assert isinstance(error, errors.PermissionDenied)
        assert error.details["permission"] == "contexts:audit"
