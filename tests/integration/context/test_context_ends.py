"""Contexts end: closed with their session or user, when nobody renews them, and removed long after; closed is closed for everybody."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from netra import ids
from netra.auth.v1 import auth_pb2
from netra.context.v1 import context_pb2
from services.context import wiring
from services.context.expiry import Expiry, Withdrawal
from services.context.settings import ContextSettings
from tests.fixtures import forge
from tests.fixtures.accounts import refused
from tests.fixtures.contexts import Contexts, serving
from tests.fixtures.storage import Services

_KEEP, _KEEP_TRAIL = timedelta(days=30), timedelta(days=365)


def _deadline(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


async def _closed(contexts: Contexts, *answers: context_pb2.OpenContextResponse) -> list[bool]:
    query = "SELECT closed_at IS NOT NULL FROM context.contexts WHERE context_id = $1"
    return [bool(await contexts.accounts.value(query, answer.context.context_id)) for answer in answers]


async def test_a_closed_context_writes_nothing_and_reads_nothing(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened, beside = await contexts.open(user), await contexts.open(user)
    await contexts.append(opened.context_token, "while it was open")
    within = contexts.within(opened.context_token)
    artifact = context_pb2.ArtifactHeader(request_id=ids.uuid7(), name="a.txt", media_type="text/plain", size=1)

    def put() -> Any:
        parts = iter([context_pb2.PutArtifactRequest(header=artifact), context_pb2.PutArtifactRequest(data=b"x")])
        return contexts.stub.PutArtifact(parts, metadata=within)

    kept = (await put()).artifact.artifact_id
    await contexts.close(opened.context_token)
    artifact.request_id = ids.uuid7()

    async def fetch() -> None:
        async for _ in contexts.stub.GetArtifact(context_pb2.GetArtifactRequest(artifact_id=kept), metadata=within):
            pass

    listing = context_pb2.ListMessagesRequest(thread_id=opened.context.thread_id)
    for name, call in {
        "renew": contexts.renew(opened.context_token), "derive": contexts.derive(opened.context_token),
        "get": contexts.stub.GetContext(context_pb2.GetContextRequest(context_id=beside.context.context_id), metadata=within),
        "append": contexts.append(opened.context_token, "afterwards"), "list": contexts.stub.ListMessages(listing, metadata=within),
        "put": put(), "fetch": fetch(),
    }.items():  # fmt: skip
        assert (await refused(call)).code == "FAILED_PRECONDITION", name
    assert [message.content for message in (await contexts.messages(user, opened.context.thread_id)).messages] == ["while it was open"]
    await contexts.append(beside.context_token, "another one goes on")


async def test_a_withdrawn_user_has_no_open_context(contexts: Contexts) -> None:
    user, other = await contexts.services.user(), await contexts.services.user()
    opened, of_other = await contexts.open(user), await contexts.open(other)
    child = await contexts.derive(opened.context_token)
    await contexts.disable(user)
    await contexts.until_closed(opened.context.context_id, child.context.context_id)
    for token in (opened.context_token, child.context_token):
        assert (await refused(contexts.renew(token))).code == "FAILED_PRECONDITION"
        assert (await refused(contexts.derive(token))).code == "FAILED_PRECONDITION"
    assert await _closed(contexts, of_other) == [False]
    query = "SELECT array_agg(actor || ' ' || action ORDER BY id) FROM context.audit WHERE context_id = $1"
    assert await contexts.accounts.value(query, opened.context.context_id) == ["dispatcher open", "context revoke"]
    # whoever ends the run now closes what is closed, and that is no error
    await contexts.close(opened.context_token)


async def test_a_logout_leaves_contexts_open_and_a_theft_ends_those_of_its_session(contexts: Contexts) -> None:
    user = await contexts.services.user()
    thief, again = await contexts.login(user), await contexts.login(user)
    opened, stolen, kept = await contexts.open(user), await contexts.open(thief), await contexts.open(again)
    await contexts.accounts.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)
    # a refresh token that comes twice, after its successor was used, ends its session for reasons of security
    second = await contexts.accounts.refresh(thief.refresh_token)
    await contexts.accounts.refresh(second.refresh_token)
    await contexts.accounts.later(user.user_id, 60)
    await refused(contexts.accounts.refresh(thief.refresh_token))
    await contexts.until_closed(stolen.context.context_id)
    assert await _closed(contexts, opened, kept) == [False, False]
    assert (await contexts.renew(opened.context_token)).context_token


async def test_what_was_withdrawn_while_nobody_ran_is_closed_at_the_start(contexts: Contexts, services: Services) -> None:
    user = await services.user()
    opened = await contexts.open(user)
    async with wiring.build(ContextSettings(**services.settings("context"))) as beside:
        services.ports["beside"] = beside.port
        await contexts.disable(user)
        await contexts.until_closed(opened.context.context_id)
    # as if nobody had been there: the next process is told again
    async with contexts.accounts.database() as admin:
        await admin.execute("UPDATE context.contexts SET closed_at = NULL")
    async with wiring.build(ContextSettings(**services.settings("context"))) as later:
        services.ports["context"] = later.port
        await serving(services)
        await contexts.until_closed(opened.context.context_id)


async def test_a_context_that_was_being_opened_when_its_user_was_withdrawn_is_closed(contexts: Contexts) -> None:
    user = await contexts.services.user()
    async with asyncio.TaskGroup() as group:
        async with contexts.accounts.locked("LOCK TABLE context.threads IN ACCESS EXCLUSIVE MODE"):
            opening = group.create_task(refused(contexts.open(user)))
            await contexts.accounts.until_waiting(1, "netra_context")
            await contexts.disable(user)
            await contexts.until_withdrawn(user)
    assert opening.result().code == "UNAUTHENTICATED"
    assert await contexts.accounts.value("SELECT array_agg(closed_at IS NOT NULL) FROM context.contexts") == [True]


async def test_a_context_opened_after_its_user_was_withdrawn_by_a_token_from_before_is_closed(contexts: Contexts) -> None:
    user = await contexts.services.user()
    late = await contexts.open(user)
    async with contexts.accounts.database() as admin:
        await admin.execute("UPDATE context.contexts SET created_at = now() + interval '1 hour'")
    async with contexts.system() as system:
        # a session that was made later is another one
        assert await system.withdraw([], [Withdrawal.of(user.user_id, datetime.now(UTC) - timedelta(days=1))]) == 0
        assert await system.withdraw([], [Withdrawal.of(ids.uuid7(), datetime.now(UTC))]) == 0
        assert await system.withdraw([], [Withdrawal.of(user.user_id, datetime.now(UTC))]) == 1
    assert await _closed(contexts, late) == [True]


async def test_what_nobody_renews_is_closed_and_what_is_renewed_stays(contexts: Contexts) -> None:
    user = await contexts.services.user()
    left, renewed, fresh = [await contexts.open(user) for _ in range(3)]
    async with contexts.accounts.database() as admin:
        # one whose token ended before it was made only rests
        made = "created_at = now() - interval '3 hours'"
        query = f"UPDATE context.contexts SET token_until = now() - $2::interval, {made} WHERE context_id = $1"  # noqa: S608 - a constant
        for answer, ago in ((left, 61), (renewed, 61), (fresh, 50)):
            await admin.execute(query, answer.context.context_id, timedelta(seconds=ago))
    await contexts.renew(renewed.context_token)
    async with contexts.system() as system:
        await Expiry(system, _KEEP, _KEEP_TRAIL).sweep()
    assert await _closed(contexts, left, renewed, fresh) == [True, False, False]
    assert await contexts.actions(user, left.context.context_id) == [("dispatcher", "open"), ("context", "expire")]
    assert (await refused(contexts.renew(left.context_token))).code == "FAILED_PRECONDITION"


async def test_more_than_fit_into_one_step_are_closed_by_sweepers_side_by_side(contexts: Contexts) -> None:
    user = await contexts.services.user()
    one = (await contexts.open(user)).context.context_id
    async with contexts.accounts.database() as admin:
        columns = (
            "user_id, tenant_id, session_id, thread_id, owner_id, run_id, roles, tier, created_at, depth, correlation_id, agent_context,"
            " audit_metadata, asked"
        )
        await admin.execute("UPDATE context.contexts SET created_at = now() - interval '3 hours'")
        await admin.execute(
            f"INSERT INTO context.contexts (context_id, request_id, token_until, {columns})"  # noqa: S608 - constants
            f" SELECT gen_random_uuid(), 'r' || n, now() - interval '1 hour', {columns}"
            " FROM context.contexts, generate_series(1, 1200) AS n WHERE context_id = $1",
            one,
        )
    async with contexts.system() as system:
        await asyncio.gather(*(Expiry(system, _KEEP, _KEEP_TRAIL).sweep() for _ in range(2)))
    counted = "SELECT count(*) FROM context.audit WHERE action = 'expire'"
    assert await contexts.accounts.value(counted) == 1200
    assert await contexts.accounts.value("SELECT count(*) FROM context.contexts WHERE closed_at IS NULL") == 1


async def test_closed_contexts_are_removed_after_their_days_and_their_trail_stays(contexts: Contexts) -> None:
    user, request_id = await contexts.services.user(), ids.uuid7()
    old, recent, still = await contexts.open(user, request_id=request_id), await contexts.open(user), await contexts.open(user)
    for answer in (old, recent):
        await contexts.close(answer.context_token)
    async with contexts.accounts.database() as admin:
        query = "UPDATE context.contexts SET closed_at = now() - $2::interval WHERE context_id = $1"
        await admin.execute(query, old.context.context_id, timedelta(days=30, minutes=1))
        await admin.execute(query, recent.context.context_id, timedelta(days=29))
    async with contexts.system() as system:
        await Expiry(system, _KEEP, _KEEP_TRAIL).sweep()
    left = {each.context.context_id for each in (await contexts.page(user)).contexts}
    assert left == {recent.context.context_id, still.context.context_id}
    assert (await refused(contexts.get(user, old.context.context_id))).code == "NOT_FOUND"
    assert await contexts.actions(user, old.context.context_id) == [("dispatcher", "open"), ("dispatcher", "close")]
    # nobody remembers the request any more
    assert (await contexts.open(user, request_id=request_id)).context.context_id != old.context.context_id


async def test_lines_of_the_trail_are_removed_after_their_days_and_no_role_removes_young_ones(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    old = (
        "INSERT INTO context.audit (user_id, at, actor, action, correlation_id, detail)"
        " SELECT $1, now() - $2::interval, 'x', 'read', '', '{}' FROM generate_series(1, $3::int)"
    )
    async with contexts.accounts.database() as admin:
        # as if they had been there before all others
        await admin.execute("TRUNCATE context.audit RESTART IDENTITY")
        await admin.execute(old, user.user_id, timedelta(days=366), 1200)
        await admin.execute(old, user.user_id, timedelta(days=29), 1)
    await contexts.close(opened.context_token)
    async with contexts.system() as system:
        await Expiry(system, _KEEP, _KEEP_TRAIL).sweep()
        assert await contexts.actions(user) == [("x", "read"), ("dispatcher", "close")]
        # whatever is set: what is younger than 30 days stays
        await Expiry(system, _KEEP, timedelta(0)).sweep()
    assert await contexts.actions(user) == [("x", "read"), ("dispatcher", "close")]


async def test_the_trail_of_a_thread_tells_of_its_contexts(contexts: Contexts) -> None:
    user = await contexts.services.user()
    opened, left = await contexts.open(user), await contexts.open(user)
    child = await contexts.derive(opened.context_token)
    for each in (child, opened):
        await contexts.close(each.context_token)
    async with contexts.accounts.database() as admin:
        ago = "created_at = now() - interval '2 hours', token_until = now() - interval '1 hour'"
        await admin.execute(f"UPDATE context.contexts SET {ago} WHERE context_id = $1", left.context.context_id)  # noqa: S608 - a constant
    async with contexts.system() as system:
        await Expiry(system, _KEEP, _KEEP_TRAIL).sweep()
    told = []
    for each in (opened, left):
        entries = (await contexts.audit(user, thread_id=each.context.thread_id)).entries
        assert {entry.thread_id for entry in entries} == {each.context.thread_id}
        told.append([entry.action for entry in entries])
    assert told == [["open", "derive", "close", "close"], ["open", "expire"]]


@pytest.mark.parametrize("seconds", [0, 5, 7200])
async def test_a_token_ends_within_the_hour_and_a_minute_after_the_deadline(contexts: Contexts, seconds: int) -> None:
    user = await contexts.services.user()
    deadline = _deadline(seconds) if seconds else None
    opened = await contexts.open(user, deadline=deadline)
    tokens = {
        opened.context.context_id: [opened.context_token, (await contexts.renew(opened.context_token)).context_token],
        (child := await contexts.derive(opened.context_token)).context.context_id: [child.context_token],
    }
    for context_id, signed in tokens.items():
        ends = []
        for claims in map(forge.claims_of, signed):
            assert 0 < claims["exp"] - claims["iat"] <= 3600
            assert deadline is None or claims["exp"] <= deadline.timestamp() + 60
            assert seconds != 5 or claims["exp"] > deadline.timestamp() + 58  # type: ignore[union-attr]
            ends.append(claims["exp"])
        noted = await contexts.accounts.value("SELECT token_until FROM context.contexts WHERE context_id = $1", context_id)
        assert noted.timestamp() == max(ends)
    assert opened.expires_at.seconds == forge.claims_of(opened.context_token)["exp"]


async def test_a_parent_that_is_closed_while_its_child_is_being_stored_has_none(contexts: Contexts) -> None:
    opened = await contexts.open(await contexts.services.user())
    async with asyncio.TaskGroup() as group:
        async with contexts.accounts.locked("LOCK TABLE context.audit IN SHARE MODE"), contexts.accounts.database() as admin:
            deriving = group.create_task(refused(contexts.derive(opened.context_token)))
            await contexts.accounts.until_waiting(1, "netra_context")
            await admin.execute("UPDATE context.contexts SET closed_at = now()")
    assert deriving.result().code == "FAILED_PRECONDITION"
    assert await contexts.accounts.value("SELECT count(*) FROM context.contexts") == 1


async def test_what_is_granted_for_writing_is_a_place_for_contexts_of_others(contexts: Contexts) -> None:
    owner, writer, reader, stranger = [await contexts.services.user() for _ in range(4)]
    first = await contexts.open(owner)
    thread_id = first.context.thread_id
    await contexts.grant(owner, thread_id, writer, "write")
    await contexts.grant(owner, thread_id, reader, "read")
    opened = await contexts.open(writer, thread_id=thread_id)
    child = await contexts.derive(opened.context_token)
    assert (opened.context.user_id, opened.context.thread_id) == (writer.user_id, thread_id)
    query = "SELECT array_agg(DISTINCT user_id || ' ' || owner_id) FROM context.contexts WHERE context_id = ANY($1::uuid[])"
    made = await contexts.accounts.value(query, [opened.context.context_id, child.context.context_id])
    assert made == [f"{writer.user_id} {owner.user_id}"]
    error = await refused(contexts.open(reader, thread_id=thread_id))
    assert (error.code, error.details["field"]) == ("PERMISSION_DENIED", "thread_id")
    for thread in (thread_id, ids.uuid7()):
        error = await refused(contexts.open(stranger, thread_id=thread))
        assert (error.code, error.message) == ("NOT_FOUND", "There is no such thread.")
    # a context is seen by its own user only, whosever the thread is
    assert (await refused(contexts.get(owner, opened.context.context_id))).code == "NOT_FOUND"
    assert [each.context.context_id for each in (await contexts.page(owner)).contexts] == [first.context.context_id]
    await contexts.withdraw(owner, thread_id, writer)
    assert (await refused(contexts.open(writer, thread_id=thread_id))).code == "NOT_FOUND"
    assert (await refused(contexts.derive(opened.context_token))).code == "NOT_FOUND"


async def test_nothing_new_begins_in_a_deleted_thread_and_what_goes_on_may_end(contexts: Contexts) -> None:
    user, request_id = await contexts.services.user(), ids.uuid7()
    opened = await contexts.open(user)
    wanted = {"request_id": request_id, "thread_id": opened.context.thread_id}
    before = await contexts.open(user, **wanted)
    request = context_pb2.DeleteThreadRequest(request_id=ids.uuid7(), thread_id=opened.context.thread_id)
    await contexts.stub.DeleteThread(request, metadata=user.bearer)
    assert (await refused(contexts.open(user, thread_id=opened.context.thread_id))).code == "NOT_FOUND"
    # what was asked before is answered as before
    assert (await contexts.open(user, **wanted)).context == before.context
    await contexts.derive(opened.context_token)
    await contexts.close(opened.context_token)
