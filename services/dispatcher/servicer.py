"""DispatcherService: one method per RPC: decode, call, encode."""

from __future__ import annotations

import base64
import binascii
import datetime
from collections.abc import Sequence
from typing import Any, Protocol

from google.protobuf import duration_pb2, timestamp_pb2

from chassis import audit, identity
from netra import errors, ids
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from services.dispatcher import admission, answers, entitlements, runs, servicer_tools, settings, stages, supervisor
from services.dispatcher.agents import registry as agents_
from services.dispatcher.tools import arguments as given
from services.dispatcher.tools import dispatch, permits, registrations
from services.dispatcher.tools import registry as tools_

_STATE = {state: pb.RunState.Value(f"RUN_STATE_{state.name}") for state in runs.RunState}
_STATE_NAME = {value: state.value for state, value in _STATE.items()}
_MOST_NOTIFIED = 1000


class Known(Protocol):
    """Where the runs of users are kept."""

    async def get(self, user_id: ids.UserId, run_id: ids.RunId, granted: str = "") -> runs.Run:
        """One run: the user's, or with a thread that was granted to them anybody's in it. Raises `NotFound`."""
        ...

    async def by_request(self, user_id: ids.UserId, request_id: str) -> runs.Run | None:
        """The run that a request started, if any."""
        ...

    async def page(
        self, user_id: ids.UserId, *, before: str, size: int, thread_id: str, state: str, granted: str = ""
    ) -> list[runs.Run]:  # fmt: skip
        """Up to `size` runs, newest first, older than the run `before` when given; of a `granted` thread all, whoever owns them."""
        ...


class Notices(Protocol):
    """Where is kept that users were told of the ends of their runs."""

    async def notified(self, told: Sequence[tuple[ids.RunId, datetime.datetime]]) -> None:
        """The ends of runs were sent to their users at these times. The first time counts; unknown runs are passed over."""
        ...


class Dispatcher(servicer_tools.ToolsServicer):
    """The RPCs."""

    def __init__(
        self, overseer: supervisor.Supervisor, known: Known, notices: Notices, agents: agents_.AgentRegistry, tools: tools_.ToolRegistry,
        registered: registrations.Registrations, entitled: entitlements.Entitlements, refusals: audit.Refusals,
        verifier: identity.Verifier, limits: settings.DispatcherSettings,
    ) -> None:  # fmt: skip
        super().__init__(tools, registered, entitled, refusals)
        self._supervisor, self._store, self._notices, self._agents = overseer, known, notices, agents
        self._verifier, self._limits = verifier, limits

    async def StartRun(self, request: pb.StartRunRequest, context: Any) -> pb.StartRunResponse:
        """Accept a run."""
        admission.json_object(request.inputs, "inputs")
        name = request.agent or self._limits.default_agent
        deadline_s = _seconds(request.deadline) if request.HasField("deadline") else self._agents.get(name).deadline_s
        wanted = admission.Wanted(
            kind="agent",
            name=name,
            request_id=request.request_id,
            request=request.user_request,
            inputs=request.inputs or b"{}",
            thread_id=request.thread_id,
            connection_id=request.connection_id,
            deadline_s=deadline_s,
            only_if_free=request.on_busy == pb.ON_BUSY_REJECT,
            received_at=_moment(request, "received_at"),
            validated_at=_moment(request, "validated_at"),
        )
        run = await self._supervisor.start(identity.current().user, wanted)
        return pb.StartRunResponse(run_id=run.run_id, thread_id=run.thread_id, message_id=run.message_id)

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        """One run."""
        thread_id = await self._granted(request.grant_token, "read")
        run = await self._store.get(identity.current().user_id, ids.RunId(request.run_id), thread_id)
        shown = _run(run)
        shown.stages.extend(pb.Stage(name=name, at=_time(at)) for name, at in stages.in_order(run.stages))
        return pb.GetRunResponse(run=shown)

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        """One page of runs."""
        size = _page_size(request.page_size)
        granted = await self._granted(request.grant_token, "read")
        thread_id = ids.ThreadId(request.thread_id) if request.thread_id else granted
        if granted and thread_id != granted:
            raise errors.InvalidPayload("thread_id is another thread than that of grant_token", field="thread_id")
        found = await self._store.page(
            identity.current().user_id,
            before=_decoded(request.page_token),
            size=size + 1,
            thread_id=thread_id,
            state=_STATE_NAME.get(request.state, ""),
            granted=granted,
        )
        token = _encoded(found[size - 1].run_id) if len(found) > size else ""
        return pb.ListRunsResponse(runs=[_run(run) for run in found[:size]], next_page_token=token)

    async def CancelRun(self, request: pb.CancelRunRequest, context: Any) -> pb.CancelRunResponse:
        """Ask a run to stop."""
        thread_id = await self._granted(request.grant_token, "own")
        run = await self._supervisor.cancel(identity.current().user_id, ids.RunId(request.run_id), thread_id)
        return pb.CancelRunResponse(state=_STATE[run.state])

    async def _granted(self, token: str, access: str) -> str:
        """The thread of a grant token of the caller's; empty without one. Raises `Unauthenticated`, `PermissionDenied`."""
        if not token:
            return ""
        grant = await self._verifier.grant(token, identity.current().user)
        if not grant.allows(access):
            raise errors.PermissionDenied("Only the owner of the thread may do this.")
        return grant.resource

    async def RecordStages(self, request: pb.RecordStagesRequest, context: Any) -> pb.RecordStagesResponse:
        """Users were told of the ends of their runs."""
        if len(request.notified) > _MOST_NOTIFIED:
            raise errors.TooLarge(f"notified has at most {_MOST_NOTIFIED} runs", field="notified", limit=_MOST_NOTIFIED)
        now = datetime.datetime.now(datetime.UTC)
        told = [(ids.RunId(one.run_id), min(_moment(one, "at") or now, now)) for one in request.notified]
        if told:
            await self._notices.notified(told)
        return pb.RecordStagesResponse()

    async def ListAgents(self, request: pb.ListAgentsRequest, context: Any) -> pb.ListAgentsResponse:
        """The agents of the caller's tier."""
        mine = [spec for spec in self._agents.all() if self._entitled.has_agent(identity.current().user, spec)]
        agents = [pb.Agent(name=spec.name, version=spec.version, description=spec.description) for spec in mine]
        return pb.ListAgentsResponse(agents=agents)

    async def ExecuteTool(self, request: pb.ExecuteToolRequest, context: Any) -> pb.ExecuteToolResponse:
        """One interactive call."""
        arguments = admission.json_object(request.arguments, "arguments", given.MAX_BYTES)
        tool = self._tools.get(request.tool_name)
        self._permits().require(tool.spec)
        tool.check_arguments(arguments)
        wanted = admission.Wanted(
            kind="tool",
            name=request.tool_name,
            request_id=request.request_id,
            request="",
            inputs=request.arguments or b"{}",
            thread_id=request.thread_id,
            connection_id="",
            deadline_s=dispatch.longest_s(self._tools, request.tool_name),
        )
        run_id, kept = await self._supervisor.call(identity.current().user, wanted, arguments)
        answer = pb.ExecuteToolResponse.FromString(kept) if kept else answers.lost()
        answer.run_id = run_id
        return answer

    def _permits(self) -> permits.Permits:
        return self._entitled.of_user(identity.current().user)


def _run(run: runs.Run) -> pb.Run:
    return pb.Run(
        run_id=run.run_id,
        thread_id=run.thread_id,
        request_id=run.request_id,
        kind=run.kind,
        agent=run.agent,
        state=_STATE[run.state],
        created_at=_time(run.created_at),
        started_at=_time(run.started_at),
        ended_at=_time(run.ended_at),
        correlation_id=run.correlation_id,
        user_id=run.user_id,
    )


def _time(value: datetime.datetime | None) -> timestamp_pb2.Timestamp | None:
    if value is None:
        return None
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(value)
    return stamp


def _moment(message: pb.StartRunRequest | pb.Notified, name: str) -> datetime.datetime | None:
    """The time in a field; None when it is not set. Raises `InvalidPayload` naming the field when it is no time."""
    if not message.HasField(name):  # type: ignore[arg-type]
        return None
    try:
        found: datetime.datetime = getattr(message, name).ToDatetime(datetime.UTC)
    except (ValueError, OverflowError):
        raise errors.InvalidPayload(f"{name} must be a time from year 1 to 9999", field=name) from None
    return found


def _seconds(value: duration_pb2.Duration) -> float:
    return value.seconds + value.nanos / 1e9


def _page_size(wanted: int) -> int:
    if not 0 <= wanted <= 200:
        raise errors.InvalidPayload("page_size must be from 1 to 200, or 0 for 50", field="page_size")
    return wanted or 50


def _encoded(run_id: str) -> str:
    return base64.urlsafe_b64encode(run_id.encode()).decode()


def _decoded(token: str) -> str:
    try:
        return ids.RunId(base64.urlsafe_b64decode(token).decode()) if token else ""
    except (binascii.Error, ValueError, errors.InvalidPayload):
        raise errors.InvalidPayload("page_token must be a next_page_token of this method", field="page_token") from None
