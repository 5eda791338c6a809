"""What a process trusts survives its restart, and a damaged snapshot does not keep it from starting."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis import trust
from netra import ids
from netra.auth.v1 import auth_pb2
from tests.fixtures.subjects import Subject


def _update(session_id: str) -> auth_pb2.WatchTrustResponse:
    public_key = Ed25519PrivateKey.generate().public_key().public_bytes_raw()
    revocation = auth_pb2.Revocation(session_id=session_id)
    revocation.revoked_at.FromSeconds(int(time.time()))
    return auth_pb2.WatchTrustResponse(
        keys=[auth_pb2.Key(kid="k1", public_key=public_key, issuer="auth")],
        policy=auth_pb2.Policy(version=1, grants=[auth_pb2.Grant(role="user", tier="free", permissions=["runs:read"])]),
        revocations=[revocation],
    )


async def test_a_restart_remembers_keys_policy_and_revocations(tmp_path: Path) -> None:
    session_id = ids.uuid7()
    await trust.Trust(tmp_path).apply(_update(session_id))
    again = trust.Trust(tmp_path)
    await again.restore()
    assert again.ready
    assert again.revoked(Subject("u", session_id))
    # what lies on the disk may be old
    assert not again.fresh
    assert again.permissions(["user"], "free") == {"runs:read"}


async def test_a_damaged_snapshot_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "trust.bin").write_bytes(b"\xff\xff\xff")
    known = trust.Trust(tmp_path)
    await known.restore()
    assert not known.ready


async def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    known = trust.Trust(tmp_path / "file" / "folder")
    await known.apply(_update(ids.uuid7()))
    assert known.ready


def _withdrawn(at: float, session_id: str = "", user_id: str = "", *, security: bool = False) -> auth_pb2.WatchTrustResponse:
    revocation = auth_pb2.Revocation(session_id=session_id, user_id=user_id, security=security)
    revocation.revoked_at.FromNanoseconds(int(at * 1e9))
    return auth_pb2.WatchTrustResponse(revocations=[revocation])


async def test_a_user_who_was_withdrawn_is_refused_with_what_was_issued_before_and_not_with_what_came_after() -> None:
    known, now = trust.Trust(), time.time()
    await known.apply(_withdrawn(now, user_id="u"))
    assert known.revoked(Subject("u", "s", now - 60))
    assert not known.revoked(Subject("u", "s", now + 1))
    assert not known.revoked(Subject("other", "s", now - 60))


async def test_why_somebody_is_refused_names_security_first() -> None:
    known, now = trust.Trust(), time.time()
    subject = Subject("u", "s", now - 60)
    await known.apply(_withdrawn(now, session_id="s"))
    found = known.revocation(subject)
    assert found is not None
    assert not found.security
    await known.apply(_withdrawn(now, user_id="u", security=True))
    found = known.revocation(subject)
    assert found is not None
    assert found.security


async def test_each_revocation_is_told_once_and_a_later_one_of_the_same_user_again() -> None:
    known, now = trust.Trust(), time.time()
    told: list[auth_pb2.Revocation] = []
    known.on_revocation(told.append)
    for at in (now, now, now + 1, now):
        await known.apply(_withdrawn(at, user_id="u"))
    await known.apply(_withdrawn(now, session_id="s"))
    await known.apply(_withdrawn(now, session_id="s"))
    assert [(each.user_id, each.session_id) for each in told] == [("u", ""), ("u", ""), ("", "s")]


async def test_revocations_are_forgotten_when_no_token_can_live_any_more() -> None:
    known = trust.Trust()
    await known.apply(_withdrawn(time.time() - 3 * 3600, session_id="old"))
    await known.apply(_withdrawn(time.time(), session_id="new"))
    assert not known.revoked(Subject("u", "old"))
    assert known.revoked(Subject("u", "new"))


async def test_silence_makes_stale_and_any_word_fresh_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("chassis.trust.time", SimpleNamespace(monotonic=lambda: clock.now, time=time.time))
    known = trust.Trust(stale_s=60)
    assert not known.fresh
    await known.apply(auth_pb2.WatchTrustResponse())
    clock.now += 59
    assert known.fresh
    clock.now += 2
    assert not known.fresh
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        waiting = group.create_task(known.awaited_fresh())
        await asyncio.sleep(0)
        assert not waiting.done()
        await known.apply(auth_pb2.WatchTrustResponse())
    await known.awaited_fresh()
