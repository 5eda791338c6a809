"""What ends while somebody writes: a grant, a context, a thread. Either the writing came first, or it is refused."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import pytest

from chassis import postgres
from netra import errors, ids
from netra.context.v1 import context_pb2
from services.context import drafts, threads
from services.context.settings import ContextSettings
from services.context.store_contexts import ContextStore
from services.context.store_threads import ThreadStore
from tests.fixtures.accounts import refused
from tests.fixtures.contexts import Contexts
from tests.fixtures.conversations import ask, role, said, thread_of
from tests.fixtures.users import User
from tests.integration.context.conftest import header_of, until

_LOCK, _INSERT = "SELECT t.thread_id", "INSERT INTO context.messages"


class _Between(postgres.DatabaseManager):
    """The service's pool; after a statement that begins like this something else happens, once, in the middle of the transaction."""

    after = ""
    then: Callable[[], Awaitable[Any]] | None = None

    @contextlib.asynccontextmanager
    async def transaction(self, *arguments: Any, **more: Any) -> AsyncIterator[postgres.Transaction]:
        """A transaction that stops there."""
        async with super().transaction(*arguments, **more) as transaction:
            for name in ("execute", "row"):
                setattr(transaction, name, self._stopping(getattr(transaction, name)))
            yield transaction

    def _stopping(self, run: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def stopping(query: str, *arguments: object) -> Any:
            found = await run(query, *arguments)
            if self.then is not None and query.startswith(self.after):
                then, self.then = self.then, None
                await then()
            return found

        return stopping


@contextlib.asynccontextmanager
async def _between(contexts: Contexts) -> AsyncIterator[_Between]:
    settings = ContextSettings(**contexts.services.settings("context"))
    pool = await postgres.open_pool(settings.postgres_dsn("netra_context", "postgres"), "test", size=1, options=postgres.BY_KEY)
    database = _Between(pool._pool)
    try:
        yield database
    finally:
        await database.close()


async def _append(database: _Between, user: User, context_id: str, after: str, then: Callable[[], Awaitable[Any]]) -> threads.Message:
    """A message of a user's run; after a statement that begins like this something else happens."""
    stored = await ContextStore(database).by_id(ids.UserId(user.user_id), ids.ContextId(context_id))
    assert stored is not None
    database.after, database.then = after, then
    return await ThreadStore(database).append(stored.context, drafts.Draft(ids.RequestId.new(), "user", "meanwhile"))


async def _waits(contexts: Contexts, many: int, *ended: asyncio.Task[Any]) -> None:
    """Returns when so many statements wait for a lock, or one of these has ended without a wait."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

    async def found() -> bool:
        return any(task.done() for task in ended) or bool(await contexts.accounts.value(query) >= many)

    await until(found)


async def _shared(contexts: Contexts) -> tuple[User, User, str, str]:
    """An owner, one who may write to a thread of theirs, the thread, and a context of the writer in it."""
    owner, writer = await contexts.services.user(), await contexts.services.user()
    thread_id = await thread_of(contexts, owner, "hello")
    await contexts.grant(owner, thread_id, writer, "write")
    return owner, writer, thread_id, (await contexts.open(writer, thread_id=thread_id)).context.context_id


async def _goes_on(contexts: Contexts, owner: User, thread_id: str, *contents: str) -> None:
    """That the thread has these messages, counted, and takes more."""
    opened = await contexts.open(owner, thread_id=thread_id)
    await contexts.append(opened.context_token, "next")
    assert await said(contexts, owner, thread_id) == list(enumerate((*contents, "next"), 1))
    assert (await ask(contexts, owner, "GetThread", thread_id=thread_id)).thread.messages == len(contents) + 1


@pytest.mark.parametrize("after", [_LOCK, _INSERT])
@pytest.mark.parametrize("how", ["withdraw", "lower", "delete"])
async def test_a_message_that_was_begun_comes_before_the_end_of_its_grant(contexts: Contexts, after: str, how: str) -> None:
    owner, writer, thread_id, context_id = await _shared(contexts)
    calls: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
        "withdraw": lambda: contexts.withdraw(owner, thread_id, writer),
        "lower": lambda: contexts.grant(owner, thread_id, writer, "read"),
        "delete": lambda: ask(contexts, owner, "DeleteThread", thread_id=thread_id),
    }

    async def end() -> None:
        await _waits(contexts, 1, group.create_task(calls[how]()))

    async with _between(contexts) as database, asyncio.TaskGroup() as group:
        assert (await _append(database, writer, context_id, after, end)).position == 2
    if how == "delete":
        await ask(contexts, owner, "RestoreThread", thread_id=thread_id)
    await _goes_on(contexts, owner, thread_id, "hello", "meanwhile")


@pytest.mark.parametrize(("after", "refusal"), [(_LOCK, errors.PermissionDenied), (_INSERT, errors.NotFound)])
async def test_a_message_of_somebody_who_leaves_meanwhile_is_not_there(
    contexts: Contexts, after: str, refusal: type[errors.NetraError]
) -> None:
    owner, writer, thread_id, context_id = await _shared(contexts)

    async def leave() -> None:
        # what an erasure of everything of theirs does
        async with role(contexts, writer) as wall:
            assert await wall.execute("DELETE FROM context.grants WHERE grantee_id = $1", writer.user_id) == "DELETE 1"

    async with _between(contexts) as database:
        with pytest.raises(refusal):
            await _append(database, writer, context_id, after, leave)
    await _goes_on(contexts, owner, thread_id, "hello")


async def test_contexts_are_opened_while_somebody_writes_to_the_thread(contexts: Contexts) -> None:
    owner, writer, thread_id, context_id = await _shared(contexts)

    async def open_one() -> None:
        opening = group.create_task(contexts.open(owner, thread_id=thread_id))
        await _waits(contexts, 1, opening)
        assert opening.done()

    async with _between(contexts) as database, asyncio.TaskGroup() as group:
        await _append(database, writer, context_id, _INSERT, open_one)


_THREAD = "SELECT thread_id FROM context.threads WHERE thread_id = $1 FOR UPDATE"


@pytest.mark.parametrize("what", ["append", "derive"])
async def test_who_waits_while_their_context_is_closed_does_not_write(contexts: Contexts, what: str) -> None:
    user = await contexts.services.user()
    opened = await contexts.open(user)
    thread_id, token = opened.context.thread_id, opened.context_token
    async with asyncio.TaskGroup() as group, contexts.accounts.locked(_THREAD, thread_id):
        call: Awaitable[Any] = contexts.append(token, "late") if what == "append" else contexts.derive(token)
        writing = group.create_task(refused(call))
        await _waits(contexts, 1, writing)
        await contexts.close(token)
    assert writing.result().code == "FAILED_PRECONDITION"
    assert await said(contexts, user, thread_id) == []
    assert len((await contexts.page(user)).contexts) == 1


async def test_a_file_is_shown_before_its_context_is_closed_or_not_at_all(contexts: Contexts) -> None:
    user, on = await contexts.services.user(), asyncio.Event()
    opened = await contexts.open(user)

    async def parts() -> AsyncIterator[context_pb2.PutArtifactRequest]:
        yield header_of()
        await on.wait()
        yield context_pb2.PutArtifactRequest(end=True)

    upload = contexts.stub.PutArtifact(parts(), metadata=contexts.within(opened.context_token))
    await upload.initial_metadata()
    async with asyncio.TaskGroup() as group, contexts.accounts.locked(_THREAD, opened.context.thread_id):
        on.set()
        await _waits(contexts, 1)
        closing = group.create_task(contexts.close(opened.context_token))
        await _waits(contexts, 2, closing)
        # nobody is told that it is closed while it still writes
        assert not closing.done()
    assert (await upload).artifact.thread_id == opened.context.thread_id


_OF_THREAD = ("threads", "messages", "artifacts")


async def test_the_wall_alone_hides_a_deleted_thread(contexts: Contexts) -> None:
    owner, writer, thread_id, _ = await _shared(contexts)
    put = contexts.stub.PutArtifact(_file(thread_id), metadata=owner.bearer)
    artifact_id = (await put).artifact.artifact_id
    new = (
        "INSERT INTO context.messages (thread_id, position, message_id, user_id, request_id, role, content, run_id, owner_id)"
        " VALUES ($1, 99, gen_random_uuid(), $2, gen_random_uuid()::text, 'user', 'x', gen_random_uuid(), $3)",
        "INSERT INTO context.artifacts (artifact_id, user_id, request_id, state, name, media_type, reserved, thread_id, owner_id)"
        " VALUES (gen_random_uuid(), $2, gen_random_uuid()::text, 'uploading', 'x', 'text/csv', 0, $1, $3)",
        "INSERT INTO context.contexts (context_id, user_id, tenant_id, session_id, thread_id, run_id, request_id, roles, tier, created_at,"
        " depth, correlation_id, agent_context, audit_metadata, asked, owner_id) VALUES (gen_random_uuid(), $2, gen_random_uuid(),"
        " gen_random_uuid(), $1, gen_random_uuid(), gen_random_uuid()::text, '{}', 'free', now(), 0, '', '', '', '', $3)",
    )

    async def seen() -> list[int]:
        async with role(contexts, writer) as wall:
            query = "SELECT count(*) FROM context.{} WHERE thread_id = $1"
            counts = [await wall.value(f"{query.format(name)} AND user_id = $2", thread_id, owner.user_id) for name in _OF_THREAD]
            return [*counts, await wall.value("SELECT count(*) FROM context.artifact_chunks WHERE artifact_id = $1", artifact_id)]

    assert await seen() == [1, 1, 1, 1]
    await ask(contexts, owner, "DeleteThread", thread_id=thread_id)
    assert await seen() == [0, 0, 0, 0]
    for statement in new:
        with pytest.raises(errors.PermissionDenied):
            async with role(contexts, writer) as wall:
                await wall.execute(statement, thread_id, writer.user_id, owner.user_id)
    # the owner's own code cannot show it either: not by a grant that says otherwise, nor by another one
    with pytest.raises(errors.PermissionDenied):
        async with role(contexts, owner) as wall:
            await wall.execute("UPDATE context.grants SET hidden = false WHERE thread_id = $1", thread_id)
    with pytest.raises(postgres.Unfit):
        async with role(contexts, owner) as wall:
            await wall.execute(
                "INSERT INTO context.grants (thread_id, owner_id, tenant_id, grantee_id, access)"
                " VALUES ($1, $2, gen_random_uuid(), gen_random_uuid(), 'read')", thread_id, owner.user_id,
            )  # fmt: skip
    await ask(contexts, owner, "RestoreThread", thread_id=thread_id)
    assert await seen() == [1, 1, 1, 1]
    for statement in new:
        async with role(contexts, writer) as wall:
            assert await wall.execute(statement, thread_id, writer.user_id, owner.user_id) == "INSERT 0 1"


async def _file(thread_id: str) -> AsyncIterator[context_pb2.PutArtifactRequest]:
    yield header_of(thread_id=thread_id)
    yield context_pb2.PutArtifactRequest(data=b"secret")
    yield context_pb2.PutArtifactRequest(end=True)


@pytest.mark.parametrize("reader", ["user", "admin"])
async def test_a_line_that_is_committed_between_two_pages_is_on_one_of_them(contexts: Contexts, reader: str) -> None:
    user, admin = await contexts.services.user(), await contexts.services.user(role="admin")
    looks, whose = (user, "") if reader == "user" else (admin, user.user_id)
    line = "INSERT INTO context.audit (user_id, actor, action, correlation_id, detail) VALUES ($1, 'late', 'read', '', '{}')"
    await contexts.open(user)
    async with asyncio.TaskGroup() as group, role(contexts, user) as wall:
        # its id is lower than those of the lines that are committed before it
        await wall.execute(line, user.user_id)
        for _ in range(2):
            await contexts.open(user)
        reading = group.create_task(contexts.audit(looks, user_id=whose, page_size=2))
        await _waits(contexts, 1, reading)
    pages = [reading.result()]
    while token := pages[-1].next_page_token:
        pages.append(await contexts.audit(looks, user_id=whose, page_size=2, page_token=token))
    told = [entry for page in pages for entry in page.entries]
    assert [entry.actor for entry in told if entry.actor != admin.user_id] == ["dispatcher", "late", "dispatcher", "dispatcher"]
    assert [entry.entry_id for entry in told] == sorted({entry.entry_id for entry in told})


async def test_who_deletes_a_thread_that_is_held_is_told_to_try_again(contexts: Contexts) -> None:
    user, request_id = await contexts.services.user(), ids.uuid7()
    thread_id = await thread_of(contexts, user, "hello")
    async with contexts.accounts.locked(_THREAD.replace("UPDATE", "KEY SHARE"), thread_id):
        error = await refused(ask(contexts, user, "DeleteThread", thread_id=thread_id, request_id=request_id))
    assert (error.code, error.message) == ("UNAVAILABLE", "Another transaction holds what this one needs. Try again.")
    assert await said(contexts, user, thread_id) == [(1, "hello")]
    assert (await ask(contexts, user, "DeleteThread", thread_id=thread_id, request_id=request_id)).thread.HasField("deleted_at")
