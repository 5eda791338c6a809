"""What is done at once of what was erased or given up, and what is left to who sweeps."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from chassis.lifecycle import Tasks
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from services.context import artifacts, changes, privacy, slots, uploads

_USER = ids.UserId.new()


class _Endless:
    """Has always more to remove; counts how often it is asked, and is away when it is told to be."""

    def __init__(self, *, away: bool = False) -> None:
        self.asked, self.away = 0, away

    async def thread(self, thread_id: ids.ThreadId) -> bool:
        return self._more()

    async def of_user(self, user_id: ids.UserId, request_id: ids.RequestId) -> bool:
        return self._more()

    def _more(self) -> bool:
        self.asked += 1
        if self.away:
            raise errors.Unavailable
        return True


class _Erased:
    """Takes everything away as it is asked."""

    async def erase_thread(self, change: changes.Change) -> privacy.Removed:
        return privacy.Removed(threads=1)

    async def erase_everything(self, change: changes.Change) -> privacy.Removed:
        return privacy.Removed(threads=2)


@pytest.mark.parametrize("away", [False, True])
@pytest.mark.timeout(10)
async def test_an_erasure_is_answered_however_much_there_is_to_remove(away: bool) -> None:
    rows, told, kept = _Endless(away=away), list[int](), _Erased()
    some: Any = rows
    erased: Any = kept
    both = privacy.Privacy(erased, privacy.Removal(some, timedelta(days=30)), lambda: told.append(rows.asked))
    change = changes.Change(_USER, ids.RequestId("r"), "erase", ids.ThreadId.new())
    assert (await both.erase_thread(change)).threads == 1
    assert (await both.erase_everything(change)).threads == 2
    # who sweeps is told when the call itself is done, so that they do not wait for each other
    assert told == ([1, 2] if away else [32, 64])


class _Full:
    """Has no room, and nothing to give up."""

    def __init__(self, *, left: bool) -> None:
        self.left, self.given_up = left, 0

    async def by_request(self, actor: artifacts.Actor, request_id: ids.RequestId) -> None:
        return None

    async def begin(self, *asked: object) -> int:
        raise errors.QuotaExceeded("full", kind="artifacts", limit=0, tier="free")

    async def discard(self, user_id: ids.UserId, artifact_id: ids.ArtifactId, state: str) -> bool:
        self.given_up += 1
        return self.left


@pytest.mark.parametrize("left", [False, True])
async def test_who_sweeps_is_told_only_when_something_was_given_up(left: bool) -> None:
    rows, told, tasks = _Full(left=left), list[int](), Tasks()
    kept: Any = rows
    limits = artifacts.Limits(100, 100, 100, 60.0, lambda tier: auth_pb2.TierLimits())
    arriving = uploads.Uploads(kept, limits, slots.Slots(1, 1), lambda: told.append(1), tasks)
    draft = artifacts.Draft(ids.RequestId("r"), "a.csv", "text/csv", 1, "", None)
    with pytest.raises(errors.QuotaExceeded):
        async with arriving.open(artifacts.Actor(_USER, "free"), draft):
            pass
    await tasks.close()
    assert (rows.given_up, told) == (1, [1] if left else [])
