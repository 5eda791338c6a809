"""Threads that were granted, as the database shows them to whom: one that is, one that was withdrawn, one that its owner deleted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from chassis import postgres
from netra import ids
from netra.context.v1 import context_pb2
from standalone import prepare
from tests.fixtures.stack import Standalone
from tests.prove.isolation.judge import Judge
from tests.prove.isolation.people import Party, Things, canary
from tests.prove.isolation.world import World

GRANTED, WITHDRAWN, DELETED = "granted", "withdrawn", "deleted"
# what hangs on a thread that was granted for writing: its rows, of which those of others are seen, and what is made there in one's own name
_SEEN = ("context.threads", "context.messages", "context.artifacts")
_MADE = ("context.messages", "context.contexts", "context.artifacts")
# what is written into the thread that was granted: who writes counts its messages
_WRITTEN = ("context.threads SET messages = messages", "context.threads SET updated_at = updated_at")
_CLOSED = (
    "context.threads SET deleted_at = now()", "context.threads SET erased_at = now()", "context.messages SET content = ''",
    "context.artifacts SET state = 'discarded'", "context.grants SET withdrawn_at = NULL, access = 'write'",
)  # fmt: skip
_DENIED = "42501"


@dataclass(frozen=True, slots=True)
class _Given:
    """Whose thread it was, to whom it was granted, and its ids by state."""

    owner: Party
    grantee: Party
    threads: dict[str, str]


async def probe(world: World, system: Standalone, judge: Judge) -> int:
    """What the one to whom they were granted sees and changes of each, by SQL; how many cases."""
    given, cases = await _given(world), 0
    secret = (system.secrets / "context" / "postgres").read_text().strip()
    async with postgres.connection(prepare.dsn(system.postgres_admin_url, "netra_context", secret, system.database)) as mine:
        for state, thread_id in given.threads.items():
            for what, statement in _statements(given, thread_id):
                cases += 1
                failure = _failure(state, what, await _tried(mine, given.grantee, statement))
                about = f"a thread that is {state}: {statement}"[:300]
                if state == GRANTED:
                    judge.control(about, failure)
                elif failure:
                    judge.findings.leaks.append(f"{about}: {failure}")
                judge.findings.probes += 1
    return cases


def _statements(given: _Given, thread_id: str) -> Iterator[tuple[str, str]]:
    """SQL in the name of whom it was granted to; and whether it reads, makes, writes what the grant is for, or more."""
    of = f"WHERE thread_id = '{thread_id}'"
    for table in _SEEN:
        yield "reads", f"SELECT thread_id FROM {table} {of}"  # noqa: S608 - of constants and ids
    for table in _MADE:
        values = f"('{thread_id}', '{given.owner.user_id}', '{given.grantee.user_id}')"
        yield "makes", f"INSERT INTO {table} (thread_id, owner_id, user_id) VALUES {values}"  # noqa: S608
    yield from (("writes", f"UPDATE {one} {of}") for one in _WRITTEN)
    yield from (("more", f"UPDATE {one} {of}") for one in _CLOSED)
    for table in _SEEN:
        yield "more", f"DELETE FROM {table} {of}"  # noqa: S608


def _failure(state: str, what: str, said: tuple[str, int]) -> str:
    """What is wrong with what was said."""
    code, many = said
    # a row that is not whole is refused after the policies have looked at it
    through = code != _DENIED if what == "makes" else code == "" and many > 0
    if through is (state == GRANTED and what != "more"):
        return ""
    return f"{code or 'done'}, {many} rows"


async def _tried(mine: postgres.Transaction, who: Party, statement: str) -> tuple[str, int]:
    """The code of a refusal, or how many rows; undone at once."""
    await mine.execute("BEGIN")
    try:
        await mine.execute("SELECT set_config('netra.user_id', $1, true)", who.user_id)
        return "", int((await mine.execute(statement)).rpartition(" ")[2])
    except Exception as error:  # whatever the driver raises says in its code why
        return str(getattr(error, "sqlstate", "") or type(error).__name__), 0
    finally:
        await mine.execute("ROLLBACK")


async def _given(world: World) -> _Given:
    owner, grantee = [await world.spare(world["A"]) for _ in range(2)]
    for one in (owner, grantee):
        one.canary, one.things = canary("g"), Things({"user_id": one.user_id, "tenant_id": one.things["tenant_id"]})
    threads = {}
    for state in (GRANTED, WITHDRAWN, DELETED):
        threads[state] = await world.thread(owner)
        await world.kept(owner, thread_id=threads[state])
        wanted = context_pb2.GrantThreadRequest(
            request_id=ids.uuid7(), thread_id=threads[state], user_id=grantee.user_id, access=context_pb2.ACCESS_WRITE
        )
        await world.context.GrantThread(wanted, metadata=owner.bearer, timeout=20)
    withdrawn = context_pb2.WithdrawGrantRequest(request_id=ids.uuid7(), thread_id=threads[WITHDRAWN], grantee_id=grantee.user_id)
    await world.context.WithdrawGrant(withdrawn, metadata=owner.bearer, timeout=20)
    deleted = context_pb2.DeleteThreadRequest(request_id=ids.uuid7(), thread_id=threads[DELETED])
    await world.context.DeleteThread(deleted, metadata=owner.bearer, timeout=20)
    return _Given(owner, grantee, threads)
