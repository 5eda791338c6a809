"""The RPCs of DispatcherService that bring runs what they wait for: messages and approvals."""

from __future__ import annotations

from typing import Any

import orjson

from chassis import identity
from netra import errors, ids
from netra.dispatcher.v1 import approvals_pb2, dispatcher_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from services.dispatcher import approvals, servicer_fields, supervisor

_STATES = ("pending", "approved", "rejected", "expired")
_STATE = {name: approvals_pb2.ApprovalState.Value(f"APPROVAL_STATE_{name.upper()}") for name in _STATES}
_STATE_NAME = {value: name for name, value in _STATE.items()}
_DECISION = {"approve": approvals_pb2.DECISION_APPROVE, "reject": approvals_pb2.DECISION_REJECT}
_DECISION_NAME = {value: name for name, value in _DECISION.items()}
_MAX_MESSAGE_BYTES = 64 * 1024
_MAX_COMMENT = 2000


class WaitsServicer(dispatcher_pb2_grpc.DispatcherServiceServicer):
    """What people say to runs that go on."""

    _supervisor: supervisor.Supervisor
    _verifier: identity.Verifier

    async def SendMessage(self, request: pb.SendMessageRequest, context: Any) -> pb.SendMessageResponse:
        """Say something to a run."""
        request_id, run_id = ids.RequestId(request.request_id), ids.RunId(request.run_id)
        text = _text(request.message)
        granted = await self._granted(request.grant_token, "write")
        run = await self._supervisor.send(identity.current().user, run_id, request_id, text, granted)
        return pb.SendMessageResponse(message_id=run.message_id, state=servicer_fields.STATE[run.state])

    async def ResolveApproval(self, request: approvals_pb2.ResolveApprovalRequest, context: Any) -> approvals_pb2.ResolveApprovalResponse:
        """The caller's word on an approval."""
        approval_id = ids.ApprovalId(request.approval_id)
        decision = _DECISION_NAME.get(request.decision)
        if decision is None:
            raise errors.InvalidPayload("decision must be to approve or to reject", field="decision")
        if len(request.comment) > _MAX_COMMENT:
            raise errors.TooLarge(f"comment has at most {_MAX_COMMENT} characters", field="comment", limit=_MAX_COMMENT)
        granted = await self._granted(request.grant_token, "write")
        found = await self._supervisor.resolve(identity.current().user, approval_id, decision, request.comment, granted)
        return approvals_pb2.ResolveApprovalResponse(approval=_approval(found))

    async def GetApproval(self, request: approvals_pb2.GetApprovalRequest, context: Any) -> approvals_pb2.GetApprovalResponse:
        """One approval."""
        approval_id = ids.ApprovalId(request.approval_id)
        granted = await self._granted(request.grant_token, "read")
        found = await self._supervisor.approval(identity.current().user, approval_id, granted)
        return approvals_pb2.GetApprovalResponse(approval=_approval(found))

    async def ListApprovals(self, request: approvals_pb2.ListApprovalsRequest, context: Any) -> approvals_pb2.ListApprovalsResponse:
        """One page of approvals."""
        size = servicer_fields.page_size(request.page_size)
        granted = await self._granted(request.grant_token, "read")
        found = await self._supervisor.approvals(
            identity.current().user,
            run_id=ids.RunId(request.run_id) if request.run_id else "",
            state=_STATE_NAME.get(request.state, ""),
            after=servicer_fields.decoded(request.page_token, ids.ApprovalId),
            size=size + 1,
            granted=granted,
        )
        token = servicer_fields.encoded(found[size - 1].approval_id) if len(found) > size else ""
        return approvals_pb2.ListApprovalsResponse(approvals=[_approval(one) for one in found[:size]], next_page_token=token)

    async def _granted(self, token: str, access: str) -> str:
        """The thread of a grant token of the caller's; empty without one. Raises `Unauthenticated`, `PermissionDenied`."""
        if not token:
            return ""
        grant = await self._verifier.grant(token, identity.current().user)
        if not grant.allows(access):
            whose = "Only the owner of the thread may do this." if access == "own" else "The thread was granted to you for reading only."
            raise errors.PermissionDenied(whose)
        return grant.resource


def _text(message: str) -> str:
    if not message.strip():
        raise errors.InvalidPayload("message is required and must not be empty", field="message")
    if len(message.encode()) > _MAX_MESSAGE_BYTES:
        raise errors.TooLarge(f"message must be at most {_MAX_MESSAGE_BYTES} bytes", field="message", limit=_MAX_MESSAGE_BYTES)
    return message


def _approval(found: approvals.Approval) -> approvals_pb2.Approval:
    return approvals_pb2.Approval(
        approval_id=found.approval_id, run_id=found.run_id, thread_id=found.thread_id, user_id=found.user_id, state=_STATE[found.state],
        message=found.message, tool_name=found.tool_name, parameters=orjson.dumps(dict(found.parameters)) if found.tool_name else b"",
        quorum=found.quorum, votes=[_vote(one) for one in found.votes], created_at=servicer_fields.time(found.created_at),
        expires_at=servicer_fields.time(found.expires_at), resolved_at=servicer_fields.time(found.resolved_at),
    )  # fmt: skip


def _vote(vote: approvals.Vote) -> approvals_pb2.Vote:
    return approvals_pb2.Vote(
        user_id=vote.user_id, decision=_DECISION[vote.decision], comment=vote.comment, at=servicer_fields.time(vote.at)
    )
