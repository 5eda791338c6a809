"""Who may do what with a thread of somebody else: by the service, by its database alone, and by the tokens it signs."""

from __future__ import annotations

import time
from typing import Any

import pytest

from chassis import identity, postgres
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from netra.context.v1 import context_pb2
from tests.fixtures.accounts import new_email, refused
from tests.fixtures.contexts import Contexts
from tests.fixtures.conversations import READ, WRITE, answer, ask, foreigner, listed, role, said, thread_of
from tests.fixtures.users import User

_OWNERS = ("DeleteThread", "RestoreThread", "EraseThread", "GrantThread", "WithdrawGrant", "ListGrants")


async def _cast(contexts: Contexts) -> tuple[dict[str, User], str]:
    """Everybody there can be around a thread, and the thread."""
    people = {name: await contexts.services.user() for name in ("owner", "writer", "reader", "left", "stranger")}
    people["outside"] = await foreigner(contexts)
    thread_id = await thread_of(contexts, people["owner"], "hello")
    for name, access in (("writer", "write"), ("reader", "read"), ("left", "write")):
        await contexts.grant(people["owner"], thread_id, people[name], access)
    await contexts.withdraw(people["owner"], thread_id, people["left"])
    return people, thread_id


async def test_everybody_may_what_they_were_granted_and_no_more(contexts: Contexts) -> None:
    people, thread_id = await _cast(contexts)
    for name, access in (("owner", context_pb2.ACCESS_OWN), ("writer", WRITE), ("reader", READ)):
        thread = (await ask(contexts, people[name], "GetThread", thread_id=thread_id)).thread
        assert (thread.access, thread.owner_id) == (access, people["owner"].user_id)
        assert (await ask(contexts, people[name], "CreateGrantToken", thread_id=thread_id)).access == access
        assert await said(contexts, people[name], thread_id) == [(1, "hello")]
    assert [await listed(contexts, people[name], "SHARED") for name in people] == [[], [thread_id], [thread_id], [], [], []]
    assert [await listed(contexts, people[name]) for name in people] == [[thread_id], [], [], [], [], []]
    # who knows of the thread is told that it is not theirs; for the others it is as if there were none
    more: dict[str, dict[str, Any]] = {
        "GrantThread": {"user_id": people["stranger"].user_id, "access": READ}, "WithdrawGrant": {"grantee_id": people["reader"].user_id},
    }  # fmt: skip
    for rpc in (*_OWNERS, "GetThread", "ListMessages", "CreateGrantToken"):
        fields = {"request_id": ids.uuid7()} if "request_id" in getattr(context_pb2, f"{rpc}Request").DESCRIPTOR.fields_by_name else {}
        fields |= more.get(rpc, {})
        if rpc in _OWNERS:
            for name in ("writer", "reader"):
                assert (await answer(contexts, people[name], rpc, thread_id=thread_id, **fields))[0] == "PERMISSION_DENIED"
        for name in ("left", "stranger", "outside"):
            foreign = await answer(contexts, people[name], rpc, thread_id=thread_id, **fields)
            assert foreign == await answer(contexts, people[name], rpc, thread_id=ids.ThreadId.new(), **fields)
            assert foreign[0] == "NOT_FOUND"


async def test_runs_are_started_by_those_who_may_write(contexts: Contexts) -> None:
    people, thread_id = await _cast(contexts)
    opened = await contexts.open(people["writer"], thread_id=thread_id)
    added = await contexts.append(opened.context_token, "from the writer")
    assert (added.position, added.user_id) == (2, people["writer"].user_id)
    assert await said(contexts, people["owner"], thread_id) == [(1, "hello"), (2, "from the writer")]
    assert (await refused(contexts.open(people["reader"], thread_id=thread_id))).code == "PERMISSION_DENIED"
    missing = await refused(contexts.open(people["stranger"], thread_id=ids.ThreadId.new()))
    for name in ("left", "stranger", "outside"):
        foreign = await refused(contexts.open(people[name], thread_id=thread_id))
        assert (foreign.code, foreign.message) == ("NOT_FOUND", missing.message)
    # the context of a grantee is theirs: the owner of the thread does not see it
    assert (await refused(contexts.get(people["owner"], opened.context.context_id))).code == "NOT_FOUND"
    # once access is lowered or withdrawn, what still goes on is refused from the next call on
    await contexts.grant(people["owner"], thread_id, people["writer"], "read")
    assert (await refused(contexts.append(opened.context_token, "more"))).code == "PERMISSION_DENIED"
    await contexts.withdraw(people["owner"], thread_id, people["writer"])
    assert (await refused(contexts.append(opened.context_token, "more"))).code == "NOT_FOUND"
    assert (await refused(contexts.messages(people["writer"], thread_id))).code == "NOT_FOUND"
    assert len(await said(contexts, people["owner"], thread_id)) == 2


async def test_a_grant_is_given_changed_withdrawn_and_given_again(contexts: Contexts) -> None:
    owner, friend, other = [await contexts.services.user() for _ in range(3)]
    thread_id, request_id = await thread_of(contexts, owner), ids.uuid7()
    grant = {"thread_id": thread_id, "email": friend.email.upper(), "access": READ, "request_id": request_id}
    first = (await ask(contexts, owner, "GrantThread", **grant)).grant
    assert (first.grantee_id, first.access, first.HasField("withdrawn_at")) == (friend.user_id, READ, False)
    raised = (await ask(contexts, owner, "GrantThread", thread_id=thread_id, user_id=friend.user_id, access=WRITE)).grant
    assert (raised.access, raised.created_at) == (WRITE, first.created_at)
    # the first request, once more: nothing changes; with another question it is refused
    assert (await ask(contexts, owner, "GrantThread", **grant)).grant == raised
    assert (await answer(contexts, owner, "GrantThread", **grant | {"access": WRITE}))[0] == "ALREADY_EXISTS"
    await contexts.grant(owner, thread_id, other, "read")
    page = await ask(contexts, owner, "ListGrants", thread_id=thread_id, page_size=1)
    rest = await ask(contexts, owner, "ListGrants", thread_id=thread_id, page_size=1, page_token=page.next_page_token)
    assert ([each.grantee_id for each in (*page.grants, *rest.grants)], rest.next_page_token) == ([friend.user_id, other.user_id], "")
    withdrawn = (await ask(contexts, owner, "WithdrawGrant", thread_id=thread_id, grantee_id=friend.user_id)).grant
    assert (await ask(contexts, owner, "WithdrawGrant", thread_id=thread_id, grantee_id=friend.user_id)).grant == withdrawn
    assert withdrawn.HasField("withdrawn_at")
    assert [each.grantee_id for each in (await ask(contexts, owner, "ListGrants", thread_id=thread_id)).grants] == [other.user_id]
    assert len((await ask(contexts, owner, "ListGrants", thread_id=thread_id, withdrawn=True)).grants) == 2
    assert await listed(contexts, friend, "SHARED") == []
    again = (await ask(contexts, owner, "GrantThread", thread_id=thread_id, user_id=friend.user_id, access=READ)).grant
    assert again.created_at.ToDatetime() > withdrawn.withdrawn_at.ToDatetime()
    assert (again.access, again.HasField("withdrawn_at")) == (READ, False)
    assert await listed(contexts, friend, "SHARED") == [thread_id]
    trail = [entry.action for entry in (await contexts.audit(owner, thread_id=thread_id)).entries]
    assert [action for action in trail if action not in ("open", "close")] == ["grant", "grant", "grant", "withdraw", "grant"]
    never = await answer(contexts, owner, "WithdrawGrant", thread_id=thread_id, grantee_id=ids.UserId.new())
    assert (never[0], never[2]["field"]) == ("NOT_FOUND", "grantee_id")


async def test_whom_a_thread_cannot_be_granted_to(contexts: Contexts) -> None:
    owner, disabled, outside = await contexts.services.user(), await contexts.services.user(), await foreigner(contexts)
    await contexts.accounts.stub.DisableUser(
        auth_pb2.DisableUserRequest(user_id=disabled.user_id), metadata=await contexts.accounts.admin()
    )
    thread_id = await thread_of(contexts, owner)

    async def of(**fields: Any) -> tuple[str, str, dict[str, str]]:
        return await answer(contexts, owner, "GrantThread", **{"thread_id": thread_id, "access": READ} | fields)

    # one answer for all who are not there for this tenant
    unknown = await of(user_id=ids.UserId.new())
    assert (unknown[0], unknown[2]["field"]) == ("NOT_FOUND", "user_id")
    assert [await of(user_id=each.user_id) for each in (disabled, outside)] == [unknown, unknown]
    unknown = await of(email=new_email())
    assert (unknown[0], unknown[2]["field"]) == ("NOT_FOUND", "email")
    assert [await of(email=each.email) for each in (disabled, outside)] == [unknown, unknown]
    friend = await contexts.services.user()
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"user_id": owner.user_id}, "user_id"), ({"email": owner.email}, "email"), ({}, "user_id"), ({"user_id": "x"}, "user_id"),
        ({"email": "no address"}, "email"), ({"user_id": friend.user_id, "access": context_pb2.ACCESS_OWN}, "access"),
        ({"user_id": friend.user_id, "access": 0}, "access"), ({"user_id": friend.user_id, "request_id": ""}, "request_id"),
    )  # fmt: skip
    for fields, field in wrong:
        found = await of(**fields)
        assert (found[0], found[2]["field"]) == ("INVALID_PAYLOAD", field), fields
    found = await answer(contexts, owner, "ListGrants", thread_id=thread_id, page_token="Zzp4IHk")
    assert (found[0], found[2]["field"]) == ("INVALID_PAYLOAD", "page_token")
    assert not (await ask(contexts, owner, "ListGrants", thread_id=thread_id, withdrawn=True)).grants


async def test_a_grant_token_says_what_its_user_may_and_nobody_else_can_use_it(contexts: Contexts) -> None:
    owner, reader = await contexts.services.user(), await contexts.services.user()
    thread_id = await thread_of(contexts, owner)
    await contexts.grant(owner, thread_id, reader, "read")
    verifier = identity.Verifier(contexts.services.trusts[-1])
    principals = {user.user_id: await verifier.user(user.token) for user in (owner, reader)}
    tokens = {}
    for user, access in ((owner, "own"), (reader, "read")):
        signed = await ask(contexts, user, "CreateGrantToken", thread_id=thread_id)
        grant = await verifier.grant(signed.grant_token, principals[user.user_id])
        assert (grant.resource, grant.access) == (thread_id, access)
        assert 100 < signed.expires_at.seconds - time.time() <= 121
        assert abs(grant.expires_at - signed.expires_at.seconds) <= 1
        tokens[user.user_id] = signed.grant_token
    with pytest.raises(errors.Unauthenticated):
        await verifier.grant(tokens[owner.user_id], principals[reader.user_id])
    # it is a token for one thing only
    error = await refused(contexts.stub.GetThread(context_pb2.GetThreadRequest(thread_id=thread_id), metadata=User("", "", "", tokens[
        owner.user_id], "").bearer))  # fmt: skip
    assert error.code == "UNAUTHENTICATED"


_ROWS = ("threads", "messages", "contexts", "artifacts", "grants", "changes", "audit")


async def test_the_wall_alone_keeps_users_apart(contexts: Contexts) -> None:
    """No statement of ours is asked here: the service's own role goes to the tables directly."""
    people, thread_id = await _cast(contexts)
    owner, ended = people["owner"], await contexts.open(people["owner"], thread_id=thread_id)
    await contexts.close(ended.context_token)
    own = await thread_of(contexts, people["stranger"], "of my own")

    async def seen(user: User) -> dict[str, int]:
        async with role(contexts, user) as wall:
            query = "SELECT count(*) FROM context.{} WHERE user_id = $1"
            found = {table: await wall.value(query.format(table), owner.user_id) for table in _ROWS if table != "grants"}
            return found | {"grants": await wall.value("SELECT count(*) FROM context.grants WHERE owner_id = $1", owner.user_id)}

    nothing = dict.fromkeys(_ROWS, 0)
    assert [await seen(people[name]) for name in ("left", "stranger", "outside")] == [nothing] * 3
    for name in ("writer", "reader"):
        assert await seen(people[name]) == nothing | {"threads": 1, "messages": 1, "grants": 1}

    message = (
        "INSERT INTO context.messages (thread_id, position, message_id, user_id, request_id, role, content, run_id, owner_id)"
        " VALUES ($1, 99, gen_random_uuid(), $2, gen_random_uuid()::text, 'user', 'not mine', gen_random_uuid(), $3)"
    )
    opened = (
        "INSERT INTO context.contexts (context_id, user_id, tenant_id, session_id, thread_id, run_id, request_id, roles, tier, created_at,"
        " depth, correlation_id, agent_context, audit_metadata, asked, owner_id) VALUES (gen_random_uuid(), $2, gen_random_uuid(),"
        " gen_random_uuid(), $1, gen_random_uuid(), gen_random_uuid()::text, '{}', 'free', now(), 0, '', '', '', '', $3)"
    )
    artifact = (
        "INSERT INTO context.artifacts (artifact_id, user_id, request_id, state, name, media_type, reserved, thread_id, owner_id)"
        " VALUES (gen_random_uuid(), $2, gen_random_uuid()::text, 'uploading', 'x', 'text/csv', 0, $1, $3)"
    )
    granted = (
        "INSERT INTO context.grants (thread_id, owner_id, tenant_id, grantee_id, access)"
        " VALUES ($1, $3, gen_random_uuid(), gen_random_uuid(), 'write')"
    )
    for name in ("reader", "left", "stranger", "outside"):
        user = people[name]
        for statement in (message, opened, artifact):
            # in the owner's name, as the owner of the thread, as somebody to whom it belongs
            for user_id, owner_id in ((user.user_id, owner.user_id), (user.user_id, user.user_id), (owner.user_id, owner.user_id)):
                await _stopped(contexts, user, statement, thread_id, user_id, owner_id)
    for name in ("writer", "reader", "left", "stranger"):
        user = people[name]
        for owner_id in (owner.user_id, user.user_id):
            # of the three parameters the second has no use here but to have a type
            statement = f"{granted.replace('$1', '$1::uuid')} RETURNING $2::uuid"
            await _stopped(contexts, user, statement, thread_id, user.user_id, owner_id)
        for change in (
            "UPDATE context.threads SET deleted_at = now() WHERE thread_id = $1",
            "UPDATE context.threads SET erased_at = now(), deleted_at = now() WHERE thread_id = $1",
            # who may write to a thread counts what they wrote, and nothing else
            "UPDATE context.threads SET messages = 0 WHERE thread_id = $1",
            "UPDATE context.threads SET messages = messages + 1 WHERE thread_id = $1",
            "UPDATE context.threads SET messages = messages + 1, updated_at = now() WHERE thread_id = $1",
            "UPDATE context.threads SET updated_at = 'infinity' WHERE thread_id = $1",
            "UPDATE context.messages SET content = '', erased_at = now() WHERE thread_id = $1",
            "UPDATE context.grants SET access = 'write', withdrawn_at = NULL WHERE thread_id = $1",
            "DELETE FROM context.messages WHERE thread_id = $1",
            "DELETE FROM context.threads WHERE thread_id = $1",
        ):
            await _stopped(contexts, user, change, thread_id)
    # what is one's own is not moved into a thread of somebody else, nor is a message rewritten
    for change in (
        "UPDATE context.artifacts SET thread_id = $1, owner_id = $2 WHERE user_id = $3",
        "UPDATE context.messages SET thread_id = $1, owner_id = $2 WHERE user_id = $3",
        "UPDATE context.messages SET content = $1::text || $2::text WHERE user_id = $3",
    ):
        await _stopped(contexts, people["stranger"], change, thread_id, owner.user_id, people["stranger"].user_id)
    # nor does the owner miscount
    with pytest.raises(errors.PermissionDenied):
        async with role(contexts, owner) as wall:
            await wall.execute("UPDATE context.threads SET messages = messages + 1, updated_at = now() WHERE thread_id = $1", thread_id)
    assert await said(contexts, owner, thread_id) == [(1, "hello")]
    assert (await ask(contexts, owner, "GetThread", thread_id=thread_id)).thread.messages == 1
    assert await said(contexts, people["stranger"], own) == [(1, "of my own")]
    # the statements are good: who was granted to write gets through with them
    async with role(contexts, people["writer"]) as wall:
        for statement in (message, opened, artifact):
            assert await wall.execute(statement, thread_id, people["writer"].user_id, owner.user_id) == "INSERT 0 1"


async def _stopped(contexts: Contexts, user: User, statement: str, *arguments: object) -> None:
    """That a statement is refused, or finds no row."""
    try:
        async with role(contexts, user) as wall:
            assert (await wall.execute(statement, *arguments)).endswith(" 0")
    except (errors.PermissionDenied, postgres.Unfit):
        pass
