"""Contexts that are opened together, in one statement: each as the user it is for, and none at the expense of another."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from chassis import lifecycle, postgres
from netra import deadline, errors, ids
from netra.context import UserExecutionContext
from services.context import contexts, drafts, store_contexts, store_openings
from standalone import prepare
from tests.fixtures.stack import Standalone
from tests.integration.context.conftest import until

_TENANT = ids.TenantId.new()
_POOL = 4
_TRAIL = "pg_advisory_xact_lock(6, uuid_hash($1::uuid) & 255)"


@dataclass(frozen=True, slots=True)
class _Person:
    """A user."""

    user_id: ids.UserId = field(default_factory=ids.UserId.new)

    def frame(
        self, thread_id: ids.ThreadId | None = None, request_id: ids.RequestId | None = None, run_id: ids.RunId | None = None
    ) -> UserExecutionContext:
        return UserExecutionContext.from_request(
            user_id=self.user_id, tenant_id=_TENANT, session_id=ids.SessionId.new(), thread_id=thread_id or ids.ThreadId.new(),
            run_id=run_id or ids.RunId.new(), request_id=request_id or ids.RequestId.new(), roles=("user", "admin"), tier="free",
            scope=("runs:read", "runs:write"), agent_context=b'{"a":1}', audit_metadata=b'{"b":2}',
        )  # fmt: skip


class _Opener:
    """The store of contexts, over a role that is under the walls; nothing is opened before `going`."""

    def __init__(self, database: postgres.DatabaseManager, admin: postgres.Transaction) -> None:
        self.store, self.database, self.admin = store_contexts.ContextStore(database), database, admin
        # what fails is looked at by whoever asked
        self.tasks = lifecycle.Tasks(on_failure=lambda _error: None)

    @contextlib.asynccontextmanager
    async def going(self, *calls: Coroutine[Any, Any, Any]) -> AsyncIterator[list[asyncio.Task[Any]]]:
        """For the time of the block what was asked for, and is now, is opened: the calls at once, then what came meanwhile."""
        tasks = self.begun(*calls)
        # all ask, then it is answered
        await asyncio.sleep(0)
        self.tasks.spawn(self.store.open_gathered(), "openings")
        try:
            yield tasks
        finally:
            await self.tasks.close()

    def begun(self, *calls: Coroutine[Any, Any, Any]) -> list[asyncio.Task[Any]]:
        """Calls that are under way."""
        return [self.tasks.spawn(call, "call") for call in calls]

    async def together(self, *calls: Coroutine[Any, Any, Any]) -> list[Any]:
        """What becomes of calls that are made at once: None, or what they raise."""
        async with self.going(*calls) as tasks:
            return await asyncio.gather(*tasks, return_exceptions=True)

    def open(
        self, frame: UserExecutionContext, *, known: bool = False, actor: str = "dispatcher", said: str = ""
    ) -> Coroutine[Any, Any, None]:
        line = contexts.Line(actor, "open", {"run_id": frame.run_id})
        first = drafts.First(ids.MessageId.new(), drafts.Said("request", "user", said).draft(frame.run_id)) if said else None
        return self.store.open(frame, b"asked", line, datetime.now(UTC) + timedelta(hours=1), new_thread=not known, first=first)

    async def said(self, thread_id: ids.ThreadId) -> list[tuple[int, str]]:
        """Places and contents of the messages of a thread, which are all that it counts."""
        rows = await self.admin.fetch(
            "SELECT position, content FROM context.messages WHERE thread_id = $1 ORDER BY position", str(thread_id)
        )
        counted = await self.admin.value("SELECT messages FROM context.threads WHERE thread_id = $1", str(thread_id))
        assert counted == len(rows)
        return [(row["position"], row["content"]) for row in rows]

    async def thread(self, owner: _Person, reader: _Person | None = None, access: str = "read", *, deleted: bool = False) -> ids.ThreadId:
        """A thread that somebody has, and perhaps granted, or deleted."""
        made = ids.ThreadId.new()
        await self.admin.execute(
            "INSERT INTO context.threads (thread_id, user_id, tenant_id, deleted_at) VALUES ($1, $2, $3, CASE WHEN $4 THEN now() END)",
            str(made), str(owner.user_id), str(_TENANT), deleted,
        )  # fmt: skip
        if reader is not None:
            query = "INSERT INTO context.grants (thread_id, owner_id, tenant_id, grantee_id, access) VALUES ($1, $2, $3, $4, $5)"
            await self.admin.execute(query, str(made), str(owner.user_id), str(_TENANT), str(reader.user_id), access)
        return made

    async def in_order(self, many: int) -> list[_Person]:
        """Users in the order in which they are opened together; no two trails have a lock in common."""
        found: dict[int, _Person] = {}
        while len(found) < many:
            person = _Person()
            found.setdefault(await self.admin.value("SELECT uuid_hash($1::uuid) & 255", str(person.user_id)), person)
        return [found[kind] for kind in sorted(found)]

    async def stored(self, *people: _Person) -> list[tuple[str, str]]:
        """Whose contexts there are, and in which threads."""
        rows = await self.admin.fetch("SELECT user_id::text, thread_id::text FROM context.contexts")
        whose = {str(person.user_id): number for number, person in enumerate(people)}
        return sorted((str(whose[row["user_id"]]), row["thread_id"]) for row in rows)

    async def transactions(self) -> int:
        """How many transactions wrote the trail: each line has the time of its own."""
        return int(await self.admin.value("SELECT count(DISTINCT at) FROM context.audit"))

    async def waits(self, many: int = 1) -> None:
        """Returns when so many statements wait for a lock."""
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

        async def found() -> bool:
            return bool(await self.admin.value(query) == many)

        await until(found)

    async def loses(self) -> None:
        """Returns when the statement that waits for a lock has lost its connection."""
        # it has not until the server is done with it: the same must not be taken for another one
        query = (
            "SELECT bool_and(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE application_name = 'together'"
            " AND wait_event_type = 'Lock'"
        )

        async def found() -> bool:
            return bool(await self.admin.value(query))

        await until(found)


@pytest.fixture
async def opener(stores: Standalone, database: str, admin: postgres.Transaction) -> AsyncIterator[_Opener]:
    password = (stores.secrets / "context" / "postgres").read_text().strip()
    address = prepare.dsn(stores.postgres_admin_url, "netra_context", password, database)
    pool = await postgres.open_pool(address, "together", size=_POOL, options={**postgres.BY_KEY, "lock_timeout": "10s"})
    try:
        yield _Opener(pool, admin)
    finally:
        await pool.close()


@contextlib.asynccontextmanager
async def _held(stores: Standalone, database: str, person: _Person) -> AsyncIterator[None]:
    """For the time of the block somebody reads the trail of a user, and nobody can add to it."""
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as other:
        await other.execute("BEGIN")
        await other.fetch(f"SELECT {_TRAIL}", str(person.user_id))
        yield
        await other.execute("COMMIT")


async def test_what_is_asked_at_once_is_stored_at_once_each_for_its_user(opener: _Opener) -> None:
    people = [_Person() for _ in range(5)]
    frames = [person.frame() for person in people for _ in range(4)]
    assert await opener.together(*map(opener.open, frames)) == [None] * 20
    assert await opener.transactions() == 1
    for person in people:
        mine = {frame.context_id: frame for frame in frames if frame.user_id == person.user_id}
        for context_id, frame in mine.items():
            found = await opener.store.by_id(person.user_id, context_id)
            assert found is not None
            assert (found.context, found.asked, found.closed_at) == (frame, b"asked", None)
        trail = await opener.store.trail(person.user_id, contexts.About(), 0, 100)
        assert {(line.context_id, line.thread_id, line.actor, line.action, line.correlation_id) for line in trail} == {
            (frame.context_id, frame.thread_id, "dispatcher", "open", frame.correlation_id) for frame in mine.values()
        }
        query = "SELECT thread_id::text FROM context.threads WHERE user_id = $1"
        assert {row["thread_id"] for row in await opener.admin.fetch(query, str(person.user_id))} == {
            frame.thread_id for frame in mine.values()
        }


async def test_those_who_may_not_are_refused_among_those_who_may_and_leave_nothing(opener: _Opener) -> None:
    owner, reader, writer, stranger = (_Person() for _ in range(4))
    to_read, to_write = await opener.thread(owner, reader), await opener.thread(owner, writer, "write")
    gone, taken = await opener.thread(owner, deleted=True), ids.RequestId.new()
    refused = [
        (stranger, to_write), (stranger, ids.ThreadId.new()), (reader, to_read), (reader, to_write), (owner, gone), (writer, to_read),
    ]  # fmt: skip
    outcomes = await opener.together(
        opener.open(owner.frame(request_id=taken)),
        *(opener.open(person.frame(thread_id), known=True) for person, thread_id in refused),
        opener.open(owner.frame(to_write), known=True), opener.open(writer.frame(to_write), known=True),
        opener.open(owner.frame(request_id=taken)), opener.open(stranger.frame()),
    )  # fmt: skip
    kinds = [type(outcome) for outcome in outcomes]
    none = type(None)
    assert kinds == [
        none, errors.NotFound, errors.NotFound, errors.PermissionDenied, errors.NotFound, errors.NotFound, errors.NotFound, none, none,
        postgres.Conflict, none,
    ]  # fmt: skip
    # one that is there for others, and one that is nowhere, are told the same
    assert (outcomes[1].message, outcomes[1].details) == (outcomes[2].message, outcomes[2].details)
    assert await opener.transactions() == 1
    found = await opener.stored(owner, reader, writer, stranger)
    assert [whose for whose, _ in found] == ["0", "0", "2", "3"]
    assert {thread_id for whose, thread_id in found if whose == "2"} == {to_write}
    # neither a line nor a thread is there of what was refused
    assert await opener.admin.value("SELECT count(*) FROM context.audit") == 4
    assert await opener.admin.value("SELECT count(*) FROM context.threads") == 5


async def test_messages_are_said_together_each_in_its_thread_and_in_one_order(opener: _Opener) -> None:
    owner, writer, other = await opener.in_order(3)
    shared, own = await opener.thread(owner, writer, "write"), ids.ThreadId.new()
    outcomes = await opener.together(
        opener.open(owner.frame(shared), known=True, said="a"), opener.open(other.frame(own), said="b\x1fc"),
        opener.open(writer.frame(shared), known=True, said="d"), opener.open(owner.frame(shared), known=True),
        opener.open(owner.frame(shared), known=True, said="e"),
    )  # fmt: skip
    assert outcomes == [None] * 5
    assert await opener.transactions() == 1
    found = await opener.said(shared)
    assert [place for place, _ in found] == [1, 2, 3]
    assert {content for _, content in found} == {"a", "d", "e"}
    assert await opener.said(own) == [(1, "b\x1fc")]


# as a planner may have it: the grants of a user are asked for once in a statement
_GRANTS_GATHERED = """
DO $$ DECLARE known regprocedure; BEGIN
    FOR known IN SELECT oid FROM pg_proc WHERE proname = 'open_contexts' LOOP
        EXECUTE format('ALTER FUNCTION %s SET enable_indexscan = off SET enable_indexonlyscan = off', known);
    END LOOP;
END $$
"""


@pytest.mark.parametrize("planned", ["SELECT", _GRANTS_GATHERED], ids=["row by row", "gathered"])
async def test_threads_of_several_others_are_written_to_together_by_those_to_whom_they_were_granted(opener: _Opener, planned: str) -> None:
    await opener.admin.execute(planned)
    owner, first, second = await opener.in_order(3)
    granted = {writer: await opener.thread(owner, writer, "write") for writer in (first, second)}
    outcomes = await opener.together(
        *(opener.open(writer.frame(thread_id), known=True, said=said) for said in "ab" for writer, thread_id in granted.items()),
        opener.open(owner.frame(granted[first]), known=True, said="c"), opener.open(second.frame(granted[first]), known=True, said="d"),
    )  # fmt: skip
    assert [type(outcome) for outcome in outcomes] == [*[type(None)] * 5, errors.NotFound]
    assert await opener.transactions() == 1
    said = [await opener.said(granted[writer]) for writer in (first, second)]
    assert [[place for place, _ in each] for each in said] == [[1, 2, 3], [1, 2]]
    assert [{content for _, content in each} for each in said] == [{"a", "b", "c"}, {"a", "b"}]


async def test_a_message_is_not_said_of_a_context_that_is_not_opened(opener: _Opener) -> None:
    owner, reader, taken = _Person(), _Person(), ids.RequestId.new()
    thread_id, first = await opener.thread(owner, reader), owner.frame(request_id=taken)
    outcomes = await opener.together(
        opener.open(first, said="a"), opener.open(reader.frame(thread_id), known=True, said="b"),
        opener.open(owner.frame(thread_id, request_id=taken), known=True, said="c"),
        opener.open(owner.frame(thread_id), known=True, said="d"),
    )  # fmt: skip
    assert [type(outcome) for outcome in outcomes] == [type(None), errors.PermissionDenied, postgres.Conflict, type(None)]
    assert await opener.transactions() == 1
    assert await opener.said(thread_id) == [(1, "d")]
    assert await opener.said(first.thread_id) == [(1, "a")]


async def test_a_message_that_is_there_already_opens_nothing_and_holds_up_nobody(opener: _Opener) -> None:
    person, other = _Person(), _Person()
    first = person.frame()
    assert await opener.together(opener.open(first, said="a")) == [None]
    # the same run under another request
    outcomes = await opener.together(opener.open(person.frame(run_id=first.run_id), said="a"), opener.open(other.frame(), said="b"))
    assert [type(outcome) for outcome in outcomes] == [postgres.Conflict, type(None)]
    assert [whose for whose, _ in await opener.stored(person, other)] == ["0", "1"]
    assert await opener.admin.value("SELECT count(*) FROM context.threads") == 2


async def test_code_that_knows_of_no_messages_opens_as_before(opener: _Opener) -> None:
    person = _Person()
    opening = store_openings.Opening(person.frame(), b"", contexts.Line("x", "open", {}), datetime.now(UTC), True)
    row = store_openings._row(opening)[:21]
    older = f"SELECT context.open_contexts($1, {', '.join(store_openings._GIVEN[:21])})"
    async with opener.database.transaction() as transaction:
        assert await transaction.value(older, "", *row) == ["made"]
    assert await opener.said(opening.frame.thread_id) == []


async def test_one_that_the_database_refuses_does_not_take_the_others_along(opener: _Opener) -> None:
    people = [_Person() for _ in range(3)]
    outcomes = await opener.together(
        opener.open(people[0].frame()), opener.open(people[1].frame(), actor="a\0b"), opener.open(people[2].frame())
    )
    assert [type(outcome) for outcome in outcomes] == [type(None), postgres.Unfit, type(None)]
    assert [whose for whose, _ in await opener.stored(*people)] == ["0", "2"]


async def test_nobody_is_left_set_for_what_comes_after(opener: _Opener) -> None:
    person = _Person()
    opening = store_openings.Opening(person.frame(), b"", contexts.Line("x", "open", {}), datetime.now(UTC), True)
    async with opener.database.transaction() as transaction:
        assert await store_openings.store(transaction, [opening]) == ["made"]
        assert await transaction.value("SELECT current_setting('netra.user_id', true)") == ""
        assert await transaction.fetch("SELECT FROM context.contexts") == []


async def test_who_is_gone_before_is_not_opened_and_the_others_are(opener: _Opener) -> None:
    people = [_Person() for _ in range(3)]
    waiting = opener.begun(*(opener.open(person.frame()) for person in people))
    await asyncio.sleep(0)
    waiting[1].cancel()
    async with opener.going():
        assert [type(each) for each in await asyncio.gather(*waiting, return_exceptions=True)] == [
            type(None), asyncio.CancelledError, type(None),
        ]  # fmt: skip
    assert [whose for whose, _ in await opener.stored(*people)] == ["0", "2"]
    assert await opener.transactions() == 1


async def test_who_must_wait_for_somebody_else_waits_alone(opener: _Opener, stores: Standalone, database: str) -> None:
    people = await opener.in_order(3)
    async with _held(stores, database, people[1]), opener.going(*(opener.open(person.frame()) for person in people)) as tasks:
        await asyncio.gather(tasks[0], tasks[2])
        await opener.open(people[0].frame())
        assert not tasks[1].done()
        assert [whose for whose, _ in await opener.stored(*people)] == ["0", "0", "2"]
        # what is given up while it waits is not there afterwards
        tasks[1].cancel()
        await asyncio.wait([tasks[1]])
    assert [whose for whose, _ in await opener.stored(*people)] == ["0", "0", "2"]


async def test_who_goes_away_or_runs_out_of_time_meanwhile_does_not_hold_up_the_others(
    opener: _Opener, stores: Standalone, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_contexts, "_PATIENCE", "10s")
    people = await opener.in_order(4)

    async def hurried(frame: UserExecutionContext) -> None:
        deadline.bind(0.3)
        await opener.open(frame)

    calls = [opener.open(people[0].frame()), hurried(people[1].frame()), opener.open(people[2].frame()), opener.open(people[3].frame())]
    async with opener.going() as _:
        async with _held(stores, database, people[3]):
            tasks = opener.begun(*calls)
            await opener.waits()
            tasks[2].cancel()
            with pytest.raises(errors.DeadlineExceeded):
                await tasks[1]
            assert not tasks[0].done()
            assert not tasks[3].done()
        await asyncio.gather(tasks[0], tasks[3])
    # they were under way: what became of them is told to whoever asks again with the same request id
    assert [whose for whose, _ in await opener.stored(*people)] == ["0", "1", "2", "3"]


async def test_when_the_database_is_lost_meanwhile_all_are_told_so_and_may_ask_again(
    opener: _Opener, stores: Standalone, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_contexts, "_PATIENCE", "10s")
    people = await opener.in_order(3)
    frames = [person.frame() for person in people]
    async with _held(stores, database, people[2]), opener.going(*map(opener.open, frames)) as tasks:
        # as many connections as there are, and one more
        for _ in range(_POOL + 1):
            await opener.loses()
        lost = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(each, errors.Unavailable) for each in lost)
        assert len(set(map(id, lost))) == 3
    assert await opener.stored(*people) == []
    assert await opener.together(*map(opener.open, frames)) == [None] * 3
    assert [whose for whose, _ in await opener.stored(*people)] == ["0", "1", "2"]


async def test_when_a_connection_is_lost_meanwhile_all_are_opened_on_another_one(
    opener: _Opener, stores: Standalone, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_contexts, "_PATIENCE", "10s")
    people = await opener.in_order(3)
    async with opener.going() as _:
        async with _held(stores, database, people[2]):
            tasks = opener.begun(*(opener.open(person.frame(), said="a") for person in people))
            await opener.loses()
            await opener.waits()
        assert await asyncio.gather(*tasks) == [None] * 3
    assert [whose for whose, _ in await opener.stored(*people)] == ["0", "1", "2"]


async def test_a_page_of_a_trail_waits_for_what_is_being_opened_together(
    opener: _Opener, stores: Standalone, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_contexts, "_PATIENCE", "10s")
    first, last = await opener.in_order(2)
    known = first.frame()
    assert await opener.together(opener.open(known)) == [None]
    async with opener.going() as _:
        async with _held(stores, database, last):
            tasks = opener.begun(opener.open(last.frame()), opener.open(first.frame()))
            # the line of the first has its id, and is not committed
            await opener.waits()
            assert await opener.store.close(known, contexts.Line("dispatcher", "close", {})) is not None
            (page,) = opener.begun(opener.store.trail(first.user_id, contexts.About(), 0, 2))
            await opener.waits(2)
        await asyncio.gather(*tasks)
        assert [line.action for line in await page] == ["open", "open"]
    assert [line.action for line in await opener.store.trail(first.user_id, contexts.About(), 0, 9)] == ["open", "open", "close"]
