"""What people say to runs that ask: to approvals and to waits for a message, of whoever owns the run."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import Awaitable, Callable

import grpc

from netra.dispatcher.v1 import approvals_pb2, dispatcher_pb2, dispatcher_pb2_grpc
from tests.prove.runs import agents, judge, outside, place, tools

_LOOK_S, _CALL_S, _AGAIN_S = 0.05, 10.0, 0.2
# somebody has decided already; or what is asked for is not there yet, or the run is not there any more
_OVER = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ALREADY_EXISTS)


async def give(where: place.Place) -> None:
    """Answer whatever is asked, for ever: of a run that is held there, once its gate is open."""
    read = [0] * len(where.users)
    async with asyncio.TaskGroup() as group:
        while True:
            for at, user in enumerate(where.users):
                frames = user.follower.frames
                for frame in frames[read[at] :]:
                    if frame["type"] == "approval_requested" or frame["data"].get("waits_for") == "message":
                        group.create_task(_answer(where, user, frame))
                read[at] = len(frames)
            await asyncio.sleep(_LOOK_S)


async def _answer(where: place.Place, user: place.User, frame: judge.Frame) -> None:
    run_id = frame["run_id"]
    while True:
        # the event may be here before the answer to the start is
        started = where.started.get(run_id)
        if started is not None and (started.hold not in (agents.ASKED, agents.SUSPENDED) or outside.is_open(started.gate)):
            break
        await asyncio.sleep(_LOOK_S)
    if started.run.end != "agent_completed":
        return  # it waits for its cancellation
    if frame["type"] == "approval_requested":
        await _voted(where, user, started, frame["data"])
    else:
        said = dispatcher_pb2.SendMessageRequest(
            request_id=f"{run_id}-{frame['seq']}", run_id=run_id, message=f"{started.run.mark} is good."
        )
        await _asked(where, lambda stub: stub.SendMessage(said, metadata=user.person.bearer, timeout=_CALL_S))


async def _voted(where: place.Place, user: place.User, started: place.Started, asked: judge.Frame) -> None:
    decision = approvals_pb2.DECISION_APPROVE
    if asked.get("tool_name"):
        # of a call that nobody knows the outcome of: every second one may be made again
        key = str(asked["parameters"]["key"])
        if tools.value(key) % 2:
            where.again[key] += 1
        else:
            decision = approvals_pb2.DECISION_REJECT
    word = approvals_pb2.ResolveApprovalRequest(approval_id=asked["approval_id"], decision=decision, comment=json.dumps(started.run.mark))
    await _asked(where, lambda stub: stub.ResolveApproval(word, metadata=user.person.bearer, timeout=_CALL_S))


async def _asked(where: place.Place, call: Callable[[dispatcher_pb2_grpc.DispatcherServiceAsyncStub], Awaitable[object]]) -> None:
    """Ask one dispatcher, then the other, until one says yes, or that it is too late."""
    for stub in itertools.cycle(where.stubs):
        with contextlib.suppress(grpc.aio.AioRpcError):
            try:
                await call(stub)
                return
            except grpc.aio.AioRpcError as error:
                if error.code() in _OVER:
                    return
        await asyncio.sleep(_AGAIN_S)
