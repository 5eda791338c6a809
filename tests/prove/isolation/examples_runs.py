"""Examples of the dispatcher and of the record."""

from __future__ import annotations

import json
from typing import Any

from netra import ids
from netra.dispatcher.v1 import approvals_pb2, dispatcher_pb2
from netra.events.v1 import events_pb2
from tests.prove.isolation.example import OPERATOR, USER, rpcs
from tests.prove.isolation.people import Party
from tests.prove.isolation.settle import granted
from tests.prove.isolation.world import World


@rpcs("dispatcher.StartRun", USER, shows="thread_id")
async def _(world: World, who: Party) -> Any:
    return dispatcher_pb2.StartRunRequest(
        request_id=who.once(), agent="text-analyst", user_request=f"About {who.canary}.", thread_id=who.things["thread_id"],
        inputs=json.dumps({"note": who.canary}).encode(), connection_id=ids.uuid7(),
    )  # fmt: skip


@rpcs("dispatcher.GetRun", USER, shows="run_id thread_id request_id", reads="run_id")
async def _(world: World, who: Party) -> Any:
    return dispatcher_pb2.GetRunRequest(run_id=who.things["run_id"])


@rpcs("dispatcher.ListRuns", USER, long=True, shows="run_id request_id", reads="thread_id")
async def _(world: World, who: Party) -> Any:
    return dispatcher_pb2.ListRunsRequest(page_size=200, thread_id=who.things["thread_id"])


@rpcs("dispatcher.CancelRun", USER)
async def _(world: World, who: Party) -> Any:
    return dispatcher_pb2.CancelRunRequest(run_id=who.things["run_id"])


@rpcs("dispatcher.SendMessage", USER)
async def _(world: World, who: Party) -> Any:
    return dispatcher_pb2.SendMessageRequest(request_id=who.once(), run_id=await world.waiting(who), message=f"About {who.canary}.")


@rpcs("dispatcher.ResolveApproval", USER, shows="approval_id run_id thread_id canary")
async def _(world: World, who: Party) -> Any:
    approval_id = who.things["approval_id"]
    return approvals_pb2.ResolveApprovalRequest(approval_id=approval_id, decision=approvals_pb2.DECISION_APPROVE, comment="Yes.")


@rpcs("dispatcher.GetApproval", USER, shows="approval_id run_id thread_id canary", reads="approval_id")
async def _(world: World, who: Party) -> Any:
    return approvals_pb2.GetApprovalRequest(approval_id=who.things["approval_id"])


@rpcs("dispatcher.ListApprovals", USER, shows="approval_id run_id canary", reads="run_id")
async def _(world: World, who: Party) -> Any:
    return approvals_pb2.ListApprovalsRequest(page_size=200, run_id=who.things["run_id"])


# the contract: the edge tells of runs of anybody's, and is told nothing
@rpcs("dispatcher.RecordStages", "gateway", legit=[("run_id", "run_id")])
async def _(world: World, who: Party) -> Any:
    told = dispatcher_pb2.Notified(run_id=who.things["run_id"])
    told.at.GetCurrentTime()
    return dispatcher_pb2.RecordStagesRequest(notified=[told])


@rpcs("dispatcher.ListAgents", USER)
async def _(world: World, who: Party) -> Any:
    return dispatcher_pb2.ListAgentsRequest()


@rpcs("dispatcher.ListTools", USER)
async def _(world: World, who: Party) -> Any:
    return dispatcher_pb2.ListToolsRequest(page_size=200)


@rpcs("dispatcher.GetTool", USER)
async def _(world: World, who: Party) -> Any:
    return dispatcher_pb2.GetToolRequest(name="text_statistics")


def _declared(name: str) -> dispatcher_pb2.Tool:
    return dispatcher_pb2.Tool(name=name, version="1.0.0", description="Nobody serves it.", input_schema=b'{"type":"object"}')


# the contract: who runs the installation has tools for all tenants
@rpcs("dispatcher.RegisterTool", OPERATOR)
async def _(world: World, who: Party) -> Any:
    return dispatcher_pb2.RegisterToolRequest(tool=_declared(f"t{who.once()}"))


@rpcs("dispatcher.DeregisterTool", OPERATOR)
async def _(world: World, who: Party) -> Any:
    asked = dispatcher_pb2.RegisterToolRequest(tool=_declared("of_operators"))
    await world.runs.RegisterTool(asked, metadata=world["operator"].bearer, timeout=20)
    return dispatcher_pb2.DeregisterToolRequest(name="of_operators")


@rpcs("dispatcher.ExecuteTool", USER, works=lambda answer: answer.messages[0].status == "success")
async def _(world: World, who: Party) -> Any:
    return dispatcher_pb2.ExecuteToolRequest(
        request_id=who.once(), tool_name="text_statistics", arguments=json.dumps({"text": who.canary}).encode()
    )


@rpcs("dispatcher.ExportRuns", USER, shows="run_id approval_id canary")
async def _(world: World, who: Party) -> Any:
    return dispatcher_pb2.ExportRunsRequest()


@rpcs("dispatcher.EraseRuns", USER, spare=True)
async def _(world: World, who: Party) -> Any:
    run = await world.started(who)
    await world.ended(who, run.run_id)
    return dispatcher_pb2.EraseRunsRequest(request_id=who.once())


# the contract: a service knows which runs it has opened, and of which it is told that another owner has them; it makes the ids of
# events and of calls of tools


@rpcs("events.OpenRun", "dispatcher", told="run_id")
async def _(world: World, who: Party) -> Any:
    opened = await world.opened(who)
    return events_pb2.OpenRunRequest(run_id=opened.context.run_id, epoch=1, context_token=opened.context_token, trace_id="0" * 31 + "1")


@rpcs("events.ListSteps", "dispatcher", told="run_id", shows="canary")
async def _(world: World, who: Party) -> Any:
    opened = await world.run_opened(who)
    step = events_pb2.Step(key="1:note", result=json.dumps({"text": who.canary}).encode())
    append = events_pb2.AppendRequest(append_id=1, run_id=opened.context.run_id, epoch=1, first_seq=1, steps=[step])
    async for _ in world.events.Append(iter([append]), metadata=world.service("dispatcher"), timeout=20):
        break
    return events_pb2.ListStepsRequest(run_id=opened.context.run_id, epoch=1, context_token=opened.context_token)


# of a run that is open, and of a call in the context that its session's calls share
_APPENDS = 2


@rpcs(
    "events.Append",
    "dispatcher",
    told="run_id",
    legit=[("event_id", "*"), ("tool_call_id", "*")],
    until=lambda found: len(found) == _APPENDS,
    works=lambda answer: len(answer.messages) == _APPENDS and not any(one.error_code for one in answer.messages),
)
async def _(world: World, who: Party) -> Any:
    opened, calls = await world.run_opened(who, epoch=3), await world.calls_opened(who)
    noted = [
        events_pb2.NewEvent(event_id=ids.EventId.new(), type="note", data=json.dumps({"text": who.canary}).encode())
        for _ in range(_APPENDS)
    ]  # fmt: skip
    return [
        events_pb2.AppendRequest(append_id=1, run_id=opened.context.run_id, epoch=3, first_seq=1, events=noted[:1]),
        # the first of a call opens its run
        events_pb2.AppendRequest(
            append_id=2, run_id=ids.RunId.new(), epoch=1, first_seq=1, events=noted[1:],
            open=events_pb2.RunToOpen(context_token=calls.context_token, trace_id="0" * 31 + "1", parent_id="0" * 15 + "1"),
            call=events_pb2.Call(request_id=who.word(), correlation_id=ids.CorrelationId.new()),
        ),
    ]  # fmt: skip


def _joined(found: Any) -> bool:
    return any(one.positions for one in found)


# live: what comes depends on what happens just then
@rpcs(
    "events.Tail",
    "gateway",
    told="*",
    until=_joined,
    works=lambda answer: answer.messages[-1].positions[0].joined,
    shows="user_id",
    live=True,
)
async def _(world: World, who: Party) -> Any:
    # in this order: whoever has left hears nothing
    return [
        events_pb2.TailRequest(leave=events_pb2.LeaveUser(user_id=who.things["user_id"])),
        events_pb2.TailRequest(join=events_pb2.JoinUser(access_token=who.token, join_id="one")),
    ]


@rpcs("events.Subscribe", USER, shows="run_id event_id canary", live=True)
async def _(world: World, who: Party) -> Any:
    return events_pb2.SubscribeRequest(run_id=who.things["run_id"])


@rpcs("events.ListEvents", USER, shows="run_id event_id canary", reads="run_id")
async def _(world: World, who: Party) -> Any:
    return events_pb2.ListEventsRequest(run_id=who.things["run_id"], page_size=200)


# how far somebody has seen is a place in time: there is before and after, whoever has a run of that id
@rpcs(
    "events.FollowThread",
    USER,
    told="*",
    shows="run_id event_id canary",
    until=lambda found: any(one.caught_up for one in found),
    live=True,
)
async def _(world: World, who: Party) -> Any:
    return events_pb2.FollowThreadRequest(grant_token=await granted(world, who))


@rpcs("events.ListThreadEvents", USER, shows="run_id event_id canary")
async def _(world: World, who: Party) -> Any:
    return events_pb2.ListThreadEventsRequest(grant_token=await granted(world, who), run_id=who.things["run_id"], page_size=200)


@rpcs("events.ExportEvents", USER, rulers=True, shows="run_id event_id canary")
async def _(world: World, who: Party) -> Any:
    return events_pb2.ExportEventsRequest()


@rpcs("events.EraseEvents", USER, rulers=True, spare=True)
async def _(world: World, who: Party) -> Any:
    run = await world.started(who)
    await world.ended(who, run.run_id)
    return events_pb2.EraseEventsRequest(request_id=who.once())
