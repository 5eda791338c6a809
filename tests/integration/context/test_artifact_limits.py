"""How many files a user may keep, and how large together: what the tier says, exactly, and never more than the installation allows."""

from __future__ import annotations

import asyncio

import grpc

from chassis import postgres, status
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from tests.fixtures.policies import Administrator, limited
from tests.integration.context.conftest import CHUNK, Artifacts, Start, content, error_of, nothing_left, parts_of


async def _in_force(there: Artifacts, /, tier: str = "free", **figures: int) -> None:
    await (await Administrator(there.services).signed_in()).change_everywhere(limited(tier, **figures))


def _shown(error: errors.NetraError) -> tuple[str, str, str, str]:
    return error.code, str(error.details["kind"]), str(error.details["limit"]), str(error.details["tier"])


async def test_a_tier_has_so_many_artifacts_exactly_even_at_once(artifacts: Artifacts, admin: postgres.Transaction) -> None:
    await _in_force(artifacts, artifacts=5)
    user, other = await artifacts.services.user(tier="free"), await artifacts.services.user(tier="free")
    first = await artifacts.put(user, b"0")
    puts = await asyncio.gather(*(artifacts.put(user, b"x", size=number % 2) for number in range(8)), return_exceptions=True)
    refusals = [_shown(status.from_rpc(put)) for put in puts if isinstance(put, grpc.aio.AioRpcError)]
    assert refusals == [("QUOTA_EXCEEDED", "artifacts", "5", "free")] * 4
    page = await artifacts.listed(user, 2)
    assert (page.count, page.bytes, page.max_count, len(page.artifacts)) == (5, 5, 5, 2)
    # others are not concerned; what was deleted does not count; what a run makes does
    assert (await artifacts.put(other, b"x")).size == 1
    await artifacts.delete(user, first.artifact_id)
    (within, _), full = await artifacts.within(user), ("QUOTA_EXCEEDED", "artifacts", "5", "free")
    await artifacts.stub.PutArtifact(parts_of(b"y"), metadata=within)
    assert _shown(await error_of(artifacts.stub.PutArtifact(parts_of(b"z"), metadata=within))) == full
    assert _shown(await error_of(artifacts.put(user, b""))) == full
    await nothing_left(admin, complete=6)


async def test_what_is_there_may_be_sent_again_when_nothing_more_may_be_kept(artifacts: Artifacts) -> None:
    await _in_force(artifacts, artifacts=1)
    user, request_id = await artifacts.services.user(tier="free"), ids.uuid7()
    put = await artifacts.put(user, b"x", request_id=request_id)
    assert await artifacts.put(user, b"x", request_id=request_id) == put


async def test_a_tier_has_so_many_bytes_exactly_even_at_once(artifacts: Artifacts, admin: postgres.Transaction) -> None:
    await _in_force(artifacts, artifact_bytes=3 * CHUNK)
    user = await artifacts.services.user(tier="free")
    # told and not told: of those that come without a size, room is counted as they come
    sizes = [CHUNK, 0, CHUNK, 0, CHUNK, 0]
    puts = await asyncio.gather(*(artifacts.put(user, content(CHUNK), size=size) for size in sizes), return_exceptions=True)
    refusals = [_shown(status.from_rpc(put)) for put in puts if isinstance(put, grpc.aio.AioRpcError)]
    assert set(refusals) == {("QUOTA_EXCEEDED", "artifact_bytes", str(3 * CHUNK), "free")}
    page = await artifacts.listed(user)
    assert page.bytes <= page.max_bytes == 3 * CHUNK
    left = (page.max_bytes - page.bytes) // CHUNK
    for _ in range(left):
        await artifacts.put(user, content(CHUNK), size=CHUNK)
    refused = await error_of(artifacts.put(user, b"x", size=1))
    assert _shown(refused) == ("QUOTA_EXCEEDED", "artifact_bytes", str(3 * CHUNK), "free")
    assert "free" in refused.message
    assert str(3 * CHUNK) in refused.message
    # nothing at all has room still
    await artifacts.put(user, b"")
    assert (await artifacts.listed(user)).bytes == 3 * CHUNK
    await nothing_left(admin, complete=4)


async def test_what_is_counted_is_what_there_is_whatever_happens_to_files(artifacts: Artifacts, admin: postgres.Transaction) -> None:
    user, other = await artifacts.services.user(), await artifacts.services.user()
    put = [await artifacts.put(user, content(size), size=size % 2 * size) for size in (1, 10, CHUNK, 0)]
    await artifacts.put(other, b"xy")
    # one breaks, one is deleted, one sent twice; what is given up counts no more, whoever gives it up
    broken = parts_of(b"abc", size=4)
    assert (await error_of(artifacts.stub.PutArtifact(broken, metadata=user.bearer))).code == "INVALID_PAYLOAD"
    await artifacts.delete(user, put[1].artifact_id)
    await asyncio.gather(*(artifacts.put(user, b"same", request_id="same") for _ in range(3)))
    await nothing_left(admin, complete=5)
    counted = "SELECT user_id::text, files, reserved, complete, bytes FROM context.usage ORDER BY user_id"
    there = (
        "SELECT user_id::text, count(*), sum(reserved)::bigint, count(*), sum(size)::bigint FROM context.artifacts"
        " WHERE state = 'complete' GROUP BY user_id ORDER BY user_id"
    )
    assert [tuple(row) for row in await admin.fetch(counted)] == [tuple(row) for row in await admin.fetch(there)]
    page = await artifacts.listed(user, 2)
    assert (page.count, page.bytes) == (4, CHUNK + 5)
    # of several users in one statement, and to nothing
    await admin.execute("UPDATE context.artifacts SET state = 'discarded'")
    assert {tuple(row)[1:] for row in await admin.fetch(counted)} == {(0, 0, 0, 0)}


async def test_nobody_counts_as_they_like(artifacts: Artifacts, admin: postgres.Transaction) -> None:
    await artifacts.put(await artifacts.services.user(), b"x")
    for role in ("netra_context", "netra_context_system"):
        for command in ("INSERT", "UPDATE"):
            assert await admin.value("SELECT has_any_column_privilege($1, 'context.usage', $2)", role, command) is False
        assert await admin.value("SELECT has_function_privilege($1, 'context.count_artifacts()', 'EXECUTE')", role) is False


async def test_the_installation_allows_no_tier_more_than_itself(start: Start) -> None:
    artifacts = await start(artifacts_max_per_user=2, artifacts_max_bytes_per_user=10)
    user = await artifacts.services.user(tier="internal")
    page = await artifacts.listed(user)
    assert (page.max_count, page.max_bytes) == (2, 10)
    await artifacts.put(user, content(9))
    assert _shown(await error_of(artifacts.put(user, content(2)))) == ("QUOTA_EXCEEDED", "artifact_bytes", "10", "internal")
    await artifacts.put(user, content(1))
    assert _shown(await error_of(artifacts.put(user, b""))) == ("QUOTA_EXCEEDED", "artifacts", "2", "internal")


async def test_a_policy_that_does_not_say_leaves_it_to_the_installation(start: Start) -> None:
    """Policies that were changed by a person before there were these figures go on as they are; 0 is a figure."""
    artifacts = await start(artifacts_max_per_user=7, artifacts_max_bytes_per_user=70)

    def older(policy: auth_pb2.Policy) -> None:
        for limits in policy.limits:
            limits.ClearField("artifacts")
            limits.ClearField("artifact_bytes")

    administrator = await Administrator(artifacts.services).signed_in()
    await administrator.change_everywhere(older)
    assert not any(limits.HasField("artifacts") for limits in (await administrator.policy()).limits)
    user = await artifacts.services.user(tier="free")
    page = await artifacts.listed(user)
    assert (page.max_count, page.max_bytes) == (7, 70)
    await artifacts.put(user, content(70))
    await _in_force(artifacts, artifacts=0)
    assert _shown(await error_of(artifacts.put(user, b""))) == ("QUOTA_EXCEEDED", "artifacts", "0", "free")
    page = await artifacts.listed(user)
    assert (page.count, page.max_count, page.max_bytes) == (1, 0, 70)
    with_less = await error_of(_changed(administrator, artifact_bytes=-1))
    assert (with_less.code, with_less.details["field"]) == ("INVALID_PAYLOAD", "policy.limits[0].artifact_bytes")


async def _changed(administrator: Administrator, **figures: int) -> int:
    return await administrator.change(limited("free", **figures))
