"""The RPCs of DispatcherService for what is kept of a user's runs: all of it told, or taken away."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from chassis import identity
from netra import ids
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from netra.dispatcher.v1 import dispatcher_pb2_grpc
from services.dispatcher import erasure, exports, supervisor


@dataclass(frozen=True, slots=True)
class Whole:
    """What is done with all of a user's runs."""

    erasures: erasure.Erasures
    exports: exports.Exports


class PrivacyServicer(dispatcher_pb2_grpc.DispatcherServiceServicer):
    """What is kept of a user, in their own hands."""

    _whole: Whole
    _supervisor: supervisor.Supervisor

    async def EraseRuns(self, request: pb.EraseRunsRequest, context: Any) -> pb.EraseRunsResponse:
        """Take away what is in the caller's runs."""
        request_id = ids.RequestId(request.request_id)
        thread_id = ids.ThreadId(request.thread_id) if request.thread_id else ""
        user_id = identity.current().user_id
        self._supervisor.erasing(user_id)
        await self._supervisor.stored(user_id)
        erased = await self._whole.erasures.erase(user_id, request_id, thread_id)
        return pb.EraseRunsResponse(runs=erased.runs)

    async def ExportRuns(self, request: pb.ExportRunsRequest, context: Any) -> AsyncIterator[pb.ExportRunsResponse]:
        """Everything that is kept of the caller's runs."""
        user_id = identity.current().user_id
        await self._supervisor.stored(user_id)
        async for lines in self._whole.exports.of(user_id):
            yield pb.ExportRunsResponse(lines=lines)
