"""SQL for all that is kept of one user's runs: told, or taken away; every statement is bound to a user id."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from chassis import postgres
from netra import errors, ids
from services.dispatcher import erasure, exports

_ERASURE = "user_id, request_id, thread_id, asked_at, runs, done_at IS NOT NULL AS done"
_ONE = f"SELECT {_ERASURE} FROM dispatcher.erasures WHERE user_id = $1 AND request_id = $2"
# of so many that go on the error tells
_GOES_ON = (
    "SELECT run_id FROM dispatcher.runs WHERE user_id = $1 AND ($2::uuid IS NULL OR thread_id = $2)"
    " AND state IN ('created', 'queued', 'running', 'suspended', 'finishing') LIMIT 5"
)
# a call of a tool may have been answered before its row says so
_AT_END = "(state = 'finishing' OR kind = 'tool' AND state = 'running')"
_ENDING = (
    f"SELECT count(*) > 0 AND bool_and({_AT_END}) FROM dispatcher.runs"
    " WHERE user_id = $1 AND ($2::uuid IS NULL OR thread_id = $2) AND state IN ('created', 'queued', 'running', 'suspended', 'finishing')"
)
_NOTE = f"INSERT INTO dispatcher.erasures (user_id, request_id, thread_id) VALUES ($1, $2, $3) RETURNING {_ERASURE}"
_COUNT = "UPDATE dispatcher.erasures SET runs = runs + $3 WHERE user_id = $1 AND request_id = $2"
_DONE = f"UPDATE dispatcher.erasures SET done_at = coalesce(done_at, now()) WHERE user_id = $1 AND request_id = $2 RETURNING {_ERASURE}"
_NOBODY = "00000000-0000-0000-0000-000000000000"
# a run has up to 1 MiB, a message 64 KiB
_RUNS, _ROWS = 20, 64
_TOLD = (
    "run_id, thread_id, request_id, message_id, run_kind, agent, agent_version, state, request, inputs, outcome,"
    " correlation_id, created_at, started_at, ended_at"
)
_MESSAGE = "m.run_id, m.number, m.message_id, m.user_id, m.owner_id, m.thread_id, m.request_id, m.content, m.created_at"
_APPROVAL = (
    "a.approval_id, a.run_id, a.thread_id, a.message, a.tool_name, a.parameters, a.quorum, a.outcome, a.created_at, a.expires_at,"
    " a.resolved_at"
)
_VOTE = "v.approval_id, v.user_id, v.owner_id, v.thread_id, v.decision, v.comment, v.at"
_TO_RUNS = (
    f"SELECT {_MESSAGE} FROM dispatcher.messages AS m WHERE m.owner_id = $1 AND m.run_id = ANY($2::uuid[])"
    f" AND (m.run_id, m.number) > ($3, $4) ORDER BY m.run_id, m.number LIMIT {_ROWS}"
)
# what a line is made of, out of which rows ($1 is the user), in the order of which columns, and what is before the first of them
_LINES: dict[str, tuple[str, str, tuple[str, ...], tuple[object, ...]]] = {
    "run_message": (
        _MESSAGE,
        "dispatcher.messages AS m WHERE m.user_id = $1 AND m.owner_id <> $1",
        ("m.run_id", "m.number"),
        (_NOBODY, 0),
    ),
    "approval": (_APPROVAL, "dispatcher.approvals AS a WHERE a.user_id = $1", ("a.approval_id",), (_NOBODY,)),
    "vote": (
        _VOTE,
        "dispatcher.approval_votes AS v WHERE v.approval_id IN (SELECT approval_id FROM dispatcher.approvals WHERE user_id = $1)",
        ("v.approval_id", "v.user_id"),
        (_NOBODY, _NOBODY),
    ),
    "vote elsewhere": (
        _VOTE,
        "dispatcher.approval_votes AS v WHERE v.user_id = $1 AND v.owner_id <> $1",
        ("v.approval_id",),
        (_NOBODY,),
    ),
}


class ErasureStore:
    """Each method is one transaction of one user; row-level security shows what is there for that user, and no other row."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def ending(self, user_id: ids.UserId, thread_id: str) -> bool:
        """Whether runs of the user, or of the thread, are at their very end, or calls of tools, and nothing else of them goes on."""
        async with self._database.transaction(user_id) as transaction:
            return bool(await transaction.value(_ENDING, user_id, thread_id or None))

    async def begin(self, user_id: ids.UserId, request_id: ids.RequestId, thread_id: str) -> erasure.Erasure:
        """Note what is asked for, or return what was under the same request id. Raises `FailedPrecondition`, `AlreadyExists`."""

        async def work(transaction: postgres.Transaction) -> erasure.Erasure:
            # the same request may come twice at once
            await transaction.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"erase {user_id}")
            if (known := await transaction.row(_ONE, user_id, request_id)) is not None:
                return _same(known, thread_id)
            if live := await transaction.fetch(_GOES_ON, user_id, thread_id or None):
                runs = ", ".join(str(row["run_id"]) for row in live)
                raise errors.FailedPrecondition(f"These runs have not ended: {runs}. Cancel them, or wait for them.", runs=runs)
            return _erasure(await transaction.row(_NOTE, user_id, request_id, thread_id or None))

        return await self._database.retried(user_id, work)

    async def erase(self, wanted: erasure.Erasure, after: str, many: int) -> tuple[int, str]:
        """Take the content of some runs, after one of them; how many, and up to which."""

        async def work(transaction: postgres.Transaction) -> tuple[int, str]:
            row = await transaction.row(
                "SELECT gone, through FROM dispatcher.erase_some($1, $2, $3, $4, $5)", wanted.user_id, wanted.thread_id or None,
                wanted.asked_at, after or _NOBODY, many,
            )  # fmt: skip
            if row is None or not row["gone"]:
                return 0, after
            await transaction.execute(_COUNT, wanted.user_id, wanted.request_id, row["gone"])
            return row["gone"], str(row["through"])

        return await self._database.retried(wanted.user_id, work)

    async def erase_said(self, wanted: erasure.Erasure, many: int) -> int:
        """Take the user's words out of some of what they told runs of others; how many."""

        async def work(transaction: postgres.Transaction) -> int:
            query = "SELECT dispatcher.erase_said($1, $2, $3, $4)"
            return int(await transaction.value(query, wanted.user_id, wanted.thread_id or None, wanted.asked_at, many))

        return await self._database.retried(wanted.user_id, work)

    async def end(self, wanted: erasure.Erasure) -> erasure.Erasure:
        """Note that nothing is left."""
        async with self._database.transaction(wanted.user_id) as transaction:
            return _erasure(await transaction.row(_DONE, wanted.user_id, wanted.request_id))

    async def runs(self, user_id: ids.UserId, after: tuple[object, ...]) -> list[exports.Line]:
        """The next runs, in the order of their ids."""
        query = f"SELECT {_TOLD} FROM dispatcher.export_runs($1, $2, $3)"
        async with self._database.transaction(user_id) as transaction:
            rows = await transaction.fetch(query, user_id, *(after or (_NOBODY,)), _RUNS)
        return [exports.Line((row["run_id"],), dict(row)) for row in rows]

    async def messages(self, user_id: ids.UserId, run_ids: Sequence[str], after: tuple[object, ...]) -> list[exports.Line]:
        """The next messages to some of the user's runs, whoever sent them."""
        async with self._database.transaction(user_id) as transaction:
            rows = await transaction.fetch(_TO_RUNS, user_id, list(run_ids), *(after or (_NOBODY, 0)))
        return [exports.Line((row["run_id"], row["number"]), dict(row)) for row in rows]

    async def lines(self, user_id: ids.UserId, kind: str, after: tuple[object, ...]) -> list[exports.Line]:
        """The next of one of `exports.KINDS`."""
        columns, rows, order, before = _LINES[kind]
        place, places = ", ".join(order), ", ".join(f"${number}" for number in range(2, len(order) + 2))
        query = f"SELECT {columns} FROM {rows} AND ({place}) > ({places}) ORDER BY {place} LIMIT {_ROWS}"
        async with self._database.transaction(user_id) as transaction:
            found = await transaction.fetch(query, user_id, *(after or before))
        return [exports.Line(tuple(row[column.partition(".")[2]] for column in order), dict(row)) for row in found]


def _erasure(row: postgres.Row | None) -> erasure.Erasure:
    if row is None:
        raise errors.Internal("The erasure was not stored.")
    return read(row)


def read(row: postgres.Row | Any) -> erasure.Erasure:
    """From its row."""
    return erasure.Erasure(
        ids.UserId(str(row["user_id"])), ids.RequestId(row["request_id"]), str(row["thread_id"] or ""), row["asked_at"], row["runs"],
        row["done"],
    )  # fmt: skip


def _same(known: postgres.Row, thread_id: str) -> erasure.Erasure:
    found = read(known)
    if found.thread_id != thread_id:
        raise errors.AlreadyExists("Another erasure has this request id.", field="request_id")
    return found
