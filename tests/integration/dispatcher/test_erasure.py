"""Runs that are erased, and runs that are old, as rows: what goes, what has to wait, and what is nobody else's business."""

from __future__ import annotations

import asyncio

import pytest

from netra import errors, ids
from services.dispatcher import erasure, runs, store_erasure, store_old_system
from tests.fixtures import queued

_CAPS = {**queued.CAPS, "early": 2}
_AGES = "UPDATE dispatcher.runs SET created_at = now() - make_interval(hours => $2), ended_at = now() - make_interval(hours => $2)"


class World:
    """Runs of a queue, and who takes them away."""

    def __init__(self, queue: queued.Queue) -> None:
        self.queue = queue
        self.kept = store_erasure.ErasureStore(queue.mine._database)
        self.erasures = erasure.Erasures(self.kept)
        self.old = store_old_system.OldRuns(queue.everyone._database)

    def sweep(self, **kept_for: int) -> erasure.Sweep:
        """A sweep under a policy."""
        return erasure.Sweep(self.old, self.erasures, lambda tier: kept_for.get(tier, 0), sorted(kept_for))

    async def ended(self, user: ids.UserId, *, hours: int = 0, tier: str = "free", **more: object) -> ids.RunId:
        """A run that was sent a message and ended so long ago."""
        run_id = await self.queue.start(user, tier=tier, **more)
        await self.queue.mine.send(user, runs.Sent(run_id, ids.uuid7(), ids.uuid7(), "Some words."))
        (claim,) = [claim for claim in await self.queue.claim(most=100, caps=_CAPS) if claim.order.run_id == run_id]
        await self.queue.end(claim)
        await self.queue.admin.execute(f"{_AGES} WHERE run_id = $1", run_id, hours)
        return run_id

    async def left(self, table: str) -> set[str]:
        """The runs of which a table has rows."""
        return {row["run_id"] for row in await self.queue.admin.fetch(f"SELECT run_id FROM dispatcher.{table}")}  # noqa: S608 - of tests


@pytest.fixture
def world(queue: queued.Queue) -> World:
    """A world without runs."""
    return World(queue)


def _user() -> ids.UserId:
    return ids.UserId(ids.uuid7())


def _request() -> ids.RequestId:
    return ids.RequestId(ids.uuid7())


@pytest.mark.parametrize("of_thread", [False, True])
async def test_nothing_is_erased_while_a_run_goes_on_and_the_same_request_is_told_the_same(world: World, of_thread: bool) -> None:
    user, thread = _user(), ids.ThreadId.new()
    ended = await world.ended(user, thread_id=thread)
    going = await world.queue.start(user, thread_id=thread)
    asked, named = _request(), str(thread) if of_thread else ""
    with pytest.raises(errors.FailedPrecondition, match=going):
        await world.erasures.erase(user, asked, named)
    assert await world.queue.value(ended, "request") == "What now?"
    (claim,) = await world.queue.claim()
    await world.queue.end(claim)
    first = await world.erasures.erase(user, asked, named)
    assert (first.runs, first.done) == (2, True)
    assert await world.erasures.erase(user, asked, named) == first
    with pytest.raises(errors.AlreadyExists):
        await world.erasures.erase(user, asked, str(ids.ThreadId.new()))
    assert [await world.queue.value(ended, column) for column in ("request", "context_token", "outcome")] == ["", "", None]
    assert await world.left("messages") == set()


async def test_a_run_at_its_very_end_is_waited_for(world: World) -> None:
    user = _user()
    run_id = await world.queue.start(user)
    (claim,) = await world.queue.claim()
    assert await world.queue.everyone.finishing(run_id, claim.epoch, {}) is not None
    async with asyncio.TaskGroup() as group, asyncio.timeout(20):
        erasing = group.create_task(world.erasures.erase(user, _request()))
        while not await world.kept.ending(user, ""):
            pass
        await world.queue.everyone.ended(run_id, claim.epoch, runs.RunState.COMPLETED, b"", {}, context_open=False)
    assert erasing.result().runs == 1


async def test_a_thread_is_that_of_its_owner_and_no_other_users_run_is_touched(world: World) -> None:
    user, other, thread = _user(), _user(), ids.ThreadId.new()
    mine, elsewhere = await world.ended(user, thread_id=thread), await world.ended(user)
    others = await world.ended(other, thread_id=thread)
    assert (await world.erasures.erase(user, _request(), str(thread))).runs == 1
    assert [await world.queue.value(run_id, "request") for run_id in (mine, elsewhere, others)] == ["", "What now?", "What now?"]
    assert await world.left("messages") == {elsewhere, others}


@pytest.mark.parametrize("call", ["erase_some($1, NULL, now(), $2, 10)", "erase_said($1, NULL, now(), 10)", "export_runs($1, $2, 10)"])
async def test_what_runs_as_the_owner_works_for_the_user_of_the_transaction_alone(world: World, call: str) -> None:
    user, other = _user(), _user()
    await world.ended(user)
    nobody = "00000000-0000-0000-0000-000000000000"
    asked = [user, nobody] if "$2" in call else [user]
    for who in (other, None):
        with pytest.raises(errors.PermissionDenied):
            async with world.queue.mine._database.transaction(who) as transaction:
                await transaction.fetch(f"SELECT * FROM dispatcher.{call}", *asked)  # noqa: S608 - of tests
    async with world.queue.mine._database.transaction(user) as transaction:
        await transaction.fetch(f"SELECT * FROM dispatcher.{call}", *asked)  # noqa: S608 - of tests


async def test_what_ended_longer_ago_than_its_tier_is_kept_is_dropped_with_all_that_was_said(world: World) -> None:
    old, young = await world.ended(_user(), hours=8 * 24), await world.ended(_user(), hours=6 * 24)
    kept, unknown = await world.ended(_user(), hours=8 * 24, tier="internal"), await world.ended(_user(), hours=8 * 24, tier="early")
    closing = await world.ended(_user(), hours=8 * 24)
    await world.queue.admin.execute("UPDATE dispatcher.runs SET context_open = true WHERE run_id = $1", closing)
    waits = await world.queue.start(_user())
    await world.queue.admin.execute("UPDATE dispatcher.runs SET created_at = now() - interval '8 days' WHERE run_id = $1", waits)
    await world.sweep(free=7, internal=30, early=0).once()
    assert await world.left("runs") == {young, kept, unknown, closing, waits}
    assert await world.left("messages") == {young, kept, unknown, closing}
    assert old not in await world.left("runs")
    # whatever a policy says, a request is known for its day
    await world.sweep(free=1).once()
    assert young not in await world.left("runs")
    today = await world.ended(_user(), hours=30)
    await world.sweep(free=1).once()
    assert today in await world.left("runs")


async def test_what_is_left_of_an_erased_run_goes_once_its_request_is_not_known_any_more(world: World) -> None:
    user = _user()
    before, lately = await world.ended(user, hours=30), await world.ended(user, hours=3)
    await world.erasures.erase(user, _request())
    assert await world.left("runs") == {before, lately}
    await world.sweep().once()
    assert await world.left("runs") == {lately}


async def test_an_erasure_that_a_crash_interrupted_is_carried_on(world: World) -> None:
    user, asked = _user(), _request()
    run_id = await world.ended(user)
    await world.kept.begin(user, asked, "")
    await world.sweep().once()
    assert await world.queue.value(run_id, "request") == "What now?"
    await world.queue.admin.execute("UPDATE dispatcher.erasures SET asked_at = asked_at - interval '6 minutes'")
    # what ended after it was asked for stays: that run was not meant
    await world.queue.admin.execute("UPDATE dispatcher.runs SET created_at = created_at - interval '10 minutes'")
    later = await world.ended(user)
    await world.sweep().once()
    assert [await world.queue.value(one, "request") for one in (run_id, later)] == ["", "What now?"]
    assert (await world.erasures.erase(user, asked)).runs == 1


async def test_more_runs_than_go_at_once_are_all_erased_and_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(erasure, "_AT_ONCE", 2)
    monkeypatch.setattr(store_erasure, "_RUNS", 2)
    user = _user()
    ended = {await world.ended(user) for _ in range(5)}
    told: set[str] = set()
    after: tuple[object, ...] = ()
    while page := await world.kept.runs(user, after):
        told |= {line.fields["run_id"] for line in page}
        after = page[-1].place
    assert told == ended
    assert (await world.erasures.erase(user, _request())).runs == 5
    assert await world.kept.runs(user, ()) == []


async def test_a_database_that_is_away_leaves_the_sweep_to_the_next_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    swept, tried = asyncio.Event(), 0

    async def once(_: erasure.Sweep) -> None:
        nonlocal tried
        tried += 1
        if tried == 1:
            raise errors.Unavailable
        swept.set()

    monkeypatch.setattr(erasure.Sweep, "once", once)
    async with asyncio.TaskGroup() as group, asyncio.timeout(20):
        task = group.create_task(world.sweep().run(0.001))
        await swept.wait()
        task.cancel()
