"""SQL for files and their chunks; every statement is bound to a user id."""

from __future__ import annotations

from collections.abc import Sequence

from chassis.postgres import DatabaseManager, Row
from netra import errors, ids
from services.context.artifacts import Artifact, Draft

_ARTIFACT = "artifact_id, name, media_type, size, sha256, run_id, created_at"


class ArtifactStore:
    """Each method is one transaction of one user; row-level security shows that user's rows and no other."""

    def __init__(self, database: DatabaseManager) -> None:
        self._database = database

    async def by_request(self, user_id: ids.UserId, request_id: ids.RequestId) -> Artifact | None:
        """The user's file that was made under this request id."""
        query = f"SELECT {_ARTIFACT} FROM context.artifacts WHERE user_id = $1 AND request_id = $2 AND state = 'complete'"
        async with self._database.transaction(user_id) as transaction:
            return _artifact(await transaction.row(query, user_id, request_id))

    async def by_id(self, user_id: ids.UserId, artifact_id: ids.ArtifactId) -> Artifact | None:
        """The user's file with this id."""
        query = f"SELECT {_ARTIFACT} FROM context.artifacts WHERE user_id = $1 AND artifact_id = $2 AND state = 'complete'"
        async with self._database.transaction(user_id) as transaction:
            return _artifact(await transaction.row(query, user_id, artifact_id))

    async def begin(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, draft: Draft) -> None:
        """Make room for a file that is about to come."""
        async with self._database.transaction(user_id) as transaction:
            await transaction.execute(
                "INSERT INTO context.artifacts (user_id, artifact_id, request_id, state, name, media_type, reserved, run_id)"
                " VALUES ($1, $2, $3, 'uploading', $4, $5, 0, $6)",
                user_id, artifact_id, draft.request_id, draft.name, draft.media_type, draft.run_id,
            )  # fmt: skip

    async def reserve(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, wanted: int, limit: int) -> int:
        """Count up to `wanted` bytes for the file, as far as the user's limit goes; returns how many are counted now."""
        async with self._database.transaction(user_id) as transaction:
            # two uploads that each fit must not both be let in where only one does
            await transaction.execute("SELECT pg_advisory_xact_lock(hashtextextended('artifacts of ' || $1, 0))", user_id)
            reserved = await transaction.value(
                "UPDATE context.artifacts AS mine SET touched_at = now(), reserved = least($3, greatest(mine.reserved, $4 - ("
                "   SELECT coalesce(sum(other.reserved), 0)::bigint FROM context.artifacts AS other"
                "   WHERE other.user_id = $1 AND other.artifact_id <> $2 AND other.state <> 'discarded')))"
                " WHERE mine.user_id = $1 AND mine.artifact_id = $2 AND mine.state = 'uploading' RETURNING mine.reserved",
                user_id, artifact_id, wanted, limit,
            )  # fmt: skip
        if reserved is None:
            raise _given_up()
        return int(reserved)

    async def append(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, position: int, chunks: Sequence[bytes]) -> None:
        """Keep the next chunks. Raises `FailedPrecondition` when the upload was given up meanwhile."""
        touch = "UPDATE context.artifacts SET touched_at = now() WHERE user_id = $1 AND artifact_id = $2 AND state = 'uploading'"
        async with self._database.transaction(user_id) as transaction:
            if await transaction.execute(touch, user_id, artifact_id) != "UPDATE 1":
                raise _given_up()
            for place, data in enumerate(chunks, position):
                await transaction.execute(
                    "INSERT INTO context.artifact_chunks (user_id, artifact_id, position, data) VALUES ($1, $2, $3, $4)",
                    user_id, artifact_id, place, data,
                )  # fmt: skip

    async def complete(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, size: int, sha256: str) -> Artifact:
        """Show the file. Raises `Conflict` when the request id is taken, `FailedPrecondition` when the upload was given up."""
        query = (
            "UPDATE context.artifacts SET state = 'complete', size = $3, reserved = $3, sha256 = $4, created_at = now()"
            f" WHERE user_id = $1 AND artifact_id = $2 AND state = 'uploading' RETURNING {_ARTIFACT}"
        )
        async with self._database.transaction(user_id) as transaction:
            found = _artifact(await transaction.row(query, user_id, artifact_id, size, bytes.fromhex(sha256)))
        if found is None:
            raise _given_up()
        return found

    async def discard(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, state: str) -> bool:
        """Give up a file that is in this state; whether there was one."""
        query = "UPDATE context.artifacts SET state = 'discarded' WHERE user_id = $1 AND artifact_id = $2 AND state = $3"
        async with self._database.transaction(user_id) as transaction:
            return await transaction.execute(query, user_id, artifact_id, state) == "UPDATE 1"

    async def chunk(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, position: int) -> bytes | None:
        """One chunk of a complete file."""
        async with self._database.transaction(user_id) as transaction:
            data: bytes | None = await transaction.value(
                "SELECT data FROM context.artifact_chunks JOIN context.artifacts USING (user_id, artifact_id)"
                " WHERE user_id = $1 AND artifact_id = $2 AND position = $3 AND state = 'complete'",
                user_id, artifact_id, position,
            )  # fmt: skip
        return data

    async def before(self, user_id: ids.UserId, artifact_id: ids.ArtifactId | None, limit: int) -> list[Artifact]:
        """The user's files made before another one, newest first."""
        async with self._database.transaction(user_id) as transaction:
            rows = await transaction.fetch(
                f"SELECT {_ARTIFACT} FROM context.artifacts"
                " WHERE user_id = $1 AND state = 'complete' AND ($2::uuid IS NULL OR artifact_id < $2)"
                " ORDER BY artifact_id DESC LIMIT $3",
                user_id, artifact_id, limit,
            )  # fmt: skip
        return [found for row in rows if (found := _artifact(row)) is not None]


def _given_up() -> errors.FailedPrecondition:
    return errors.FailedPrecondition("The upload was given up: nothing came for too long. Send it again.")


def _artifact(row: Row | None) -> Artifact | None:
    if row is None:
        return None
    run_id = ids.RunId(row["run_id"]) if row["run_id"] else None
    return Artifact(
        ids.ArtifactId(row["artifact_id"]), row["name"], row["media_type"], row["size"], row["sha256"].hex(), run_id, row["created_at"]
    )
