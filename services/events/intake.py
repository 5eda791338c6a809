"""One stream of appends: read as they come, committed in groups, answered in any order."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

from chassis import identity, lifecycle, telemetry
from chassis import log as log_
from netra import errors, ids
from netra.context import UserExecutionContext
from netra.events.v1 import events_pb2
from services.events import commit, heads, log

_log = log_.get(__name__)
# answers in one message
_TOGETHER = 256
_PARENT = re.compile(r"[0-9a-f]{16}")
Show = Callable[[events_pb2.AppendRequest], log.Outcome]


class Verifier(Protocol):
    """Knows whom a context token is for."""

    async def context(self, token: str, service: str) -> UserExecutionContext:
        """Raises `Unauthenticated`."""
        ...


def _to_nobody(request: events_pb2.AppendRequest) -> log.Outcome:
    """Nobody watches."""
    return log.Outcome(request.append_id)


class Intake:
    """All streams of appends of this replica. `show` shows what they have for those who watch; it neither waits nor fails."""

    def __init__(self, committer: commit.Committer, verifier: Verifier, tasks: lifecycle.Tasks, show: Show = _to_nobody) -> None:
        self._committer, self._verifier = committer, verifier
        self._tasks, self._show = tasks, show
        self._readers: set[asyncio.Task[None]] = set()
        self._closing = False

    async def answers(self, requests: AsyncIterator[events_pb2.AppendRequest]) -> AsyncIterator[Sequence[log.Outcome]]:
        """One outcome per append; ends when the writer has no more, or on `close`, after all that was read is answered.

        Several come together when they are there at the same time and the writer takes that.
        """
        stream = _Stream(self._committer, self._verifier, self._show)
        reader = self._tasks.spawn(stream.read(requests), "append-reader")
        self._readers.add(reader)
        if self._closing:
            reader.cancel()
        try:
            async for together in stream.outcomes():
                yield together
            if stream.failure is not None:
                raise stream.failure
        finally:
            reader.cancel()
            self._readers.discard(reader)

    def close(self) -> None:
        """Read no more appends; the streams end once their last answer is out."""
        self._closing = True
        for reader in self._readers:
            reader.cancel()


class _Stream:
    def __init__(self, committer: commit.Committer, verifier: Verifier, show: Show) -> None:
        self._committer, self._verifier, self._show = committer, verifier, show
        self._answers: asyncio.Queue[log.Outcome | None] = asyncio.Queue()
        self._open = 0
        self._ended = self._takes_more = False
        self.failure: errors.NetraError | None = None

    async def read(self, requests: AsyncIterator[events_pb2.AppendRequest]) -> None:
        try:
            async for request in requests:
                for append in self._appends(request):
                    await self._take(append)
        except errors.NetraError as error:
            self.failure = error
        except Exception as error:
            _log.info("a stream of appends broke", error=type(error).__name__)
            self.failure = errors.Unavailable()
        finally:
            self._ended = True
            if not self._open:
                self._answers.put_nowait(None)

    def _appends(self, request: object) -> Sequence[events_pb2.AppendRequest]:
        """What one message holds."""
        if not isinstance(request, events_pb2.AppendRequest):
            raise errors.InvalidPayload("The request is not a valid protobuf message of this method.")
        self._takes_more = self._takes_more or request.takes_more
        if not request.more:
            return (request,)
        beside = [field.name for field, _ in request.ListFields() if field.name not in ("more", "takes_more")]
        if beside or any(append.more for append in request.more):
            raise errors.InvalidPayload("Appends that come together have nothing beside them, and hold one append each.", field="more")
        return request.more

    async def _take(self, request: events_pb2.AppendRequest) -> None:
        try:
            # whose events they are is in a signed context only when no run says it, or none does yet
            call = request.call if request.HasField("call") else None
            context = heads.framed(await self._context(request.context_token), "", call) if request.context_token else None
            append = log.checked(request, context, await self._opens(request, call) if request.HasField("open") else None)
        except errors.NetraError as refused:
            self._open += 1
            self._reply(log.Outcome(request.append_id, refused=refused))
            return
        shown = self._show(request) if request.transients else None
        if shown is not None and not append.is_recorded:
            self._open += 1
            self._reply(shown)
            return
        await self._committer.submit(append, self._reply if append.opens is None else self._traced(append.opens, request.open.parent_id))
        self._open += 1

    async def _context(self, token: str) -> UserExecutionContext:
        return await self._verifier.context(token, identity.current().service)

    async def _opens(self, request: events_pb2.AppendRequest, call: events_pb2.Call | None) -> heads.NewHead:
        asked = request.open
        if asked.parent_id and not _PARENT.fullmatch(asked.parent_id):
            raise errors.InvalidPayload("parent_id must be 16 hexadecimal digits in lower case", field="open.parent_id")
        return heads.new(await self._context(asked.context_token), ids.RunId(request.run_id), asked.trace_id, call)

    def _traced(self, opened: heads.NewHead, parent_id: str) -> Callable[[log.Outcome], None]:
        """The way of an answer that ends the span of an opening: calls have one, and this is a message of a stream."""
        if not parent_id:
            return self._reply
        headers = {"traceparent": f"00-{opened.trace_id}-{parent_id}-01", telemetry.CORRELATION_HEADER: opened.correlation_id}
        span = telemetry.apart("open run", headers, "SERVER")

        def reply(outcome: log.Outcome) -> None:
            if outcome.refused is not None:
                telemetry.failed(span, outcome.refused.code)
            span.end()
            self._reply(outcome)

        return reply

    def _reply(self, outcome: log.Outcome) -> None:
        self._open -= 1
        self._answers.put_nowait(outcome)
        if self._ended and not self._open:
            self._answers.put_nowait(None)

    async def outcomes(self) -> AsyncIterator[Sequence[log.Outcome]]:
        while (outcome := await self._answers.get()) is not None:
            together, last = [outcome], False
            while self._takes_more and not self._answers.empty() and not last and len(together) < _TOGETHER:
                if (following := self._answers.get_nowait()) is None:
                    last = True
                else:
                    together.append(following)
            yield together
            if last:
                return
