"""Files of threads: who may put one there, who sees it, and that a closed context neither writes nor reads."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from chassis import channel, postgres
from netra import ids
from netra.context.v1 import context_pb2
from tests.fixtures.users import User
from tests.integration.context.conftest import CHUNK, Artifacts, Parts, content, error_of, header_of, nothing_left, parts_of, until

READ, WRITE = context_pb2.ACCESS_READ, context_pb2.ACCESS_WRITE


async def _thread(artifacts: Artifacts, user: User) -> str:
    return (await artifacts.opened(user))[1].thread_id


async def _grant(artifacts: Artifacts, owner: User, thread_id: str, to: User, access: context_pb2.Access.ValueType) -> None:
    request = context_pb2.GrantThreadRequest(request_id=ids.uuid7(), thread_id=thread_id, user_id=to.user_id, access=access)
    await artifacts.stub.GrantThread(request, metadata=owner.bearer)


async def _withdraw(artifacts: Artifacts, owner: User, thread_id: str, to: User) -> None:
    request = context_pb2.WithdrawGrantRequest(request_id=ids.uuid7(), thread_id=thread_id, grantee_id=to.user_id)
    await artifacts.stub.WithdrawGrant(request, metadata=owner.bearer)


async def _close(artifacts: Artifacts, within: channel.Metadata) -> None:
    await artifacts.stub.CloseContext(context_pb2.CloseContextRequest(), metadata=within)


async def _slowly(header: context_pb2.PutArtifactRequest, data: bytes, on: asyncio.Event) -> Parts:
    """All of it, and the end once that is told."""
    yield header
    for at in range(0, len(data), 64 * 1024):
        yield context_pb2.PutArtifactRequest(data=data[at : at + 64 * 1024])
    await on.wait()
    yield context_pb2.PutArtifactRequest(end=True)


class Circle:
    """An owner of a thread, and others around it."""

    def __init__(self, artifacts: Artifacts, thread_id: str, *users: User) -> None:
        self.artifacts, self.thread_id = artifacts, thread_id
        self.owner, self.reader, self.writer, self.stranger = users

    async def seen(self, user: User) -> list[str] | str:
        """What a user is shown of the thread's files, or the code of the refusal."""
        try:
            page = await self.artifacts.listed(user, thread_id=self.thread_id)
        except Exception:
            return (await error_of(self.artifacts.listed(user, thread_id=self.thread_id))).code
        return [found.artifact_id for found in page.artifacts]


@pytest.fixture
async def circle(artifacts: Artifacts) -> Circle:
    """One thread: its owner, one who may read, one who may write, and a stranger."""
    users = [await artifacts.services.user() for _ in range(4)]
    thread_id = await _thread(artifacts, users[0])
    await _grant(artifacts, users[0], thread_id, users[1], READ)
    await _grant(artifacts, users[0], thread_id, users[2], WRITE)
    return Circle(artifacts, thread_id, *users)


async def test_the_file_of_a_run_belongs_to_its_thread_and_an_upload_may_name_one(artifacts: Artifacts) -> None:
    user = await artifacts.services.user()
    within, frame = await artifacts.opened(user)
    elsewhere = await _thread(artifacts, user)
    made = (await artifacts.stub.PutArtifact(parts_of(b"made", thread_id=elsewhere), metadata=within)).artifact
    named, bare = await artifacts.put(user, b"named", thread_id=frame.thread_id), await artifacts.put(user, b"bare")
    assert (made.run_id, made.thread_id, made.user_id) == (frame.run_id, frame.thread_id, user.user_id)
    assert (named.run_id, named.thread_id) == ("", frame.thread_id)
    assert (bare.thread_id, bare.user_id) == ("", user.user_id)
    assert list((await artifacts.listed(user, thread_id=frame.thread_id)).artifacts) == [named, made]
    assert list((await artifacts.listed(user)).artifacts) == [bare, named, made]
    assert not (await artifacts.listed(user, thread_id=elsewhere)).artifacts


async def test_pages_of_a_thread_go_from_new_to_old(artifacts: Artifacts) -> None:
    user = await artifacts.services.user()
    thread_id = await _thread(artifacts, user)
    puts = [await artifacts.put(user, content(size), thread_id=thread_id) for size in range(5)]
    await artifacts.put(user, b"another")
    first = await artifacts.listed(user, 3, thread_id=thread_id)
    second = await artifacts.listed(user, 3, first.next_page_token, thread_id)
    assert [*first.artifacts, *second.artifacts] == puts[::-1]
    assert not second.next_page_token
    # the figures are those of the user, whatever the page shows
    assert (first.count, first.bytes) == (second.count, second.bytes) == (6, 17)


async def test_the_same_request_for_another_thread_is_refused(artifacts: Artifacts) -> None:
    user, request_id = await artifacts.services.user(), ids.uuid7()
    one, other = await _thread(artifacts, user), await _thread(artifacts, user)
    put = await artifacts.put(user, b"x", request_id=request_id, thread_id=one)
    assert await artifacts.put(user, b"x", request_id=request_id, thread_id=one) == put
    for thread_id in (other, ""):
        assert (await error_of(artifacts.put(user, b"x", request_id=request_id, thread_id=thread_id))).code == "ALREADY_EXISTS"


async def test_owner_and_grantees_see_the_files_of_a_thread_and_others_do_not(circle: Circle) -> None:
    artifacts, data = circle.artifacts, content(2 * CHUNK + 5)
    (within, _), by_owner = await artifacts.opened(circle.writer, circle.thread_id), []
    by_owner.append(await artifacts.put(circle.owner, data, thread_id=circle.thread_id))
    by_writer = (await artifacts.stub.PutArtifact(parts_of(data), metadata=within)).artifact
    uploaded = await artifacts.put(circle.writer, data, thread_id=circle.thread_id)
    assert (by_writer.user_id, by_writer.thread_id) == (circle.writer.user_id, circle.thread_id)
    all_of_them = [uploaded, by_writer, *by_owner]
    for user in (circle.owner, circle.reader, circle.writer):
        assert await circle.seen(user) == [one.artifact_id for one in all_of_them]
        for one in all_of_them:
            assert await artifacts.get(user.bearer, one.artifact_id, 3) == (one, data[3:])
    # a run of a grantee in the thread reads the owner's file
    assert (await artifacts.get(within, by_owner[0].artifact_id))[1] == data
    # everybody's own list and figures are of what they made
    assert [(await artifacts.listed(user)).count for user in (circle.owner, circle.reader, circle.writer)] == [1, 0, 2]
    # who made it deletes it, and the owner of the thread; who only sees it is told that they may not
    assert (await error_of(artifacts.delete(circle.reader, uploaded.artifact_id))).code == "PERMISSION_DENIED"
    assert (await error_of(artifacts.delete(circle.writer, by_owner[0].artifact_id))).code == "PERMISSION_DENIED"
    foreign = await error_of(artifacts.delete(circle.stranger, uploaded.artifact_id))
    unknown = await error_of(artifacts.delete(circle.stranger, ids.ArtifactId.new()))
    assert (foreign.code, foreign.message) == ("NOT_FOUND", unknown.message)
    await artifacts.delete(circle.owner, uploaded.artifact_id)
    again = await artifacts.put(circle.writer, data, thread_id=circle.thread_id)
    await artifacts.delete(circle.writer, again.artifact_id)
    for gone in (uploaded, again):
        assert (await error_of(artifacts.delete(circle.owner, gone.artifact_id))).code == "NOT_FOUND"
    # to a stranger neither the file nor the thread exists, as if nobody had made them
    foreign = await error_of(artifacts.get(circle.stranger.bearer, by_writer.artifact_id))
    unknown = await error_of(artifacts.get(circle.stranger.bearer, ids.ArtifactId.new()))
    assert (foreign.code, foreign.message, foreign.details) == ("NOT_FOUND", unknown.message, unknown.details)
    foreign = await error_of(artifacts.listed(circle.stranger, thread_id=circle.thread_id))
    unknown = await error_of(artifacts.listed(circle.stranger, thread_id=ids.ThreadId.new()))
    assert (foreign.code, foreign.message, foreign.details) == ("NOT_FOUND", unknown.message, unknown.details)


async def test_only_who_may_write_to_a_thread_puts_a_file_there(circle: Circle, admin: postgres.Transaction) -> None:
    artifacts = circle.artifacts

    async def refusal(user: User, thread_id: str) -> tuple[str, str]:
        error = await error_of(artifacts.put(user, content(CHUNK), thread_id=thread_id))
        return error.code, error.message

    unknown = await refusal(circle.stranger, ids.ThreadId.new())
    assert unknown[0] == "NOT_FOUND"
    assert await refusal(circle.stranger, circle.thread_id) == unknown
    # who reads the thread knows that it is there
    assert (await refusal(circle.reader, circle.thread_id))[0] == "PERMISSION_DENIED"
    assert (await refusal(circle.owner, "not-an-id"))[0] == "INVALID_PAYLOAD"
    await nothing_left(admin)


async def test_a_withdrawn_grant_ends_at_once_in_the_middle_of_a_download_and_of_an_upload(circle: Circle) -> None:
    artifacts, on = circle.artifacts, asyncio.Event()
    put = await artifacts.put(circle.owner, content(20 * CHUNK), thread_id=circle.thread_id)
    mine = await artifacts.put(circle.writer, b"mine", thread_id=circle.thread_id)
    call = artifacts.stub.GetArtifact(context_pb2.GetArtifactRequest(artifact_id=put.artifact_id), metadata=circle.writer.bearer)
    assert (await anext(aiter(call))).artifact == put
    header = header_of(thread_id=circle.thread_id)
    upload = artifacts.stub.PutArtifact(_slowly(header, content(CHUNK), on), metadata=circle.writer.bearer)
    await upload.initial_metadata()
    await _withdraw(artifacts, circle.owner, circle.thread_id, circle.writer)
    on.set()

    async def rest() -> int:
        return sum([len(part.data) async for part in call])

    assert (await error_of(rest())).code == "NOT_FOUND"
    assert (await error_of(upload)).code == "NOT_FOUND"
    assert await circle.seen(circle.writer) == "NOT_FOUND"
    assert (await error_of(artifacts.get(circle.writer.bearer, put.artifact_id))).code == "NOT_FOUND"
    # what they made stays theirs, and the owner's to see
    assert (await artifacts.get(circle.writer.bearer, mine.artifact_id))[1] == b"mine"
    assert await circle.seen(circle.owner) == [mine.artifact_id, put.artifact_id]


async def test_a_deleted_thread_hides_its_files_from_others_and_takes_no_more(circle: Circle) -> None:
    artifacts = circle.artifacts
    (going_on, _), request = await artifacts.opened(circle.owner, circle.thread_id), ids.uuid7()
    put = await artifacts.put(circle.owner, b"x", thread_id=circle.thread_id)
    named: dict[str, Any] = {"thread_id": circle.thread_id}
    await artifacts.stub.DeleteThread(context_pb2.DeleteThreadRequest(request_id=request, **named), metadata=circle.owner.bearer)
    for user in (circle.owner, circle.reader, circle.writer):
        assert await circle.seen(user) == "NOT_FOUND"
        assert (await error_of(artifacts.put(user, b"x", **named))).code == "NOT_FOUND"
    assert (await error_of(artifacts.get(circle.reader.bearer, put.artifact_id))).code == "NOT_FOUND"
    # a run of the owner ends well; their own files are theirs
    late = (await artifacts.stub.PutArtifact(parts_of(b"late"), metadata=going_on)).artifact
    assert [found.artifact_id for found in (await artifacts.listed(circle.owner)).artifacts] == [late.artifact_id, put.artifact_id]
    await artifacts.stub.RestoreThread(context_pb2.RestoreThreadRequest(request_id=ids.uuid7(), **named), metadata=circle.owner.bearer)
    assert await circle.seen(circle.reader) == [late.artifact_id, put.artifact_id]


async def test_an_upload_into_a_thread_that_is_erased_meanwhile_leaves_nothing(artifacts: Artifacts, admin: postgres.Transaction) -> None:
    user, on = await artifacts.services.user(), asyncio.Event()
    within, frame = await artifacts.opened(user)
    await _close(artifacts, within)
    header = header_of(thread_id=frame.thread_id)
    upload = artifacts.stub.PutArtifact(_slowly(header, content(4 * CHUNK), on), metadata=user.bearer)
    await upload.initial_metadata()
    request = context_pb2.EraseThreadRequest(request_id=ids.uuid7(), thread_id=frame.thread_id)
    await artifacts.stub.EraseThread(request, metadata=user.bearer)
    on.set()
    assert (await error_of(upload)).code in ("NOT_FOUND", "FAILED_PRECONDITION")
    await nothing_left(admin)


async def test_a_closed_context_neither_writes_nor_reads(artifacts: Artifacts, admin: postgres.Transaction) -> None:
    user, request_id = await artifacts.services.user(), ids.uuid7()
    within, _ = await artifacts.opened(user)
    put = (await artifacts.stub.PutArtifact(parts_of(b"x", request_id=request_id), metadata=within)).artifact
    await _close(artifacts, within)
    for parts in (parts_of(b"y"), parts_of(b"x", request_id=request_id)):
        refused = await error_of(artifacts.stub.PutArtifact(parts, metadata=within))
        assert (refused.code, refused.message) == ("FAILED_PRECONDITION", "The execution context is closed.")
    for artifact_id in (put.artifact_id, ids.ArtifactId.new()):
        assert (await error_of(artifacts.get(within, artifact_id))).code == "FAILED_PRECONDITION"
    assert (await artifacts.get(user.bearer, put.artifact_id))[1] == b"x"
    await nothing_left(admin, complete=1)


async def test_a_context_that_is_closed_meanwhile_ends_its_download_and_its_upload(
    artifacts: Artifacts, admin: postgres.Transaction
) -> None:
    user, on = await artifacts.services.user(), asyncio.Event()
    within, _ = await artifacts.opened(user)
    put = await artifacts.put(user, content(20 * CHUNK))
    download = artifacts.stub.GetArtifact(context_pb2.GetArtifactRequest(artifact_id=put.artifact_id), metadata=within)
    assert (await anext(aiter(download))).artifact == put
    upload = artifacts.stub.PutArtifact(_slowly(header_of(), content(2 * CHUNK), on), metadata=within)
    await upload.initial_metadata()

    async def written() -> bool:
        return bool(await admin.value("SELECT count(*) FROM context.artifact_chunks") == 22)

    await until(written)
    await _close(artifacts, within)
    on.set()

    async def rest() -> int:
        return sum([len(part.data) async for part in download])

    for call in (rest(), upload):
        refused = await error_of(call)
        assert (refused.code, refused.message) == ("FAILED_PRECONDITION", "The execution context is closed.")
    await nothing_left(admin, complete=1)
