"""Steps are read by the owner of their run alone, page by page."""

from __future__ import annotations

import itertools

import pytest

from netra import errors, ids
from services.events import heads
from tests.integration.events.conftest import Place, Replica, Run, event

MIB = 1024 * 1024


async def read(run: Run, *, epoch: int = 1, limit: int = 100, max_bytes: int = MIB, user_id: str = "") -> list[list[str]]:
    """The keys of all steps, page by page."""
    pages: list[list[str]] = []
    after = ""
    while True:
        whose = user_id or run.user_id
        page = await run.replica.record.steps(whose, run.context.thread_id, run.run_id, epoch, after, limit=limit, max_bytes=max_bytes)
        pages.append([key for key, _ in page.found])
        if not page.next_after:
            return pages
        after = page.next_after


@pytest.fixture
async def run(place: Place) -> Run:
    """A run with seven steps, one of them large."""
    run = await place.run(await place.replica())
    await run.append(event(), steps={f"{number}:a": b"%d" % number for number in range(3)})
    await run.append(steps={"3:large": b'"' + b"x" * 10_000 + b'"'})
    await run.append(event(), steps={f"{number}:b": b"null" for number in range(4, 7)})
    return run


KEYS = ["0:a", "1:a", "2:a", "3:large", "4:b", "5:b", "6:b"]


async def test_every_step_comes_once_as_it_was_kept(run: Run) -> None:
    page = await run.replica.record.steps(run.user_id, run.context.thread_id, run.run_id, 1, "", limit=100, max_bytes=MIB)
    assert [key for key, _ in page.found] == KEYS
    assert ([result for _, result in page.found][:3], len(page.found[3][1]), page.next_after) == ([b"0", b"1", b"2"], 10_002, "")


@pytest.mark.parametrize("limit", [1, 2, 3, 7])
async def test_a_page_ends_at_its_count(run: Run, limit: int) -> None:
    pages = await read(run, limit=limit)
    assert list(itertools.chain(*pages)) == KEYS
    assert {len(page) for page in pages[:-1]} <= {limit}
    assert len(pages) == -(-len(KEYS) // limit)


async def test_a_page_ends_at_its_bytes_and_has_at_least_one_step(run: Run) -> None:
    pages = await read(run, max_bytes=5_000)
    # the one that goes beyond is the last of its page
    assert [page for page in pages if page] == [KEYS[:4], KEYS[4:]]
    assert list(itertools.chain(*await read(run, max_bytes=1))) == KEYS


async def test_none_but_the_owner_reads_them(run: Run) -> None:
    assert await read(run) == [KEYS]
    await run.replica.record.open(heads.new(run.context, ids.RunId(run.run_id), ""), 4)
    for epoch in (1, 3, 5):
        with pytest.raises(errors.Fenced, match="epoch 4"):
            await read(run, epoch=epoch)
    assert await read(run, epoch=4) == [KEYS]


async def test_those_of_another_user_are_as_unknown_as_those_of_no_run(run: Run) -> None:
    with pytest.raises(errors.NotFound):
        await read(run, user_id=ids.uuid7())
    replica: Replica = run.replica
    with pytest.raises(errors.NotFound):
        await replica.record.steps(run.user_id, run.context.thread_id, ids.uuid7(), 1, "", limit=1, max_bytes=MIB)


async def test_they_are_there_after_the_end_of_the_run(run: Run) -> None:
    await run.append(event("agent_failed"), steps={"7:c": b"1"}, end=True)
    assert list(itertools.chain(*await read(run))) == [*KEYS, "7:c"]
