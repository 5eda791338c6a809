"""Files of users over a real database: whole or not at all, within limits, and for their owner alone."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import grpc
import pytest

from chassis import postgres, status
from netra import ids
from netra.context.v1 import context_pb2
from services.context.store_left_over_system import LeftOverStore
from standalone import prepare
from tests.fixtures.stack import Standalone
from tests.integration.context.conftest import (
    CHUNK,
    PIECE,
    Artifacts,
    Parts,
    Start,
    content,
    error_of,
    header_of,
    nothing_left,
    parts_of,
    until,
)

SIZES = [(0, PIECE), (1, 1), (CHUNK - 1, PIECE), (CHUNK, PIECE), (CHUNK + 1, 7919), (5 * CHUNK + 3, PIECE), (9999, 100)]


@pytest.mark.parametrize("told", [True, False])
async def test_what_was_put_comes_back_byte_for_byte(artifacts: Artifacts, told: bool) -> None:
    user, puts = await artifacts.services.user(), []
    for size, piece in SIZES:
        data = content(size)
        sha256 = hashlib.sha256(data).hexdigest()
        more = {"size": size, "sha256": sha256, "end": False} if told else {}
        put = await artifacts.put(user, data, piece, name="été 1.csv", media_type="text/csv; charset=utf-8", **more)
        assert (put.name, put.media_type, put.size, put.sha256, put.run_id) == ("été 1.csv", "text/csv", size, sha256, "")
        for offset in {0, size // 2, min(size, CHUNK), size}:
            found, got = await artifacts.get(user.bearer, put.artifact_id, offset)
            assert (found, got) == (put, data[offset:])
        puts.append(put)
    assert list((await artifacts.listed(user)).artifacts) == puts[::-1]


async def test_an_offset_behind_the_end_is_refused(artifacts: Artifacts) -> None:
    user = await artifacts.services.user()
    put = await artifacts.put(user, content(10))
    for offset in (-1, 11, 2**62):
        refused = await error_of(artifacts.get(user.bearer, put.artifact_id, offset))
        assert (refused.code, refused.details["field"]) == ("INVALID_PAYLOAD", "offset")


async def test_the_same_request_makes_one_artifact_and_another_one_is_refused(artifacts: Artifacts, admin: postgres.Transaction) -> None:
    user, other, data, request_id = await artifacts.services.user(), await artifacts.services.user(), content(3 * CHUNK), ids.uuid7()
    puts = await asyncio.gather(*(artifacts.put(user, data, request_id=request_id) for _ in range(5)))
    assert len({put.artifact_id for put in puts}) == 1
    assert await artifacts.put(user, data, request_id=request_id) == puts[0]
    assert len((await artifacts.listed(user)).artifacts) == 1
    changed: list[tuple[bytes, dict[str, Any]]] = [
        (data[:-1] + b"x", {}), (data[:-1], {}), (data, {"name": "b"}), (data, {"media_type": "text/plain"})
    ]  # fmt: skip
    for bytes_, more in changed:
        refused = await error_of(artifacts.put(user, bytes_, request_id=request_id, **more))
        assert (refused.code, refused.details["field"]) == ("ALREADY_EXISTS", "request_id")
    # the losers left nothing behind; the request id of one user is free for another
    await nothing_left(admin, complete=1)
    assert (await artifacts.put(other, data, request_id=request_id)).artifact_id != puts[0].artifact_id


NOT_AS_TOLD: list[tuple[dict[str, Any], str]] = [
    ({"sha256": "0" * 64}, "sha256"),
    ({"size": 3 * CHUNK + 1}, "size"),
    ({"size": 3 * CHUNK - 1}, "size"),
    ({"end": False}, "end"),
    ({"piece": PIECE + 1}, "data"),
    ({"name": "a/b"}, "name"),
    ({"media_type": "application/x-msdownload"}, "media_type"),
    ({"request_id": ""}, "request_id"),
]


async def test_what_is_not_as_told_leaves_nothing(artifacts: Artifacts, admin: postgres.Transaction) -> None:
    user = await artifacts.services.user()
    for more, field in NOT_AS_TOLD * 3:
        # refused while much more is on its way: the reason arrives all the same
        refused = await error_of(artifacts.put(user, content(3 * CHUNK), **more))
        assert (refused.code, refused.details.get("field")) == ("INVALID_PAYLOAD", field)
    assert not (await artifacts.listed(user)).artifacts
    await nothing_left(admin)


async def _endless(header: context_pb2.PutArtifactRequest, first: bytes, stop: asyncio.Event) -> Parts:
    yield header
    for at in range(0, len(first), PIECE):
        yield context_pb2.PutArtifactRequest(data=first[at : at + PIECE])
    await stop.wait()


async def _chunks(admin: postgres.Transaction, count: int) -> None:

    async def found() -> bool:
        return bool(await admin.value("SELECT count(*) FROM context.artifact_chunks") >= count)

    await until(found)


@pytest.mark.parametrize("size", [0, 10 * CHUNK])
async def test_an_upload_that_is_cancelled_leaves_nothing(artifacts: Artifacts, admin: postgres.Transaction, size: int) -> None:
    user, stop, request_id = await artifacts.services.user(), asyncio.Event(), ids.uuid7()
    parts = _endless(header_of(request_id=request_id, size=size), content(4 * CHUNK), stop)
    call = artifacts.stub.PutArtifact(parts, metadata=user.bearer)
    await call.initial_metadata()
    await _chunks(admin, 4)
    call.cancel()
    await nothing_left(admin)
    stop.set()
    assert not (await artifacts.listed(user)).artifacts
    # the request id was not used up
    await artifacts.put(user, content(5), request_id=request_id)


async def test_an_upload_that_stalls_is_ended(start: Start, admin: postgres.Transaction) -> None:
    artifacts = await start(artifact_stall_s=0.3)
    user, stop = await artifacts.services.user(), asyncio.Event()
    refused = await error_of(artifacts.stub.PutArtifact(_endless(header_of(), content(2 * CHUNK), stop), metadata=user.bearer))
    stop.set()
    assert refused.code == "DEADLINE_EXCEEDED"
    await nothing_left(admin)


async def test_one_artifact_has_a_limit(start: Start, admin: postgres.Transaction) -> None:
    artifacts = await start(artifact_max_bytes=2 * CHUNK)
    user, stop = await artifacts.services.user(), asyncio.Event()
    assert (await artifacts.put(user, content(2 * CHUNK))).size == 2 * CHUNK
    # told, it is refused before a byte was sent; not told, while more would come
    for header, first in ((header_of(size=2 * CHUNK + 1), b""), (header_of(), content(2 * CHUNK + 1))):
        refused = await error_of(artifacts.stub.PutArtifact(_endless(header, first, stop), metadata=user.bearer))
        assert (refused.code, refused.details["limit"]) == ("FRAME_TOO_LARGE", str(2 * CHUNK))
    stop.set()
    await nothing_left(admin, complete=1)


async def test_all_artifacts_of_a_user_have_a_limit(start: Start, admin: postgres.Transaction) -> None:
    artifacts = await start(artifacts_max_bytes_per_user=4 * CHUNK)
    user, other = await artifacts.services.user(), await artifacts.services.user()
    first = await artifacts.put(user, content(2 * CHUNK))
    refused = await error_of(artifacts.put(user, content(2 * CHUNK + 1), size=2 * CHUNK + 1))
    assert (refused.code, refused.details["limit"]) == ("QUOTA_EXCEEDED", str(4 * CHUNK))
    assert (await error_of(artifacts.put(user, content(2 * CHUNK + 1)))).code == "QUOTA_EXCEEDED"
    # of several that each fit, at once, only as many get in as fit together
    puts = await asyncio.gather(*(artifacts.put(user, content(CHUNK), size=CHUNK) for _ in range(5)), return_exceptions=True)
    refusals = [status.from_rpc(put).code for put in puts if isinstance(put, grpc.aio.AioRpcError)]
    assert refusals == ["QUOTA_EXCEEDED"] * 3
    # others are not concerned; what was deleted does not count
    await artifacts.put(other, content(4 * CHUNK), size=4 * CHUNK)
    await artifacts.delete(user, first.artifact_id)
    await artifacts.put(user, content(2 * CHUNK), size=2 * CHUNK)
    await nothing_left(admin, complete=4)


async def test_a_deleted_artifact_is_gone(artifacts: Artifacts, admin: postgres.Transaction) -> None:
    user, request_id = await artifacts.services.user(), ids.uuid7()
    put = await artifacts.put(user, content(40 * CHUNK), request_id=request_id)
    await artifacts.delete(user, put.artifact_id)
    assert (await error_of(artifacts.get(user.bearer, put.artifact_id))).code == "NOT_FOUND"
    assert (await error_of(artifacts.delete(user, put.artifact_id))).code == "NOT_FOUND"
    assert not (await artifacts.listed(user)).artifacts
    await nothing_left(admin)
    assert (await artifacts.put(user, content(3), request_id=request_id)).artifact_id != put.artifact_id


async def test_a_download_ends_when_the_artifact_is_deleted(artifacts: Artifacts, admin: postgres.Transaction) -> None:
    user = await artifacts.services.user()
    put = await artifacts.put(user, content(20 * CHUNK))
    call = artifacts.stub.GetArtifact(context_pb2.GetArtifactRequest(artifact_id=put.artifact_id), metadata=user.bearer)
    assert (await anext(aiter(call))).artifact == put
    # past the service, so that nothing removes the chunks meanwhile
    await admin.execute("UPDATE context.artifacts SET state = 'discarded' WHERE artifact_id = $1", put.artifact_id)

    async def rest() -> int:
        return sum([len(part.data) async for part in call])

    assert (await error_of(rest())).code == "NOT_FOUND"


async def test_pages_go_from_new_to_old(artifacts: Artifacts) -> None:
    user = await artifacts.services.user()
    puts = [await artifacts.put(user, content(size)) for size in range(5)]
    first = await artifacts.listed(user, 3)
    second = await artifacts.listed(user, 3, first.next_page_token)
    assert [*first.artifacts, *second.artifacts] == puts[::-1]
    assert not second.next_page_token
    refused = await error_of(artifacts.listed(user, 3, "bTox"))
    assert (refused.code, refused.details["field"]) == ("INVALID_PAYLOAD", "page_token")


async def test_the_dispatcher_acts_for_the_user_of_the_context(artifacts: Artifacts) -> None:
    owner, stranger, data = await artifacts.services.user(), await artifacts.services.user(), content(CHUNK + 5)
    (within, run_id), (elsewhere, _) = await artifacts.within(owner), await artifacts.within(stranger)
    put = (await artifacts.stub.PutArtifact(parts_of(data), metadata=within)).artifact
    assert put.run_id == run_id
    attached = await artifacts.put(owner, data)
    for artifact in (put, attached):
        assert (await artifacts.get(within, artifact.artifact_id))[1] == data
        assert (await artifacts.get(owner.bearer, artifact.artifact_id))[1] == data
        assert (await error_of(artifacts.get(elsewhere, artifact.artifact_id))).code == "NOT_FOUND"
    # without a context there is no user to act for
    bare = within[:1]
    assert (await error_of(artifacts.get(bare, put.artifact_id))).code == "UNAUTHENTICATED"
    assert (await error_of(artifacts.stub.PutArtifact(parts_of(data), metadata=bare))).code == "UNAUTHENTICATED"


async def test_a_stranger_gets_nothing(artifacts: Artifacts) -> None:
    owner, stranger = await artifacts.services.user(), await artifacts.services.user()
    put = await artifacts.put(owner, content(100))
    foreign = await error_of(artifacts.get(stranger.bearer, put.artifact_id))
    missing = await error_of(artifacts.get(stranger.bearer, ids.ArtifactId.new()))
    assert (foreign.code, foreign.message, foreign.details) == ("NOT_FOUND", missing.message, missing.details)
    assert (await error_of(artifacts.delete(stranger, put.artifact_id))).code == "NOT_FOUND"
    assert not (await artifacts.listed(stranger)).artifacts
    # the owner can do all of it
    assert (await artifacts.get(owner.bearer, put.artifact_id))[1] == content(100)
    assert [found.artifact_id for found in (await artifacts.listed(owner)).artifacts] == [put.artifact_id]
    await artifacts.delete(owner, put.artifact_id)


async def test_a_readonly_user_may_look_but_not_keep(artifacts: Artifacts) -> None:
    reader, stop = await artifacts.services.user(role="readonly"), asyncio.Event()
    assert not (await artifacts.listed(reader)).artifacts
    refused = await error_of(artifacts.stub.PutArtifact(_endless(header_of(), b"", stop), metadata=reader.bearer))
    stop.set()
    assert (refused.code, refused.details["permission"]) == ("PERMISSION_DENIED", "artifacts:write")
    assert (await error_of(artifacts.delete(reader, ids.ArtifactId.new()))).code == "PERMISSION_DENIED"


async def test_who_removes_what_is_left_over_sees_no_file_that_anybody_has(
    artifacts: Artifacts, admin: postgres.Transaction, stores: Standalone, database: str
) -> None:
    user, stop = await artifacts.services.user(), asyncio.Event()
    await artifacts.put(user, content(2 * CHUNK))
    call = artifacts.stub.PutArtifact(_endless(header_of(), content(2 * CHUNK), stop), metadata=user.bearer)
    await _chunks(admin, 4)
    address = prepare.dsn(
        stores.postgres_admin_url, "netra_context_system", (stores.secrets / "context" / "postgres_system").read_text().strip(), database
    )
    async with postgres.connection(address) as system:
        assert await system.value("SELECT count(artifact_id) FROM context.artifacts") == 1
        assert await system.value("SELECT count(position) FROM context.artifact_chunks") == 2
        assert await system.execute("DELETE FROM context.artifact_chunks WHERE position = 7") == "DELETE 0"
        for column in ("data", "user_id"):
            allowed = await system.value("SELECT has_column_privilege('context.artifact_chunks', $1, 'SELECT')", column)
            assert allowed is False
    call.cancel()
    stop.set()
    await nothing_left(admin, complete=1)


async def test_what_a_dead_process_left_is_removed_after_an_hour(
    artifacts: Artifacts, admin: postgres.Transaction, stores: Standalone, database: str
) -> None:
    user, stop = await artifacts.services.user(), asyncio.Event()
    headers = [header_of(name=name, size=2 * CHUNK) for name in "ab"]
    calls = [artifacts.stub.PutArtifact(_endless(header, content(2 * CHUNK), stop), metadata=user.bearer) for header in headers]
    await _chunks(admin, 4)
    await admin.execute("UPDATE context.artifacts SET touched_at = now() - interval '61 minutes' WHERE name = 'a'")
    password = (stores.secrets / "context" / "postgres_system").read_text().strip()
    database_ = await postgres.open_pool(prepare.dsn(stores.postgres_admin_url, "netra_context_system", password, database), "sweep")
    try:
        system = LeftOverStore(database_)
        await system.give_up_abandoned()
        while await system.remove_some():
            pass
    finally:
        await database_.close()
    assert [row["name"] for row in await admin.fetch("SELECT name FROM context.artifacts")] == ["b"]
    assert await admin.value("SELECT count(*) FROM context.artifact_chunks") == 2
    stop.set()
    assert (await error_of(calls[0])).code == "FAILED_PRECONDITION"
    assert (await calls[1]).artifact.name == "b"


async def test_one_user_cannot_take_all_slots(start: Start, admin: postgres.Transaction) -> None:
    artifacts = await start(artifacts_moving=3, artifacts_moving_per_user=2)
    user, other, stop = await artifacts.services.user(), await artifacts.services.user(), asyncio.Event()
    calls = [artifacts.stub.PutArtifact(_endless(header_of(size=1), b"x", stop), metadata=user.bearer) for _ in range(4)]

    async def two() -> bool:
        return bool(await admin.value("SELECT count(*) FROM context.artifacts") == 2)

    await until(two)
    await artifacts.put(other, content(CHUNK))
    assert await admin.value("SELECT count(*) FROM context.artifacts WHERE state = 'uploading'") == 2
    stop.set()
    # the others waited for theirs
    assert len({(await call).artifact.artifact_id for call in calls}) == 4
