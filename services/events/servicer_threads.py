"""The part of EventsService about threads, their own or granted ones: FollowThread, ListThreadEvents."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from chassis import identity
from netra import errors, ids
from netra.events.v1 import events_pb2, events_pb2_grpc
from services.events import follow, frames, log

if TYPE_CHECKING:
    import grpc

_DEFAULT_PAGE, _MAX_PAGE = 100, 1000
_PAGE_BYTES = 1024 * 1024


class ThreadsServicer(events_pb2_grpc.EventsServiceServicer):
    """What others than the owner of a run are shown of it: no cursor, for that is its owner's."""

    _threads: follow.Threads
    _verifier: identity.Verifier

    async def FollowThread(
        self, request: events_pb2.FollowThreadRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[events_pb2.FollowThreadResponse]:
        reader = await self._reader(request.grant_token)
        after_run_id = ids.RunId(request.after_run_id) if request.after_run_id else ""
        async for part in self._threads.follow(reader, after_run_id, _positions(request.positions)):
            answer = events_pb2.FollowThreadResponse(ended=part.ended, caught_up=part.caught_up)
            answer.truncated.extend(_named(part.truncated))
            _fill(answer.events, part.events)
            yield answer

    async def ListThreadEvents(
        self, request: events_pb2.ListThreadEventsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> events_pb2.ListThreadEventsResponse:
        reader = await self._reader(request.grant_token)
        if not 0 <= request.page_size <= _MAX_PAGE:
            raise errors.InvalidPayload(f"page_size is 1 to {_MAX_PAGE}, or 0 for {_DEFAULT_PAGE}", field="page_size")
        run_id, after = ids.RunId(request.run_id), _seq(request.after_seq, "after_seq")
        events, through, last = await self._threads.page(reader, run_id, after, request.page_size or _DEFAULT_PAGE, _PAGE_BYTES)
        answer = events_pb2.ListThreadEventsResponse(next_after_seq=through, last_seq=last)
        _fill(answer.events, events)
        return answer

    async def _reader(self, token: str) -> follow.Reader:
        caller = identity.current().user
        return follow.Reader.of(caller, await self._verifier.grant(token, caller))


def _positions(positions: Sequence[events_pb2.RunPosition]) -> dict[str, int]:
    if len(positions) > follow.MAX_POSITIONS:
        raise errors.TooLarge(f"positions has at most {follow.MAX_POSITIONS} runs", field="positions", limit=follow.MAX_POSITIONS)
    return {ids.RunId(one.run_id): _seq(one.seq, "positions.seq") for one in positions}


def _seq(seq: int, field: str) -> int:
    if seq < 0:
        raise errors.InvalidPayload(f"{field} is a seq: 0 or more", field=field)
    return seq


def _named(truncated: Mapping[str, int]) -> Iterable[events_pb2.RunPosition]:
    return (events_pb2.RunPosition(run_id=run_id, seq=seq) for run_id, seq in truncated.items())


def _fill(into: Any, events: Sequence[log.Recorded]) -> None:
    for event in events:
        into.add(
            seq=event.seq, user_id=event.user_id, run_id=event.run_id, thread_id=event.thread_id, type=event.kind,
            frame=frames.without_cursor(event.frame),
        )  # fmt: skip
