"""SQL for files and their chunks; every statement is bound to a user id."""

from __future__ import annotations

from collections.abc import Sequence

from chassis.postgres import DatabaseManager, Row, Transaction
from netra import errors, ids
from services.context import changes, store_rows
from services.context.artifacts import Actor, Artifact, Draft, Room

_COLUMNS = ("artifact_id", "name", "media_type", "size", "sha256", "run_id", "created_at", "thread_id", "user_id")
_ARTIFACT = ", ".join(f"a.{column}" for column in _COLUMNS)
# $1 is the user, $2 the context: who acts in one does so while it is open, in the very statement that reads or writes
_ACTS = f"($2::uuid IS NULL OR {store_rows.still_open()})"
_WRITES = f"($2::uuid IS NULL OR {store_rows.still_open(held=True)})"
# in threads of the user, and those granted to them; a deleted one hides what others made in it
_SEEN = (
    f"{store_rows.STAYS} AND (a.user_id = $1 OR EXISTS (SELECT FROM context.threads AS t"
    f" WHERE t.thread_id = a.thread_id AND t.deleted_at IS NULL AND t.erased_at IS NULL AND {store_rows.reader('$1', 't')}))"
)
# A run of the owner goes on in a thread they have deleted; an upload does not begin in one.
_WRITABLE = (
    "SELECT t.thread_id, t.user_id FROM context.threads AS t WHERE t.thread_id = $8 AND t.erased_at IS NULL"
    " AND (t.deleted_at IS NULL OR $2::uuid IS NOT NULL)"
    f" AND {store_rows.writer('$1', 't')}"
)
# an erasure of the thread either finds the file, or keeps it from being shown
_STAYS = (
    "(a.thread_id IS NULL OR EXISTS (SELECT FROM context.threads AS t"
    " WHERE t.thread_id = a.thread_id AND t.erased_at IS NULL FOR KEY SHARE))"
)
# what counts against the limits of $1
_MINE = "SELECT coalesce(max(files), 0) AS count, coalesce(max(reserved), 0) AS bytes FROM context.usage WHERE user_id = $1"
_BEGIN = (
    f"WITH mine AS ({_MINE}), thread AS ({_WRITABLE})"
    " INSERT INTO context.artifacts (user_id, artifact_id, request_id, state, name, media_type, run_id, reserved, thread_id, owner_id)"
    " SELECT $1, $3, $4, 'uploading', $5, $6, $7, least($9, greatest($10 - mine.bytes, 0)), thread.thread_id, thread.user_id"
    " FROM mine LEFT JOIN thread ON true"
    f" WHERE mine.count < $11 AND ($8::uuid IS NULL OR thread.thread_id IS NOT NULL) AND {_WRITES} RETURNING reserved"
)


class ArtifactStore:
    """Each method is one transaction of one user; row-level security shows what that user may see, and no other row."""

    def __init__(self, database: DatabaseManager) -> None:
        self._database = database

    async def by_request(self, actor: Actor, request_id: ids.RequestId) -> Artifact | None:
        """The user's file that was made under this request id."""
        return await self._found(actor, f"a.user_id = $1 AND a.request_id = $3 AND {store_rows.STAYS}", request_id)

    async def by_id(self, actor: Actor, artifact_id: ids.ArtifactId) -> Artifact | None:
        """The file with this id, when the user may see it."""
        return await self._found(actor, f"a.artifact_id = $3 AND {_SEEN}", artifact_id)

    async def _found(self, actor: Actor, where: str, wanted: str) -> Artifact | None:
        query = f"SELECT {_ARTIFACT} FROM context.artifacts AS a WHERE {where} AND a.state = 'complete' AND {_ACTS}"
        async with self._database.transaction(actor.user_id) as transaction:
            row = await transaction.row(query, actor.user_id, actor.context_id, wanted)
            if row is None:
                await _refuse_closed(transaction, actor)
        return None if row is None else _artifact(row)

    async def begin(self, actor: Actor, artifact_id: ids.ArtifactId, draft: Draft, wanted: int, room: Room) -> int:
        """Count a file that is about to come, and up to `wanted` bytes for it, as far as there is room; returns how many.

        Raises `QuotaExceeded` for a file too many, `NotFound` or `PermissionDenied` for a thread that the user may not write to.
        """
        async with self._database.transaction(actor.user_id) as transaction:
            await _one_at_a_time(transaction, actor.user_id)
            reserved = await transaction.value(
                _BEGIN, actor.user_id, actor.context_id, artifact_id, draft.request_id, draft.name, draft.media_type, draft.run_id,
                draft.thread_id, wanted, room.bytes, room.count,
            )  # fmt: skip
            if reserved is None:
                await _refuse_closed(transaction, actor)
                await _refuse_thread(transaction, actor, draft.thread_id)
                raise room.refused("artifacts")
        return int(reserved)

    async def reserve(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, wanted: int, limit: int) -> int:
        """Count up to `wanted` bytes for the file, as far as the user's limit goes; returns how many are counted now."""
        async with self._database.transaction(user_id) as transaction:
            await _one_at_a_time(transaction, user_id)
            reserved = await transaction.value(
                # of all that is counted this file's own part is not in the way
                "UPDATE context.artifacts AS mine SET touched_at = now(), reserved = least($3, greatest(mine.reserved,"
                "   $4 + mine.reserved - (SELECT u.reserved FROM context.usage AS u WHERE u.user_id = $1)))"
                " WHERE mine.user_id = $1 AND mine.artifact_id = $2 AND mine.state = 'uploading' RETURNING mine.reserved",
                user_id, artifact_id, wanted, limit,
            )  # fmt: skip
        if reserved is None:
            raise _given_up()
        return int(reserved)

    async def append(self, actor: Actor, artifact_id: ids.ArtifactId, position: int, chunks: Sequence[bytes]) -> None:
        """Keep the next chunks. Raises `FailedPrecondition` when the upload was given up meanwhile."""
        touch = (
            f"UPDATE context.artifacts SET touched_at = now() WHERE user_id = $1 AND artifact_id = $3 AND state = 'uploading' AND {_WRITES}"
        )
        async with self._database.transaction(actor.user_id) as transaction:
            if await transaction.execute(touch, actor.user_id, actor.context_id, artifact_id) != "UPDATE 1":
                await _refuse_closed(transaction, actor)
                raise _given_up()
            for place, data in enumerate(chunks, position):
                await transaction.execute(
                    "INSERT INTO context.artifact_chunks (user_id, artifact_id, position, data) VALUES ($1, $2, $3, $4)",
                    actor.user_id, artifact_id, place, data,
                )  # fmt: skip

    async def complete(self, actor: Actor, artifact_id: ids.ArtifactId, size: int, sha256: str) -> Artifact:
        """Show the file. Raises `Conflict` when the request id is taken, `FailedPrecondition` when the upload was given up, `NotFound`."""
        query = (
            "UPDATE context.artifacts AS a SET state = 'complete', size = $4, reserved = $4, sha256 = $5, created_at = now()"
            f" WHERE a.user_id = $1 AND a.artifact_id = $3 AND a.state = 'uploading' AND {_WRITES} AND {_STAYS}"
            f" RETURNING {_ARTIFACT}"
        )
        async with self._database.transaction(actor.user_id) as transaction:
            row = await transaction.row(query, actor.user_id, actor.context_id, artifact_id, size, bytes.fromhex(sha256))
            if row is None:
                await _refuse_closed(transaction, actor)
                left = "SELECT thread_id FROM context.artifacts WHERE user_id = $1 AND artifact_id = $2 AND state = 'uploading'"
                raise changes.no_thread() if await transaction.value(left, actor.user_id, artifact_id) else _given_up()
        return _artifact(row)

    async def discard(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, state: str) -> bool:
        """Give up a file of the user's own that is in this state; whether there was one."""
        query = "UPDATE context.artifacts SET state = 'discarded' WHERE user_id = $1 AND artifact_id = $2 AND state = $3"
        async with self._database.transaction(user_id) as transaction:
            return await transaction.execute(query, user_id, artifact_id, state) == "UPDATE 1"

    async def delete(self, user_id: ids.UserId, artifact_id: ids.ArtifactId) -> bool:
        """Give up a complete file that the user made, or that lies in a thread of theirs; False when they see no such file.

        Raises `PermissionDenied` for one that they only see.
        """
        seen = f"a.artifact_id = $2 AND a.state = 'complete' AND {_SEEN}"
        query = f"UPDATE context.artifacts AS a SET state = 'discarded' WHERE {seen} AND (a.user_id = $1 OR a.owner_id = $1)"
        async with self._database.transaction(user_id) as transaction:
            if await transaction.execute(query, user_id, artifact_id) == "UPDATE 1":
                return True
            if await transaction.value(f"SELECT EXISTS (SELECT FROM context.artifacts AS a WHERE {seen})", user_id, artifact_id):
                raise errors.PermissionDenied("Only who made the artifact, and the owner of its thread, may delete it.")
        return False

    async def chunk(self, actor: Actor, artifact_id: ids.ArtifactId, position: int) -> bytes | None:
        """One chunk of a complete file that the user may see."""
        query = (
            "SELECT chunk.data FROM context.artifact_chunks AS chunk JOIN context.artifacts AS a USING (artifact_id)"
            f" WHERE chunk.artifact_id = $3 AND chunk.position = $4 AND a.state = 'complete' AND {_SEEN} AND {_ACTS}"
        )
        async with self._database.transaction(actor.user_id) as transaction:
            data: bytes | None = await transaction.value(query, actor.user_id, actor.context_id, artifact_id, position)
            if data is None:
                await _refuse_closed(transaction, actor)
        return data

    async def before(
        self, user_id: ids.UserId, thread_id: ids.ThreadId | None, artifact_id: ids.ArtifactId | None, limit: int
    ) -> list[Artifact]:
        """The user's files, or those of a thread, made before another one, newest first. Raises `NotFound` for the thread."""
        # one statement each for the first page and the later ones: with OR, a plan for both reads all that was before
        later = "" if artifact_id is None else " AND a.artifact_id < $3"
        which = "a.user_id = $1" if thread_id is None else "a.thread_id = $1"
        query = (
            f"SELECT {_ARTIFACT} FROM context.artifacts AS a WHERE {which} AND a.state = 'complete' AND {store_rows.STAYS}{later}"
            " ORDER BY a.artifact_id DESC LIMIT $2"
        )
        place = () if artifact_id is None else (artifact_id,)
        async with self._database.transaction(user_id) as transaction:
            if thread_id is not None:
                await _refuse_hidden(transaction, user_id, thread_id)
            rows = await transaction.fetch(query, thread_id or user_id, limit, *place)
        return [_artifact(row) for row in rows]

    async def usage(self, user_id: ids.UserId) -> tuple[int, int]:
        """How many files the user keeps, and how many bytes these have."""
        async with self._database.transaction(user_id) as transaction:
            row = await transaction.row("SELECT complete, bytes FROM context.usage WHERE user_id = $1", user_id)
        return (0, 0) if row is None else (row["complete"], row["bytes"])


async def _one_at_a_time(transaction: Transaction, user_id: ids.UserId) -> None:
    """Two uploads that each fit must not both be let in where only one does."""
    await transaction.execute("SELECT pg_advisory_xact_lock(hashtextextended('artifacts of ' || $1, 0))", user_id)


async def _refuse_closed(transaction: Transaction, actor: Actor) -> None:
    if actor.context_id is not None:
        await store_rows.refuse_closed(transaction, actor.user_id, actor.context_id)


async def _refuse_thread(transaction: Transaction, actor: Actor, thread_id: ids.ThreadId | None) -> None:
    """A thread that nothing may be put into: one that is not seen does not exist, one that is seen was granted for reading."""
    if thread_id is None:
        return
    if actor.context_id is None:
        await _refuse_hidden(transaction, actor.user_id, thread_id)
    query = f"SELECT t.user_id FROM context.threads AS t WHERE t.thread_id = $1 AND t.erased_at IS NULL AND {store_rows.reader('$2', 't')}"
    owner = await transaction.value(query, thread_id, actor.user_id)
    if owner is None:
        raise changes.no_thread()
    if str(owner) != actor.user_id:
        granted = "SELECT access FROM context.grants WHERE thread_id = $1 AND grantee_id = $2 AND withdrawn_at IS NULL"
        if await transaction.value(granted, thread_id, actor.user_id) != "write":
            raise changes.only_read()


async def _refuse_hidden(transaction: Transaction, user_id: ids.UserId, thread_id: ids.ThreadId) -> None:
    query = (
        "SELECT EXISTS (SELECT FROM context.threads AS t WHERE t.thread_id = $1 AND t.deleted_at IS NULL AND t.erased_at IS NULL"
        f" AND {store_rows.reader('$2', 't')})"
    )
    if not await transaction.value(query, thread_id, user_id):
        raise changes.no_thread()


def _given_up() -> errors.FailedPrecondition:
    return errors.FailedPrecondition("The upload was given up: nothing came for too long. Send it again.")


def _artifact(row: Row) -> Artifact:
    return Artifact(
        artifact_id=ids.ArtifactId(row["artifact_id"]),
        name=row["name"],
        media_type=row["media_type"],
        size=row["size"],
        sha256=row["sha256"].hex(),
        run_id=ids.RunId(row["run_id"]) if row["run_id"] else None,
        created_at=row["created_at"],
        thread_id=ids.ThreadId(row["thread_id"]) if row["thread_id"] else None,
        user_id=ids.UserId(row["user_id"]),
    )
