"""SQL for what runs wait for: messages to them, and approvals with their votes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import orjson

from chassis import postgres
from netra import errors, ids
from netra.context import UserExecutionContext
from services.dispatcher import approvals, runs

# what policies look at beside the user: a thread whose rows are shown, one that the user may write to
_THREAD, _WRITTEN_THREAD = "thread_id", "written_thread_id"
_MAIL = "number, message_id, user_id, content"
# messages that a run takes in all, and that are looked at together: more than a run has strands that wait for one
MOST_MAIL, _MAIL_AT_ONCE = 1000, 64
# as JSON writes it, and not the letters of it behind a backslash
_NUL = re.compile(r"(?<!\\)((?:\\\\)*)\\u0000")
# the time that is asked for may have passed before somebody looks
_STATE = "coalesce(outcome, CASE WHEN expires_at <= now() THEN 'expired' ELSE 'pending' END)"
_APPROVAL = (
    "approval_id, run_id, user_id, thread_id, message, tool_name, parameters, quorum, created_at, expires_at,"
    f" {_STATE} AS state, CASE WHEN outcome IS NULL AND expires_at <= now() THEN expires_at ELSE resolved_at END AS resolved_at"
)
_VOTES = "SELECT approval_id, user_id, decision, comment, at FROM dispatcher.approval_votes WHERE approval_id = ANY($1::uuid[]) ORDER BY at"
# whoever writes to an approval and to its run takes the run first
_RUN_OF = (
    "SELECT run_id, state FROM dispatcher.runs"
    " WHERE run_id = (SELECT run_id FROM dispatcher.approvals WHERE approval_id = $1 AND {whose} = $2) FOR NO KEY UPDATE"
)
_GOES_ON = tuple(state.value for state in runs.GOES_ON)
_WAKE = f"UPDATE dispatcher.runs SET woken_at = now() WHERE run_id = $1 AND state IN {_GOES_ON!r}"
_VOTE = (
    "INSERT INTO dispatcher.approval_votes (approval_id, user_id, owner_id, thread_id, decision, comment) VALUES ($1, $2, $3, $4, $5, $6)"
)
_ASK = (
    "INSERT INTO dispatcher.approvals (approval_id, run_id, user_id, thread_id, step_key, message, tool_name, parameters, quorum,"
    " expires_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8::jsonb, $9, now() + make_interval(secs => $10))"
    " ON CONFLICT (approval_id) DO NOTHING"
)
_EXPIRE = (
    "UPDATE dispatcher.approvals SET outcome = 'expired', resolved_at = expires_at"
    " WHERE approval_id = $1 AND run_id = $2 AND outcome IS NULL AND expires_at <= now()"
)


class UserWaits:
    """Messages and approvals as users see them; every statement is bound to a user id."""

    _database: postgres.DatabaseManager

    async def mail_by_request(self, user_id: ids.UserId, request_id: str) -> runs.Sent | None:
        """The message that the user sent under this request id, to whichever run."""
        query = "SELECT run_id, request_id, message_id, content FROM dispatcher.messages WHERE user_id = $1 AND request_id = $2"
        async with self._database.transaction(user_id) as transaction:
            row = await transaction.row(query, user_id, request_id)
        return None if row is None else runs.Sent(ids.RunId(row["run_id"]), row["request_id"], row["message_id"], row["content"])

    async def require_mail_room(self, user_id: ids.UserId, run_id: ids.RunId, granted: str = "") -> None:
        """Raises `QuotaExceeded` when the run has had as many messages as one takes."""
        async with self._database.transaction(user_id, within=_read(granted)) as transaction:
            had = await transaction.value("SELECT coalesce(max(number), 0) FROM dispatcher.messages WHERE run_id = $1", run_id)
        if had >= MOST_MAIL:
            raise _full()

    async def send(self, user_id: ids.UserId, sent: runs.Sent, granted: str = "") -> None:
        """Bring a message to a run that has not ended, and wake it; once per request id.

        Raises `FailedPrecondition` when it has ended, `AlreadyExists` when the request id was used for another message,
        `QuotaExceeded` when it has had as many as a run takes.
        """
        whose, which = whose_rows(user_id, granted)
        # one message after the other: who numbers one holds the run
        held = (
            f"SELECT user_id, thread_id FROM dispatcher.runs WHERE {whose} = $1 AND run_id = $2 AND state IN {_GOES_ON!r} FOR NO KEY UPDATE"
        )
        # one that is put away for something else stays so, and finds it later
        wake = (
            f"UPDATE dispatcher.runs SET woken_at = now() WHERE {whose} = $1 AND run_id = $2"
            " AND NOT (state = 'suspended' AND waits_for IN ('approval', 'timer'))"
        )
        add = (
            "INSERT INTO dispatcher.messages (run_id, number, message_id, user_id, owner_id, thread_id, request_id, content)"
            " SELECT $1, coalesce(max(number), 0) + 1, $2, $3, $4, $5, $6, $7 FROM dispatcher.messages WHERE run_id = $1"
            " HAVING coalesce(max(number), 0) < $8"
        )
        try:
            async with self._database.transaction(user_id, within=_written(granted)) as transaction:
                row = await transaction.row(held, which, sent.run_id)
                if row is None:
                    raise errors.FailedPrecondition("The run has ended, or is about to.")
                added = await transaction.execute(
                    add, sent.run_id, sent.message_id, user_id, row["user_id"], row["thread_id"], sent.request_id, sent.content, MOST_MAIL
                )
                if added != "INSERT 0 1":
                    raise _full()
                await transaction.execute(wake, which, sent.run_id)
        except postgres.Conflict:
            # the same request came twice at once
            if await self.mail_by_request(user_id, sent.request_id) != sent:
                raise errors.AlreadyExists(field="request_id") from None

    async def addressee(self, user_id: ids.UserId, request_id: str, thread_id: str) -> ids.RunId | None:
        """The run that a message to a thread goes to, in place of a new one.

        The one it went to before; else, unless the request has started a run, the user's newest that is suspended until one comes.
        """
        query = (
            "SELECT coalesce((SELECT run_id FROM dispatcher.messages WHERE user_id = $1 AND request_id = $2),"
            " (SELECT run_id FROM dispatcher.runs WHERE user_id = $1 AND thread_id = $3 AND kind = 'agent' AND state = 'suspended'"
            "   AND waits_for = 'message' AND cancelled_at IS NULL"
            "   AND NOT EXISTS (SELECT FROM dispatcher.runs WHERE user_id = $1 AND request_id = $2)"
            "   ORDER BY created_at DESC, run_id DESC LIMIT 1))"
        )
        async with self._database.transaction(user_id) as transaction:
            found = await transaction.value(query, user_id, request_id, thread_id)
        return None if found is None else ids.RunId(found)

    async def approval(self, user_id: ids.UserId, approval_id: str, granted: str = "") -> approvals.Approval:
        """One approval with its votes: of a run of the user's, or of a thread that was `granted` to them. Raises `NotFound`."""
        async with self._database.transaction(user_id, within=_read(granted)) as transaction:
            return await _approval(transaction, user_id, approval_id, granted)

    async def vote(self, user_id: ids.UserId, approval_id: str, decision: str, comment: str, granted: str = "") -> approvals.Approval:
        """Add a user's vote; one that decides wakes the run. Raises `NotFound`, and `FailedPrecondition` as `approvals.after` does."""

        async def work(transaction: postgres.Transaction) -> approvals.Approval:
            return await _voted(transaction, user_id, approval_id, decision, comment, granted)

        return await self._database.retried(user_id, work, within=_written(granted))

    async def approvals(
        self, user_id: ids.UserId, *, run_id: str, state: str, after: str, size: int, granted: str = ""
    ) -> list[approvals.Approval]:  # fmt: skip
        """Up to `size` approvals, newest first, older than the one `after` when given; of a `granted` thread all of its runs'."""
        whose, which = whose_rows(user_id, granted)
        older = "(created_at, approval_id) < (SELECT created_at, approval_id FROM dispatcher.approvals WHERE approval_id = ${})"
        asked = {f"{whose} = ${{}}": which, "run_id = ${}": run_id, f"{_STATE} = ${{}}": state, older: after}
        given = {condition: value for condition, value in asked.items() if value}
        wanted = " AND ".join(condition.format(number) for number, condition in enumerate(given, 1))
        query = (
            f"SELECT {_APPROVAL} FROM dispatcher.approvals WHERE {wanted}"
            f" ORDER BY created_at DESC, approval_id DESC LIMIT ${len(given) + 1}"
        )
        async with self._database.transaction(user_id, within=_read(granted)) as transaction:
            return await _with_votes(transaction, await transaction.fetch(query, *given.values(), size))


class SystemWaits:
    """What runs read of their mail and their approvals, through the system role; whoever asks owns the run."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def mail(self, run_id: ids.RunId, after: int) -> list[runs.Mail]:
        """The first messages to a run with higher numbers, oldest first."""
        query = f"SELECT {_MAIL} FROM dispatcher.messages WHERE run_id = $1 AND number > $2 ORDER BY number LIMIT {_MAIL_AT_ONCE}"
        rows = await self._database.alone(query, run_id, after)
        return [runs.Mail(row["number"], row["message_id"], row["user_id"], row["content"]) for row in rows]

    async def ask(self, wanted: approvals.Wanted, context: UserExecutionContext) -> approvals.Approval:
        """Store an approval, once, and return it as it is now."""
        await self._database.alone(
            _ASK, wanted.approval_id, wanted.run_id, context.user_id, context.thread_id, wanted.step_key, wanted.message,
            wanted.tool_name, _shown(wanted.parameters), wanted.quorum, wanted.expires_s,
        )  # fmt: skip
        return await self.approval(ids.RunId(wanted.run_id), wanted.approval_id)

    async def approval(self, run_id: ids.RunId, approval_id: str) -> approvals.Approval:
        """An approval of a run with its votes; it has expired once its time has passed. Raises `NotFound`."""
        query = f"SELECT {_APPROVAL} FROM dispatcher.approvals WHERE approval_id = $1 AND run_id = $2"
        async with self._database.transaction() as transaction:
            await transaction.execute(_EXPIRE, approval_id, run_id)
            found = await _with_votes(transaction, await transaction.fetch(query, approval_id, run_id))
        if not found:
            raise errors.NotFound("There is no such approval.", field="approval_id")
        return found[0]


def _full() -> errors.QuotaExceeded:
    return errors.QuotaExceeded(f"The run was sent {MOST_MAIL} messages, which is all that one takes. Start another one.")


def _shown(parameters: Mapping[str, Any]) -> str:
    """As JSON for people, who are shown the sign for a NUL: the database takes none."""
    return _NUL.sub(r"\1\\u2400", orjson.dumps(dict(parameters)).decode())


async def _voted(
    transaction: postgres.Transaction, user_id: ids.UserId, approval_id: str, decision: str, comment: str, granted: str
) -> approvals.Approval:
    whose, which = whose_rows(user_id, granted)
    run = await transaction.row(_RUN_OF.format(whose=whose), approval_id, which)
    before = await _approval(transaction, user_id, approval_id, granted)
    now = approvals.after(before, approvals.Vote(user_id, decision, comment, await transaction.value("SELECT now()")))
    if now is before:
        return before
    if run is None or run["state"] not in _GOES_ON:
        raise errors.FailedPrecondition("The run has ended, or is about to.")
    await transaction.execute(_VOTE, approval_id, user_id, before.user_id, before.thread_id, decision, comment)
    if now.state != approvals.PENDING:
        decided = "UPDATE dispatcher.approvals SET outcome = $2, resolved_at = now() WHERE approval_id = $1"
        await transaction.execute(decided, approval_id, now.state)
        await transaction.execute(_WAKE, before.run_id)
    return now


def whose_rows(user_id: str, thread_id: str) -> tuple[str, str]:
    """The column that says whose rows are meant, and its value: a user's, or a thread's whoever owns them."""
    return ("thread_id", thread_id) if thread_id else ("user_id", user_id)


def _read(granted: str) -> dict[str, str]:
    return {_THREAD: granted} if granted else {}


def _written(granted: str) -> dict[str, str]:
    return {_THREAD: granted, _WRITTEN_THREAD: granted} if granted else {}


async def _approval(transaction: postgres.Transaction, user_id: str, approval_id: str, granted: str) -> approvals.Approval:
    whose, which = whose_rows(user_id, granted)
    query = f"SELECT {_APPROVAL} FROM dispatcher.approvals WHERE approval_id = $1 AND {whose} = $2"
    found = await _with_votes(transaction, await transaction.fetch(query, approval_id, which))
    if not found:
        raise errors.NotFound("There is no such approval.", field="approval_id")
    return found[0]


async def _with_votes(transaction: postgres.Transaction, rows: Sequence[postgres.Row]) -> list[approvals.Approval]:
    if not rows:
        return []
    votes: dict[str, list[approvals.Vote]] = {row["approval_id"]: [] for row in rows}
    for row in await transaction.fetch(_VOTES, list(votes)):
        votes[row["approval_id"]].append(approvals.Vote(row["user_id"], row["decision"], row["comment"], row["at"]))
    return [_read_approval(row, votes[row["approval_id"]]) for row in rows]


def _read_approval(row: postgres.Row, votes: Sequence[approvals.Vote]) -> approvals.Approval:
    resolved_at: datetime | None = row["resolved_at"]
    return approvals.Approval(
        approval_id=row["approval_id"],
        run_id=ids.RunId(row["run_id"]),
        user_id=ids.UserId(row["user_id"]),
        thread_id=ids.ThreadId(row["thread_id"]),
        message=row["message"],
        tool_name=row["tool_name"],
        parameters=orjson.loads(row["parameters"]),
        quorum=row["quorum"],
        state=row["state"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        resolved_at=resolved_at,
        votes=tuple(votes),
    )
