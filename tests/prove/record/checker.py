"""Is what was acknowledged in the record, in order and once; and did every client see exactly the record?"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field

import grpc
import stamina

from netra.events.v1 import events_pb2, events_pb2_grpc
from tests.prove import pages
from tests.prove.record import book, place

_ENDS = frozenset({"agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"})


@dataclass(slots=True)
class Verdict:
    """What was counted and what is wrong."""

    recorded: int = 0
    delivered: int = 0
    duplicates: int = 0
    gaps: int = 0
    leaks: int = 0
    lost: int = 0
    unfinished: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.gaps or self.leaks or self.lost or self.duplicates or self.unfinished or self.wrong)


async def ended(where: place.Place, found: book.Book, patience_s: float = 180.0) -> None:
    """Returns when every accepted run has its end in the record, or after a while: the verdict tells."""
    async with grpc.aio.insecure_channel(where.target(place.EVENTS[0])) as channel:
        stub: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(channel)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                for user in where.users:
                    for run_id in found.accepted_runs.get(user.user_id, ()):
                        await _end(stub, user, run_id)


@stamina.retry(on=pages.away, attempts=None, timeout=60.0, wait_initial=0.1, wait_max=1.0)
async def _end(stub: events_pb2_grpc.EventsServiceAsyncStub, user: place.Person, run_id: str) -> None:
    # the stream is over with its run
    async for _ in stub.Subscribe(events_pb2.SubscribeRequest(run_id=run_id), metadata=user.bearer, wait_for_ready=True):
        pass


async def owed(where: place.Place, found: book.Book, patience_s: float = 180.0) -> None:
    """Returns when every client has seen the end of its record, or after a while."""
    ends = {user.user_id: len(await pages.whole(where.target("events"), user)) for user in where.users}
    try:
        async with asyncio.timeout(patience_s):
            while any(seen.last < ends[seen.user_id] for seen in found.clients):  # noqa: ASYNC110  (another process decides)
                await asyncio.sleep(0.2)
    except TimeoutError:
        return


async def judged(where: place.Place, found: book.Book) -> Verdict:
    """The verdict, from the record as both replicas tell it."""
    verdict = Verdict()
    for user in where.users:
        first, second = [await pages.whole(where.target(replica), user) for replica in place.EVENTS]
        if first != second:
            verdict.wrong.append("the replicas tell different records")
        _judge(verdict, user, first, found)
    return verdict


def _judge(verdict: Verdict, user: place.Person, frames: list[dict[str, object]], found: book.Book) -> None:
    record = {int(str(frame["cursor"])): book.entry_of(frame) for frame in frames}
    verdict.recorded += len(record)
    if [int(str(frame["cursor"])) for frame in frames] != list(range(1, len(frames) + 1)):
        verdict.wrong.append("the cursors of a record are not contiguous")
    verdict.leaks += sum(frame["user_id"] != user.user_id for frame in frames)
    by_id = {entry.event_id: entry for entry in record.values()}
    verdict.duplicates += len(record) - len(by_id)
    verdict.lost += sum(by_id.get(entry.event_id) != entry for entry in found.acknowledged.get(user.user_id, []))
    _judge_runs(verdict, record, frames, found.accepted_runs.get(user.user_id, []))
    for seen in (one for one in found.clients if one.user_id == user.user_id):
        _judge_client(verdict, seen, record)


def _judge_runs(verdict: Verdict, record: dict[int, book.Entry], frames: list[dict[str, object]], accepted: list[str]) -> None:
    runs: dict[str, list[int]] = {}
    for _, entry in sorted(record.items()):
        runs.setdefault(entry.run_id, []).append(entry.seq)
    verdict.gaps += sum(seqs != list(range(1, len(seqs) + 1)) for run_id, seqs in runs.items() if run_id)
    ended = {str(frame["run_id"]) for frame in frames if frame["type"] in _ENDS}
    verdict.unfinished += sum(run_id not in ended for run_id in accepted)


def _judge_client(verdict: Verdict, seen: book.Seen, record: dict[int, book.Entry]) -> None:
    verdict.delivered += seen.delivered
    # each goes on after the last one it has seen, so nothing comes twice for a good reason
    verdict.duplicates += seen.doubles
    verdict.leaks += sum(one.startswith("leak") for one in seen.wrong)
    verdict.gaps += sum(one.startswith("gap") for one in seen.wrong)
    verdict.wrong += [one for one in seen.wrong if not one.startswith(("leak", "gap"))]
    due = {cursor: entry for cursor, entry in record.items() if cursor > seen.first}
    missing = due.keys() - seen.events.keys()
    if missing:
        verdict.gaps += 1
        verdict.wrong.append(f"a client did not get {len(missing)} of {len(due)} events, from cursor {min(missing)} on")
    if any(seen.events[cursor] != entry for cursor, entry in due.items() if cursor in seen.events) or seen.events.keys() - due.keys():
        verdict.wrong.append("a client saw something else than the record")
