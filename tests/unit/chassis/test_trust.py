"""What a process trusts survives its restart, and a damaged snapshot does not keep it from starting."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from chassis import lifecycle, trust
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


async def _kept(known: trust.Trust, meanwhile: Callable[[], Awaitable[object]]) -> None:
    """A process with this trust runs for a time."""
    tasks = lifecycle.Tasks()
    tasks.spawn(known.keep(), "keep")
    await asyncio.sleep(0)
    await meanwhile()
    await tasks.close()


async def _restored(folder: Path) -> trust.Trust:
    """What the next process begins with."""
    again = trust.Trust(folder)
    await again.restore()
    return again


async def test_a_restart_remembers_keys_policy_and_revocations(tmp_path: Path) -> None:
    session_id = ids.uuid7()
    known = trust.Trust(tmp_path)
    await _kept(known, lambda: known.apply(_update(session_id)))
    again = await _restored(tmp_path)
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
    await _kept(known, lambda: known.apply(_update(ids.uuid7())))
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


async def test_a_user_who_was_withdrawn_again_is_not_forgotten_with_the_first_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=time.time())
    monkeypatch.setattr("chassis.trust.time", SimpleNamespace(monotonic=time.monotonic, time=lambda: clock.now))
    known, began = trust.Trust(), clock.now
    await known.apply(_withdrawn(began, user_id="u"))
    await known.apply(_withdrawn(began, session_id="old"))
    await known.apply(_withdrawn(began + 3600, user_id="u"))
    clock.now += 2 * 3600 + 1
    await known.apply(_withdrawn(clock.now, session_id="new"))
    assert not known.revoked(Subject("x", "old"))
    assert known.revoked(Subject("u", "s", began + 60))


async def test_one_more_revocation_costs_the_same_however_many_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    known, now, looked_at = trust.Trust(), time.time(), 0
    time_of = trust._time

    def counted(revocation: auth_pb2.Revocation) -> float:
        nonlocal looked_at
        looked_at += 1
        return time_of(revocation)

    monkeypatch.setattr(trust, "_time", counted)
    costs = []
    for number in range(5_000):
        before = looked_at
        await known.apply(_withdrawn(now, session_id=str(number)))
        costs.append(looked_at - before)
    assert max(costs) <= 3
    assert known.revoked(Subject("u", "0"))


class Disk:
    """Where trust is written: counts, and can be made to wait."""

    def __init__(self, write: Callable[..., None]) -> None:
        self._write, self._loop = write, asyncio.get_running_loop()
        self.writes = self.at_a_time = self.most_at_a_time = 0
        self.begun = asyncio.Event()
        self.free = threading.Event()
        self.free.set()

    def __call__(self, *arguments: Any) -> None:
        """Write, in a thread."""
        self.writes, self.at_a_time = self.writes + 1, self.at_a_time + 1
        self.most_at_a_time = max(self.most_at_a_time, self.at_a_time)
        self._loop.call_soon_threadsafe(self.begun.set)
        self.free.wait(10)
        self._write(*arguments)
        self.at_a_time -= 1


class TestKept:
    """What a process trusts is written for a restart, and nobody waits for that."""

    @pytest.fixture
    async def disk(self, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Disk]:
        slow = Disk(trust._write)
        monkeypatch.setattr(trust, "_write", slow)
        yield slow
        slow.free.set()

    async def test_many_changes_are_one_write_and_the_last_state_is_written_at_the_end(
        self, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(trust, "_SAVED_EVERY_S", 3600.0)
        known = trust.Trust(tmp_path)

        async def many() -> None:
            await known.apply(_update("first"))
            await disk.begun.wait()
            for number in range(2_500):
                await known.apply(_withdrawn(time.time(), session_id=str(number)))
                if number % 250 == 0:
                    # whoever writes could
                    await asyncio.to_thread(lambda: None)
            assert disk.writes == 1

        await _kept(known, many)
        assert disk.writes == 2
        again = await _restored(tmp_path)
        assert again.ready
        assert all(again.revoked(Subject("u", name)) for name in ("first", *map(str, range(2_500))))
        assert await asyncio.to_thread(os.listdir, tmp_path) == ["trust.bin"]

    async def test_what_comes_during_a_write_is_believed_at_once_and_written_after_it(self, tmp_path: Path, disk: Disk) -> None:
        known = trust.Trust(tmp_path)
        disk.free.clear()
        tasks = lifecycle.Tasks()
        keeping = tasks.spawn(known.keep(), "keep")
        await known.apply(_update("first"))
        await disk.begun.wait()
        await known.apply(_withdrawn(time.time(), session_id="second"))
        assert known.revoked(Subject("u", "second"))
        keeping.cancel()
        # as a process that ends lets the loop run on
        asyncio.get_running_loop().call_soon(disk.free.set)
        await asyncio.wait({keeping})
        assert (disk.writes, disk.most_at_a_time) == (2, 1)
        assert (await _restored(tmp_path)).revoked(Subject("u", "second"))

    async def test_nothing_is_written_where_nothing_changed(self, tmp_path: Path, disk: Disk) -> None:
        known = trust.Trust(tmp_path)
        await _kept(known, lambda: known.apply(auth_pb2.WatchTrustResponse()))
        assert disk.writes == 0

    async def test_a_later_change_is_written_too(self, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(trust, "_SAVED_EVERY_S", 0.0)
        known = trust.Trust(tmp_path)

        async def twice() -> None:
            for name in ("first", "second"):
                disk.begun.clear()
                await known.apply(_update(name))
                await disk.begun.wait()

        await _kept(known, twice)
        assert disk.writes == 2


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
