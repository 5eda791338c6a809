"""DispatcherService: one method per RPC: decode, call, encode."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import orjson

from chassis import audit, identity
from netra import errors, ids
from netra.agent import AgentSpec
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from services.dispatcher import (
    admission,
    answers,
    entitlements,
    runs,
    servicer_fields,
    servicer_privacy,
    servicer_tools,
    servicer_waits,
    settings,
    stages,
    supervisor,
)
from services.dispatcher.agents import registry as agents_
from services.dispatcher.tools import arguments as given
from services.dispatcher.tools import dispatch, permits, registrations
from services.dispatcher.tools import registry as tools_

_ON_BUSY = {pb.ON_BUSY_REJECT: "reject", pb.ON_BUSY_INTERRUPT: "interrupt", pb.ON_BUSY_ROLLBACK: "rollback"}
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


class Dispatcher(servicer_waits.WaitsServicer, servicer_tools.ToolsServicer, servicer_privacy.PrivacyServicer):
    """The RPCs."""

    def __init__(
        self, overseer: supervisor.Supervisor, known: Known, notices: Notices, agents: agents_.AgentRegistry, tools: tools_.ToolRegistry,
        registered: registrations.Registrations, entitled: entitlements.Entitlements, refusals: audit.Refusals,
        verifier: identity.Verifier, limits: settings.DispatcherSettings, whole: servicer_privacy.Whole,
    ) -> None:  # fmt: skip
        super().__init__(tools, registered, entitled, refusals)
        self._whole = whole
        self._supervisor, self._store, self._notices, self._agents = overseer, known, notices, agents
        self._verifier, self._limits = verifier, limits

    async def StartRun(self, request: pb.StartRunRequest, context: Any) -> pb.StartRunResponse:
        """Accept a run."""
        admission.json_object(request.inputs, "inputs")
        spec = self._agents.get(request.agent or self._limits.default_agent)
        wanted = admission.Wanted(
            kind="agent",
            name=spec.name,
            agent_version=spec.version,
            request_id=request.request_id,
            request=request.user_request,
            inputs=request.inputs or b"{}",
            thread_id=request.thread_id,
            connection_id=request.connection_id,
            deadline_s=servicer_fields.seconds(request.deadline) if request.HasField("deadline") else spec.deadline_s,
            deadline_declared=not request.HasField("deadline"),
            on_busy=_ON_BUSY.get(request.on_busy, "enqueue"),
            deliver=request.deliver,
            received_at=_moment(request, "received_at"),
            validated_at=_moment(request, "validated_at"),
        )
        run, delivered = await self._supervisor.start(identity.current().user, wanted)
        return pb.StartRunResponse(run_id=run.run_id, thread_id=run.thread_id, message_id=run.message_id, delivered=delivered)

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        """One run."""
        thread_id = await self._granted(request.grant_token, "read")
        await self._supervisor.stored(identity.current().user_id)
        run = await self._store.get(identity.current().user_id, ids.RunId(request.run_id), thread_id)
        shown = _run(run)
        shown.stages.extend(pb.Stage(name=name, at=servicer_fields.time(at)) for name, at in stages.in_order(run.stages))
        return pb.GetRunResponse(run=shown)

    async def ListRuns(self, request: pb.ListRunsRequest, context: Any) -> pb.ListRunsResponse:
        """One page of runs."""
        size = servicer_fields.page_size(request.page_size)
        granted = await self._granted(request.grant_token, "read")
        thread_id = ids.ThreadId(request.thread_id) if request.thread_id else granted
        if granted and thread_id != granted:
            raise errors.InvalidPayload("thread_id is another thread than that of grant_token", field="thread_id")
        await self._supervisor.stored(identity.current().user_id)
        found = await self._store.page(
            identity.current().user_id,
            before=servicer_fields.decoded(request.page_token, ids.RunId),
            size=size + 1,
            thread_id=thread_id,
            state=servicer_fields.STATE_NAME.get(request.state, ""),
            granted=granted,
        )
        token = servicer_fields.encoded(found[size - 1].run_id) if len(found) > size else ""
        return pb.ListRunsResponse(runs=[_run(run) for run in found[:size]], next_page_token=token)

    async def CancelRun(self, request: pb.CancelRunRequest, context: Any) -> pb.CancelRunResponse:
        """Ask a run to stop."""
        thread_id = await self._granted(request.grant_token, "own")
        run = await self._supervisor.cancel(identity.current().user_id, ids.RunId(request.run_id), thread_id)
        return pb.CancelRunResponse(state=servicer_fields.STATE[run.state])

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
        return pb.ListAgentsResponse(agents=[_agent(spec) for spec in mine])

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
            deadline_declared=True,
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
        state=servicer_fields.STATE[run.state],
        created_at=servicer_fields.time(run.created_at),
        started_at=servicer_fields.time(run.started_at),
        ended_at=servicer_fields.time(run.ended_at),
        correlation_id=run.correlation_id,
        user_id=run.user_id,
        agent_version=run.agent_version,
        waits_for=run.waits_for if run.state is runs.RunState.SUSPENDED else "",
    )


def _agent(spec: AgentSpec) -> pb.Agent:
    return pb.Agent(
        name=spec.name, version=spec.version, description=spec.description, input_schema=_schema(spec.input_schema),
        output_schema=_schema(spec.output_schema), deadline=servicer_fields.duration(spec.deadline_s), tools=spec.tools or (),
        narrowed=spec.tools is not None,
    )  # fmt: skip


def _schema(declared: Mapping[str, object] | None) -> bytes:
    return orjson.dumps(dict(declared)) if declared else b""


def _moment(message: pb.StartRunRequest | pb.Notified, name: str) -> datetime.datetime | None:
    """The time in a field; None when it is not set. Raises `InvalidPayload` naming the field when it is no time."""
    if not message.HasField(name):  # type: ignore[arg-type]
        return None
    try:
        found: datetime.datetime = getattr(message, name).ToDatetime(datetime.UTC)
    except (ValueError, OverflowError):
        raise errors.InvalidPayload(f"{name} must be a time from year 1 to 9999", field=name) from None
    return found
