"""Snapshot first, then changes, then a sign of life; each revocation told once."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from chassis import trust
from netra import errors
from netra.auth.v1 import auth_pb2
from services.auth import feed, permissions, policy, revocations
from tests.fixtures.subjects import Subject

KEY = auth_pb2.Key(kid="k", public_key=b"1" * 32, state=auth_pb2.Key.STATE_CURRENT, issuer="auth")


class _Published:
    """Stands for the rows of keys."""

    def __init__(self) -> None:
        self.now = [KEY]

    async def load(self) -> list[auth_pb2.Key]:
        return list(self.now)


class _Policies:
    """Stands for the policy in force."""

    def __init__(self) -> None:
        self.now = policy.default()
        self.now.version = 1

    async def load(self) -> auth_pb2.Policy:
        return self.now


class _Rows:
    """Stands for the rows of revocations."""

    def __init__(self) -> None:
        self.found: list[revocations.Revocation] = []
        self.asked: list[datetime | None] = []

    async def revocations(self, since: datetime | None, _kept: timedelta) -> tuple[list[revocations.Revocation], datetime]:
        self.asked.append(since)
        return self.found, datetime.now(UTC)


def _ended(session_id: str, ago_s: float = 0.0) -> revocations.Revocation:
    return revocations.Revocation(session_id, datetime.now(UTC) - timedelta(seconds=ago_s))


@pytest.fixture
def rows() -> _Rows:
    return _Rows()


@pytest.fixture
def published() -> _Published:
    return _Published()


@pytest.fixture
async def told(rows: Any, published: Any) -> feed.Feed:
    made = _feed(trust.Trust(), published, rows)
    await made.refresh()
    return made


def _feed(own: trust.Trust, published: Any, rows: Any, **more: Any) -> feed.Feed:
    policies: Any = _Policies()
    return feed.Feed(own, published, policies, revocations.Revocations(rows), 2, **more)


async def test_a_follower_gets_a_snapshot_and_then_changes(told: feed.Feed, rows: _Rows, published: _Published) -> None:
    rows.found = [_ended("s1")]
    await told.refresh()
    with told.watch() as watcher:
        updates = watcher.updates()
        first = await anext(updates)
        assert [key.kid for key in first.keys] == ["k"]
        assert len(first.policy.grants) == len(permissions.ROLES) * len(permissions.TIERS)
        assert [each.session_id for each in first.revocations] == ["s1"]
        await told.withdraw([_ended("s2")])
        second = await anext(updates)
        assert [each.session_id for each in second.revocations] == ["s2"]
        assert not second.keys
        assert not second.HasField("policy")
        rows.found = [_ended("s1"), _ended("s2"), _ended("s3")]
        published.now = [KEY, auth_pb2.Key(kid="k2", public_key=b"2" * 32, issuer="context")]
        await told.refresh()
        third = await anext(updates)
        assert [each.session_id for each in third.revocations] == ["s3"]
        assert [key.kid for key in third.keys] == ["k", "k2"]


async def test_the_end_of_a_silence_is_told_at_once(told: feed.Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    with told.watch() as watcher:
        updates = watcher.updates()
        await anext(updates)
        monkeypatch.setattr(feed, "_CURRENT_S", 0.0)
        await told.refresh()
        async with asyncio.timeout(feed.HEARTBEAT_S / 2):
            assert not (await anext(updates)).ByteSize()


async def test_auth_believes_what_it_tells(rows: Any, published: Any) -> None:
    own = trust.Trust()
    told = _feed(own, published, rows)
    await told.refresh()
    await told.withdraw([_ended("s")])
    assert own.ready
    assert own.fresh
    assert own.revoked(Subject("u", "s"))
    assert not own.revoked(Subject("u", "other"))


async def test_what_ends_here_wakes_the_others_and_what_did_not_change_does_not(rows: Any, published: Any) -> None:
    woken: list[None] = []
    told = _feed(trust.Trust(), published, rows, wake_others=lambda: woken.append(None))
    await told.refresh()
    woken.clear()
    await told.refresh()
    assert woken == []
    await told.withdraw([_ended("s")])
    assert len(woken) == 1
    await told.withdraw([_ended("s")])
    assert len(woken) == 1


async def test_a_user_may_be_withdrawn_again(told: feed.Feed) -> None:
    first, second = (revocations.Revocation("", datetime.now(UTC) - timedelta(seconds=ago), "u", True) for ago in (60, 30))
    with told.watch() as watcher:
        updates = watcher.updates()
        await anext(updates)
        for each in (first, second, first):
            await told.withdraw([each])
        seen = [(await anext(updates)).revocations[0] for _ in range(2)]
    assert [(each.user_id, each.session_id, each.security) for each in seen] == [("u", "", True)] * 2
    assert [each.revoked_at.ToDatetime(UTC) for each in seen] == [first.revoked_at, second.revoked_at]


async def test_who_cannot_know_what_others_withdrew_is_silent_and_not_followed(told: feed.Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    known = [False, False, True]
    watcher = feed.Watcher([], heartbeat_s=0.01, current=lambda: known.pop(0))
    assert (await anext(watcher.updates())).ByteSize() == 0
    assert known == []
    monkeypatch.setattr(feed, "_CURRENT_S", 0.0)
    with pytest.raises(errors.Unavailable), told.watch():
        pass


async def test_silence_is_broken_by_empty_messages() -> None:
    updates = feed.Watcher([], heartbeat_s=0.01).updates()
    assert (await anext(updates)).ByteSize() == 0


async def test_a_follower_that_does_not_keep_up_is_ended() -> None:
    watcher = feed.Watcher([])
    for _ in range(1000):
        watcher.offer(auth_pb2.WatchTrustResponse())
    assert len([update async for update in watcher.updates()]) < 1000


async def test_there_is_a_limit_of_followers_and_places_are_given_back(told: feed.Feed) -> None:
    with told.watch(), told.watch(), pytest.raises(errors.RateLimited), told.watch():
        pass
    with told.watch():
        pass


async def test_closing_ends_the_streams_and_admits_no_more(told: feed.Feed) -> None:
    with told.watch() as watcher:
        told.close()
        assert len([update async for update in watcher.updates()]) == 1
    with pytest.raises(errors.Unavailable), told.watch():
        pass


async def test_a_large_snapshot_comes_in_parts(told: feed.Feed, rows: _Rows) -> None:
    rows.found = [_ended(str(number)) for number in range(45_000)]
    await told.refresh()
    parts = told.snapshot()
    assert [len(part.revocations) for part in parts] == [20_000, 20_000, 5_000]
    assert parts[0].keys
    assert all(part.ByteSize() < 4 * 1024 * 1024 for part in parts)


async def test_reads_look_back_for_late_commits_and_old_revocations_are_forgotten(rows: Any) -> None:
    withdrawn = revocations.Revocations(rows)
    rows.found = [_ended("old", revocations.KEPT.total_seconds() + 1), _ended("new")]
    await withdrawn.poll()
    await withdrawn.poll()
    assert rows.asked[0] is None
    assert datetime.now(UTC) - rows.asked[1] >= timedelta(seconds=60)
    rows.found = []
    await withdrawn.poll()
    assert [each.session_id for each in withdrawn.recent()] == ["new"]
