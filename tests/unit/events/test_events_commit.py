"""Group commit: a bad append harms no other, and everything is answered."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

from chassis import postgres
from netra import errors, ids
from netra.events.v1 import events_pb2
from services.events import commit, ledger, log


class _Writer:
    """Accepts everything but appends whose number is poisonous."""

    def __init__(self, poison: frozenset[int] = frozenset(), away: int = 0, locked: frozenset[int] = frozenset()) -> None:
        self.poison, self.away, self.locked, self.table = poison, away, locked, False
        self.batches: list[list[int]] = []

    async def commit(self, appends: Sequence[log.Append], *, pass_over: bool = False) -> ledger.Ledger:
        await asyncio.sleep(0)
        numbers = [append.request.append_id for append in appends]
        self.batches.append(numbers)
        if self.away:
            self.away -= 1
            raise errors.Unavailable
        if self.locked & set(numbers) and (self.table or not pass_over):
            raise postgres.Locked
        if self.poison & set(numbers):
            raise postgres.Unfit("CharacterNotInRepertoireError")
        book = ledger.Ledger({}, {}, datetime.now(UTC))
        held = errors.Unavailable()
        book.outcomes += [log.Outcome(number, number, held if number in self.locked else None) for number in numbers]
        return book


class _Announcer:
    def announce(self, events: Sequence[log.Recorded]) -> None:
        pass


@contextlib.asynccontextmanager
async def _running(writer: _Writer) -> AsyncIterator[commit.Committer]:
    committer = commit.Committer(writer, _Announcer())
    async with asyncio.TaskGroup() as group:
        task = group.create_task(committer.run())
        yield committer
        task.cancel()


def _append(number: int, size: int = 10) -> log.Append:
    return log.Append(events_pb2.AppendRequest(append_id=number, run_id=ids.uuid7()), b"", size)


async def _answers(committer: commit.Committer, count: int, size: int = 10) -> dict[int, log.Outcome]:
    answers: dict[int, log.Outcome] = {}
    everything = asyncio.Event()

    def reply(outcome: log.Outcome) -> None:
        assert outcome.append_id not in answers
        answers[outcome.append_id] = outcome
        if len(answers) == count:
            everything.set()

    for number in range(1, count + 1):
        await committer.submit(_append(number, size), reply)
    await asyncio.wait_for(everything.wait(), 5)
    return answers


async def test_what_waits_is_committed_together_in_order() -> None:
    writer = _Writer()
    async with _running(writer) as committer:
        answers = await _answers(committer, 100)
    assert writer.batches == [list(range(1, 101))]
    assert all(outcome.refused is None for outcome in answers.values())


async def test_poison_is_found_by_bisection_and_refused_alone() -> None:
    writer = _Writer(poison=frozenset({17, 63}))
    async with _running(writer) as committer:
        answers = await _answers(committer, 100)
    assert {number for number, outcome in answers.items() if outcome.refused is not None} == {17, 63}
    assert answers[17].refused is not None
    assert answers[17].refused.code == "INVALID_PAYLOAD"
    assert len(writer.batches) < 40


async def test_everything_is_to_be_sent_again_when_the_database_is_away() -> None:
    writer = _Writer(away=1)
    async with _running(writer) as committer:
        first = await _answers(committer, 3)
        second = await _answers(committer, 3)
    assert [outcome.refused.code for outcome in first.values() if outcome.refused] == ["UNAVAILABLE"] * 3
    assert not any(outcome.refused for outcome in second.values())


async def test_a_batch_is_bounded_by_bytes_and_number() -> None:
    writer = _Writer()
    async with _running(writer) as committer:
        await _answers(committer, 12, size=commit.MAX_BYTES // 4)
        await _answers(committer, commit.MAX_APPENDS + 1)
    assert max(len(batch) for batch in writer.batches[:3]) == 4
    assert [len(batch) for batch in writer.batches[-2:]] == [commit.MAX_APPENDS, 1]


async def test_what_another_transaction_holds_is_sent_again_and_the_rest_goes_on() -> None:
    writer = _Writer(locked=frozenset({5}))
    async with _running(writer) as committer:
        answers = await _answers(committer, 16)
        assert {number: outcome.refused.code for number, outcome in answers.items() if outcome.refused} == {5: "UNAVAILABLE"}
        # each try waits for as long as the database lets it
        assert len(writer.batches) == 2
        writer.table = True
        assert all(outcome.refused for outcome in (await _answers(committer, 16)).values())
        assert len(writer.batches) == 4
        writer.locked = frozenset()
        assert not any(outcome.refused for outcome in (await _answers(committer, 16)).values())
