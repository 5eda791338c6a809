"""Examples of the context service: contexts, messages, files."""

from __future__ import annotations

from typing import Any

from netra import ids
from netra.context.v1 import context_pb2
from tests.prove.isolation.example import USER, rpcs
from tests.prove.isolation.people import Party
from tests.prove.isolation.world import World


# the contract: the dispatcher names the run; the record then refuses one that is another user's
@rpcs("context.OpenContext", "dispatcher", shows="user_id canary", legit=[("run_id", "*")])
async def _(world: World, who: Party) -> Any:
    said = f'{{"note":"{who.canary}"}}'.encode()
    return context_pb2.OpenContextRequest(
        request_id=who.once(), access_token=who.token, run_id=ids.RunId.new(), thread_id=who.things["thread_id"],
        connection_id=ids.uuid7(), agent_context=said, audit_metadata=said,
        message=context_pb2.RunMessage(name="request", role="user", content=f"About {who.canary}."),
    )  # fmt: skip


@rpcs("context.RenewContext", "dispatcher", context=True)
async def _(world: World, who: Party) -> Any:
    return context_pb2.RenewContextRequest()


@rpcs("context.DeriveContext", "dispatcher", context=True, shows="user_id canary")
async def _(world: World, who: Party) -> Any:
    said = f'{{"more":"{who.canary}"}}'.encode()
    return context_pb2.DeriveContextRequest(request_id=who.once(), operation="a-part", agent_context=said)


@rpcs("context.GetContext", USER, rulers=True, shows="context_id user_id canary", reads="context_id")
async def _(world: World, who: Party) -> Any:
    return context_pb2.GetContextRequest(context_id=who.things["context_id"], user_id=who.user_id)


@rpcs("context.CloseContext", "dispatcher", context=True)
async def _(world: World, who: Party) -> Any:
    return context_pb2.CloseContextRequest(message=context_pb2.RunMessage(name="answer", role="assistant", content=f"It is {who.canary}."))


@rpcs("context.ListContexts", USER, long=True, rulers=True, shows="context_id user_id canary", reads="thread_id")
async def _(world: World, who: Party) -> Any:
    return context_pb2.ListContextsRequest(page_size=200, user_id=who.user_id)


@rpcs("context.ListContextAudit", USER, rulers=True, shows="context_id", reads="context_id")
async def _(world: World, who: Party) -> Any:
    return context_pb2.ListContextAuditRequest(page_size=200, context_id=who.things["context_id"], user_id=who.user_id)


@rpcs("context.AppendMessage", "dispatcher", context=True, shows="canary")
async def _(world: World, who: Party) -> Any:
    return context_pb2.AppendMessageRequest(request_id=who.once(), role="user", content=f"About {who.canary}.")


@rpcs("context.HideMessages", "dispatcher", context=True)
async def _(world: World, who: Party) -> Any:
    return context_pb2.HideMessagesRequest()


@rpcs("context.ListMessages", USER, shows="message_id thread_id canary", reads="thread_id")
async def _(world: World, who: Party) -> Any:
    return context_pb2.ListMessagesRequest(thread_id=who.things["thread_id"], page_size=200)


@rpcs("context.PutArtifact", USER, shows="canary")
async def _(world: World, who: Party) -> Any:
    header = context_pb2.ArtifactHeader(request_id=who.once(), name=f"{who.canary}.txt", media_type="text/plain", size=9)
    return [context_pb2.PutArtifactRequest(header=header), context_pb2.PutArtifactRequest(data=b"some text")]


@rpcs("context.GetArtifact", USER, shows="artifact_id canary", reads="artifact_id")
async def _(world: World, who: Party) -> Any:
    return context_pb2.GetArtifactRequest(artifact_id=who.things["artifact_id"])


@rpcs("context.ListArtifacts", USER, long=True, shows="artifact_id canary", reads="thread_id")
async def _(world: World, who: Party) -> Any:
    return context_pb2.ListArtifactsRequest(page_size=200)


@rpcs("context.DeleteArtifact", USER)
async def _(world: World, who: Party) -> Any:
    return context_pb2.DeleteArtifactRequest(artifact_id=(await world.kept(who)).artifact_id)
