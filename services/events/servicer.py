"""EventsService: OpenRun, ListSteps, Append, Tail, Subscribe, ListEvents, ExportEvents, EraseEvents; the rest is of `servicer_threads`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from chassis import identity, telemetry
from netra import errors, ids
from netra.events.v1 import events_pb2
from services.events import erasure, exports, fanout, follow, heads, intake, log, paces, reach, servicer_threads, tail

if TYPE_CHECKING:
    import grpc

_DEFAULT_PAGE, _MAX_PAGE = 100, 1000
_PAGE_BYTES = 1024 * 1024
_MAX_REQUEST_ID = 64


class Record(Protocol):
    """The runs of one user's record."""

    async def open(self, head: heads.NewHead, epoch: int) -> heads.Opened: ...
    async def steps(
        self, user_id: str, thread_id: str, run_id: str, epoch: int, after: str, *, limit: int, max_bytes: int
    ) -> heads.Steps: ...
    async def end_of(self, user_id: str, run_id: str) -> int: ...


@dataclass(frozen=True, slots=True)
class Whole:
    """What is done with a user's whole record, and who may."""

    exports: exports.Exports
    erasures: erasure.Erasures
    reach: reach.Reach


class EventsServicer(servicer_threads.ThreadsServicer):
    """The record over gRPC."""

    def __init__(
        self, record: Record, pages: paces.Pages, appends: intake.Intake, streams: tail.Tail, live: fanout.Fanout,
        verifier: identity.Verifier, whole: Whole, opened: Callable[[str, int], None], threads: follow.Threads,
    ) -> None:  # fmt: skip
        self._record, self._pages, self._appends, self._streams = record, pages, appends, streams
        self._live, self._verifier, self._whole, self._opened, self._threads = live, verifier, whole, opened, threads

    async def OpenRun(self, request: events_pb2.OpenRunRequest, context: grpc.aio.ServicerContext[Any, Any]) -> events_pb2.OpenRunResponse:
        execution = await self._verifier.context(request.context_token, identity.current().service)
        told = request.call if request.HasField("call") else None
        head = heads.new(execution, ids.RunId(request.run_id), request.trace_id or telemetry.trace_id(), told)
        if request.epoch < 1:
            raise errors.InvalidPayload("epoch counts from 1", field="epoch")
        opened = await self._record.open(head, request.epoch)
        self._opened(head.run_id, request.epoch)
        return events_pb2.OpenRunResponse(
            next_seq=opened.next_seq, ended=opened.ended, terminal_type=opened.terminal_type, open_tool_calls=opened.open_tool_calls
        )

    async def ListSteps(
        self, request: events_pb2.ListStepsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> events_pb2.ListStepsResponse:
        execution = await self._verifier.context(request.context_token, identity.current().service)
        run_id = ids.RunId(request.run_id)
        heads.require(execution, run_id)
        if not 0 <= request.page_size <= _MAX_PAGE:
            raise errors.InvalidPayload(f"page_size is 1 to {_MAX_PAGE}, or 0 for {_DEFAULT_PAGE}", field="page_size")
        limit = request.page_size or _DEFAULT_PAGE
        page = await self._record.steps(
            execution.user_id, execution.thread_id, run_id, request.epoch, request.after, limit=limit, max_bytes=_PAGE_BYTES
        )  # fmt: skip
        return events_pb2.ListStepsResponse(
            steps=[events_pb2.Step(key=key, result=result) for key, result in page.found], next_after=page.next_after
        )

    async def Append(
        self, request_iterator: AsyncIterator[events_pb2.AppendRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[events_pb2.AppendResponse]:
        async for together in self._appends.answers(request_iterator):
            answers = [_answer(outcome) for outcome in together]
            answer = answers[0] if len(answers) == 1 else events_pb2.AppendResponse(more=answers)
            answer.takes_more = True
            yield answer

    async def Tail(
        self, request_iterator: AsyncIterator[events_pb2.TailRequest], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[events_pb2.TailResponse]:
        async for batch in self._streams.follow(request_iterator):
            answer = events_pb2.TailResponse(positions=batch.positions, degraded=batch.degraded)
            answer.transients.extend(transient.message() for transient in batch.shown)
            fill(answer.events, batch.events)
            yield answer

    async def Subscribe(
        self, request: events_pb2.SubscribeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[events_pb2.SubscribeResponse]:
        after, run_id = _after(request.after), _run(request.run_id)
        async for part in self._streams.subscribe(identity.current().user, after, run_id):
            answer = events_pb2.SubscribeResponse(truncated_to=part.truncated_to)
            answer.transients.extend(transient.message() for transient in part.shown)
            fill(answer.events, part.events)
            yield answer

    async def ListEvents(
        self, request: events_pb2.ListEventsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> events_pb2.ListEventsResponse:
        user_id, after, run_id = identity.current().user_id, _after(request.after), _run(request.run_id)
        if not 0 <= request.page_size <= _MAX_PAGE:
            raise errors.InvalidPayload(f"page_size is 1 to {_MAX_PAGE}, or 0 for {_DEFAULT_PAGE}", field="page_size")
        if run_id:
            await self._record.end_of(user_id, run_id)
        generation = await self._live.known_generation()
        page = await self._pages.page(
            user_id, after, limit=request.page_size or _DEFAULT_PAGE, max_bytes=_PAGE_BYTES, run_id=run_id
        )  # fmt: skip
        answer = events_pb2.ListEventsResponse(
            next_after=page.through, last=page.position.last, oldest=page.position.oldest, epoch=generation
        )
        fill(answer.events, page.events)
        answer.read_at.GetCurrentTime()
        return answer

    async def ExportEvents(
        self, request: events_pb2.ExportEventsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[events_pb2.ExportEventsResponse]:
        user_id = await self._whole.reach.reader(request.user_id)
        generation = await self._live.known_generation()
        async for page in self._whole.exports.pages(user_id):
            self._whole.reach.still()
            answer = events_pb2.ExportEventsResponse(last=page.position.last, oldest=page.position.oldest, epoch=generation)
            fill(answer.events, page.events)
            yield answer

    async def EraseEvents(
        self, request: events_pb2.EraseEventsRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> events_pb2.EraseEventsResponse:
        if not 1 <= len(request.request_id) <= _MAX_REQUEST_ID:
            raise errors.InvalidPayload(f"request_id has 1 to {_MAX_REQUEST_ID} characters", field="request_id")
        if request.thread_id and request.user_id:
            raise errors.InvalidPayload("thread_id is of the caller: leave out user_id", field="user_id")
        thread_id = ids.ThreadId(request.thread_id) if request.thread_id else ""
        user_id = await self._whole.reach.eraser(request.user_id)
        erased = await self._whole.erasures.erase(user_id, request.request_id, identity.current().user_id, thread_id)
        return events_pb2.EraseEventsResponse(events=erased.events, runs=erased.runs, next_cursor=erased.upto + 1)


def _answer(outcome: log.Outcome) -> events_pb2.AppendResponse:
    refused = outcome.refused
    return events_pb2.AppendResponse(
        append_id=outcome.append_id, last_cursor=outcome.last_cursor,
        error_code=refused.code if refused is not None else "", error_message=refused.message if refused is not None else "",
    )  # fmt: skip


def _after(cursor: int) -> int:
    if cursor < 0:
        raise errors.InvalidPayload("after is a cursor: 0 or more", field="after")
    return cursor


def _run(run_id: str) -> str:
    return ids.RunId(run_id) if run_id else ""


def fill(into: Any, events: Sequence[log.Recorded]) -> None:
    """Make the messages of events in their place: a message that is made beside an answer is copied into it."""
    add = into.add
    for event in events:
        # field by field: a fifth less than with keywords
        made = add()
        made.cursor = event.cursor
        made.seq = event.seq
        made.user_id = event.user_id
        made.run_id = event.run_id
        made.thread_id = event.thread_id
        made.type = event.kind
        made.frame = event.frame
