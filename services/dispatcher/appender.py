"""The one append stream to events: appends of all runs of this process, resent when the stream breaks."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator

import grpc

from chassis import log
from netra import errors
from netra.events.v1 import events_pb2
from services.dispatcher import upstreams

_log = log.get(__name__)
_RESEND_S = 0.2
_MAX_BYTES = 2 * 1024 * 1024


class Appender:
    """Sends appends and tells when they are committed. Resending is harmless: events acknowledges what it has."""

    def __init__(self, records: upstreams.Records) -> None:
        self._records = records
        self._numbers = itertools.count(1)
        self._pending: dict[int, tuple[events_pb2.AppendRequest, asyncio.Future[None]]] = {}
        self._outbox: asyncio.Queue[events_pb2.AppendRequest | None] = asyncio.Queue()

    def append(self, request: events_pb2.AppendRequest) -> asyncio.Future[None]:
        """Done when the append is committed; fails with the error it was refused with."""
        request.append_id = next(self._numbers)
        committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if request.ByteSize() > _MAX_BYTES:
            # the stream would break on it, for every run, each time it is sent again
            committed.set_exception(errors.TooLarge(f"An append holds at most {_MAX_BYTES} bytes."))
            return committed
        self._pending[request.append_id] = (request, committed)
        self._outbox.put_nowait(request)
        return committed

    async def run(self) -> None:
        """Keep the stream open, for ever."""
        while True:
            self._outbox = asyncio.Queue()
            for request, _ in self._pending.values():
                self._outbox.put_nowait(request)
            try:
                await self._converse(self._outbox)
            except (grpc.aio.AioRpcError, errors.NetraError) as error:
                _log.warning("the append stream broke; resending", pending=len(self._pending), error=type(error).__name__)
            await asyncio.sleep(_RESEND_S * random.uniform(0.5, 1.5))  # noqa: S311 - jitter

    async def _converse(self, outbox: asyncio.Queue[events_pb2.AppendRequest | None]) -> None:
        call = self._records.stub.Append(_drawn_from(outbox))
        try:
            async for answer in call:
                self._answered(answer)
        finally:
            call.cancel()
            # grpc waits for the next request for as long as there may be one
            outbox.put_nowait(None)

    def _answered(self, answer: events_pb2.AppendResponse) -> None:
        request, committed = self._pending.pop(answer.append_id, (None, None))
        if request is None or committed is None:
            return
        if answer.error_code == errors.Unavailable.code:
            self._pending[answer.append_id] = (request, committed)
            asyncio.get_running_loop().call_later(_RESEND_S, self._outbox.put_nowait, request)
        elif committed.done():
            return
        elif answer.error_code:
            committed.set_exception(errors.by_code(answer.error_code)(answer.error_message))
        else:
            committed.set_result(None)


async def _drawn_from(outbox: asyncio.Queue[events_pb2.AppendRequest | None]) -> AsyncIterator[events_pb2.AppendRequest]:
    while (request := await outbox.get()) is not None:
        yield request
