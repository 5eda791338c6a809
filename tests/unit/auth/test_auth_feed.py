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
    """Stands for the policy in force, the last thing that a look reads."""

    def __init__(self) -> None:
        self.now = policy.default()
        self.now.version = 1
        self.error: errors.NetraError | None = None
        self.asked, self.answers = asyncio.Event(), asyncio.Event()
        self.answers.set()

    async def load(self) -> auth_pb2.Policy:
        self.asked.set()
        await self.answers.wait()
        if self.error is not None:
            raise self.error
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
def policies() -> _Policies:
    return _Policies()


@pytest.fixture
def own() -> trust.Trust:
    return trust.Trust()


@pytest.fixture
async def told(own: trust.Trust, rows: Any, published: Any, policies: Any) -> feed.Feed:
    made = _feed(own, published, rows, policies)
    await made.refresh()
    return made


def _feed(own: trust.Trust, published: Any, rows: Any, policies: Any = None, **more: Any) -> feed.Feed:
    in_force: Any = policies or _Policies()
    return feed.Feed(own, published, in_force, revocations.Revocations(rows), 2, **more)


def _change(rows: _Rows, published: _Published, policies: _Policies) -> None:
    """Something of each kind happened elsewhere."""
    rows.found = [_ended("s")]
    published.now = [KEY, auth_pb2.Key(kid="k2", public_key=b"2" * 32, issuer="context")]
    policies.now = policy.default()
    policies.now.version = 2


def _said(update: auth_pb2.WatchTrustResponse) -> tuple[list[str], list[str], int]:
    return [each.session_id for each in update.revocations], [key.kid for key in update.keys], update.policy.version


class TestNothingIsLost:
    """What is known to have been told has been told, whatever went wrong on the way."""

    async def test_when_the_database_goes_away_in_the_middle_of_a_look(
        self, told: feed.Feed, own: trust.Trust, rows: _Rows, published: _Published, policies: _Policies
    ) -> None:
        with told.watch() as watcher:
            updates = watcher.updates()
            await anext(updates)
            _change(rows, published, policies)
            policies.error = errors.Unavailable()
            for _ in range(2):
                with pytest.raises(errors.Unavailable):
                    await told.refresh()
            policies.error = None
            await told.refresh()
            assert _said(await anext(updates)) == (["s"], ["k", "k2"], 2)
        assert own.revoked(Subject("u", "s"))
        assert (own.policy_version, own.key("context", "k2") is not None) == (2, True)
        # a look that came to nothing counts for nothing: however long that went on, the next one begins where it did
        assert rows.asked[1] == rows.asked[2] == rows.asked[3]

    async def test_when_whoever_waits_for_a_look_is_cancelled(
        self, told: feed.Feed, own: trust.Trust, rows: _Rows, published: _Published, policies: _Policies
    ) -> None:
        with told.watch() as watcher:
            updates = watcher.updates()
            await anext(updates)
            _change(rows, published, policies)
            policies.asked.clear()
            policies.answers.clear()
            async with asyncio.timeout(5), asyncio.TaskGroup() as group:
                rpc = group.create_task(told.refresh())
                await policies.asked.wait()
                rpc.cancel()
            policies.answers.set()
            async with asyncio.timeout(5):
                assert _said(await anext(updates)) == (["s"], ["k", "k2"], 2)
        assert own.revoked(Subject("u", "s"))
        await told.stop()

    async def test_a_look_that_is_under_way_at_the_end_is_broken_off(self, told: feed.Feed, policies: _Policies) -> None:
        policies.asked.clear()
        policies.answers.clear()
        async with asyncio.timeout(5), asyncio.TaskGroup() as group:
            waiting = group.create_task(told.refresh())
            await policies.asked.wait()
            await told.stop()
        assert waiting.cancelled()


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


async def test_many_at_once_come_in_parts(told: feed.Feed, rows: _Rows, published: _Published, policies: _Policies) -> None:
    with told.watch() as watcher:
        updates = watcher.updates()
        await anext(updates)
        _change(rows, published, policies)
        rows.found = [_ended(str(number)) for number in range(25_000)]
        await told.refresh()
        first, second = await anext(updates), await anext(updates)
    assert [len(each.revocations) for each in (first, second)] == [20_000, 5_000]
    assert (len(first.keys), first.policy.version) == (2, 2)
    assert (len(second.keys), second.HasField("policy")) == (0, False)


async def test_reads_look_back_for_late_commits_and_old_revocations_are_forgotten(rows: Any) -> None:
    withdrawn = revocations.Revocations(rows)
    rows.found = [_ended("old", revocations.KEPT.total_seconds() + 1), _ended("new")]
    withdrawn.take(await withdrawn.look())
    withdrawn.take(await withdrawn.look())
    assert rows.asked[0] is None
    assert datetime.now(UTC) - rows.asked[1] >= timedelta(seconds=60)
    rows.found = []
    withdrawn.take(await withdrawn.look())
    assert [each.session_id for each in withdrawn.recent()] == ["new"]
