"""Messages of the services as the JSON that the edge shows; pure."""

from __future__ import annotations

import base64
from typing import Any

import orjson
from google.protobuf.timestamp_pb2 import Timestamp

from netra.auth.v1 import auth_pb2
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import approvals_pb2, dispatcher_pb2

_IDS = ("context_id", "user_id", "tenant_id", "session_id", "thread_id", "run_id", "request_id")
# what a list of tools can be narrowed by
TOOL_FILTERS = ("text", "tag", "category", "permission", "tier", "enforcement", "parameter")
_PREFIX, _ACCESS, _SELECTION = "RUN_STATE_", "ACCESS_", "THREAD_SELECTION_"
_APPROVAL, _DECISION = "APPROVAL_STATE_", "DECISION_"


def state(value: dispatcher_pb2.RunState.ValueType) -> str:
    """`completed` for RUN_STATE_COMPLETED."""
    return dispatcher_pb2.RunState.Name(value).removeprefix(_PREFIX).lower()


def state_named(name: str) -> dispatcher_pb2.RunState.ValueType | None:
    """The state called `completed`, if there is one."""
    written = _PREFIX + name.upper()
    return dispatcher_pb2.RunState.Value(written) if name and written in dispatcher_pb2.RunState.keys() else None


def approval_state(value: approvals_pb2.ApprovalState.ValueType) -> str:
    """`pending` for APPROVAL_STATE_PENDING."""
    return approvals_pb2.ApprovalState.Name(value).removeprefix(_APPROVAL).lower()


def approval_state_named(name: str) -> approvals_pb2.ApprovalState.ValueType | None:
    """The state called `pending`, if there is one."""
    written = _APPROVAL + name.upper()
    return approvals_pb2.ApprovalState.Value(written) if name and written in approvals_pb2.ApprovalState.keys() else None


def access(value: context_pb2.Access.ValueType) -> str:
    """`write` for ACCESS_WRITE."""
    return context_pb2.Access.Name(value).removeprefix(_ACCESS).lower()


def access_named(name: Any) -> context_pb2.Access.ValueType | None:
    """What may be granted under this name, if anything."""
    return {"read": context_pb2.ACCESS_READ, "write": context_pb2.ACCESS_WRITE}.get(name) if isinstance(name, str) else None


def selection_named(name: str) -> context_pb2.ThreadSelection.ValueType | None:
    """The selection of threads called `shared`; the caller's own for no name."""
    written = _SELECTION + (name or "own").upper()
    return context_pb2.ThreadSelection.Value(written) if written in context_pb2.ThreadSelection.keys() else None


def time(message: Any, field: str) -> str | None:
    """A moment, when it is told."""
    value: Timestamp = getattr(message, field)
    return value.ToJsonString() if message.HasField(field) else None


def _json(text: bytes) -> Any:
    return orjson.Fragment(text) if text else None


def tokens(found: auth_pb2.Tokens) -> dict[str, Any]:
    """A sign-in."""
    return {
        "access_token": found.access_token,
        "refresh_token": found.refresh_token,
        "token_type": "Bearer",
        "expires_in": int(found.expires_in.ToTimedelta().total_seconds()),
        "user_id": found.user_id,
    }


def oauth_tokens(found: auth_pb2.Tokens, kind: str) -> dict[str, Any]:
    """The answer of the token endpoint (RFC 6749, section 5.1); `kind` is what a token exchange has issued."""
    plain = {name: value for name, value in tokens(found).items() if value}
    more = {"scope": " ".join(found.scope), "issued_token_type": kind}
    return plain | {name: value for name, value in more.items() if value}


def jwks(keys: auth_pb2.GetKeysResponse) -> dict[str, Any]:
    """The keys that sign access tokens (RFC 8037). Other signers' keys stay inside: nobody outside may take their tokens."""
    return {
        "keys": [
            {
                "kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": key.kid,
                "x": base64.urlsafe_b64encode(key.public_key).rstrip(b"=").decode(),
            }
            for key in keys.keys
            if key.issuer == "auth"
        ]
    }  # fmt: skip


def caller(found: auth_pb2.GetPermissionsResponse) -> dict[str, Any]:
    """Who somebody is."""
    who = found.principal
    return {
        "user_id": who.user_id,
        "email": found.email,
        "tenant_id": who.tenant_id,
        "session_id": who.session_id,
        "roles": list(who.roles),
        "tier": who.tier,
        "permissions": list(found.permissions),
    }


def limits(found: auth_pb2.TierLimits) -> dict[str, Any]:
    """What a tier is entitled to."""
    return {
        "runs_per_minute": found.runs_per_minute,
        "concurrent_runs": found.concurrent_runs,
        "queued_runs": found.queued_runs,
        "tool_calls_per_minute": found.tool_calls_per_minute,
        "sockets": found.sockets,
        "frames_per_minute": found.frames_per_minute,
        "requests_per_minute": found.requests_per_minute,
        "retention_days": found.retention_days,
        "monthly_cost_usd": found.monthly_cost_micro_usd / 1_000_000,
        "single_session": found.single_session,
        # null: as many as anybody may have
        "artifacts": found.artifacts if found.HasField("artifacts") else None,
        "artifact_bytes": found.artifact_bytes if found.HasField("artifact_bytes") else None,
    }


def run(found: dispatcher_pb2.Run) -> dict[str, Any]:
    """A run."""
    return {
        "run_id": found.run_id,
        "thread_id": found.thread_id,
        "request_id": found.request_id,
        "kind": found.kind,
        "agent": found.agent,
        "state": state(found.state),
        "created_at": time(found, "created_at"),
        "started_at": time(found, "started_at"),
        "ended_at": time(found, "ended_at"),
        "correlation_id": found.correlation_id,
        "user_id": found.user_id,
        "agent_version": found.agent_version or None,
        "waits_for": found.waits_for or None,
    }


def approval(found: approvals_pb2.Approval) -> dict[str, Any]:
    """An approval, with what was said to it."""
    return {
        "approval_id": found.approval_id,
        "run_id": found.run_id,
        "thread_id": found.thread_id,
        "user_id": found.user_id,
        "state": approval_state(found.state),
        "message": found.message,
        "tool_name": found.tool_name or None,
        "parameters": _json(found.parameters),
        "quorum": found.quorum,
        "votes": [_vote(one) for one in found.votes],
        "created_at": time(found, "created_at"),
        "expires_at": time(found, "expires_at"),
        "resolved_at": time(found, "resolved_at"),
    }


def _vote(found: approvals_pb2.Vote) -> dict[str, Any]:
    decision = approvals_pb2.Decision.Name(found.decision).removeprefix(_DECISION).lower()
    return {"user_id": found.user_id, "decision": decision, "comment": found.comment, "at": time(found, "at")}


def stages(found: dispatcher_pb2.Run) -> list[dict[str, Any]]:
    """What a run has passed on its way, in order."""
    return [{"name": stage.name, "at": stage.at.ToJsonString()} for stage in found.stages]


def thread(found: context_pb2.Thread) -> dict[str, Any]:
    """A thread."""
    return {
        "thread_id": found.thread_id,
        "created_at": time(found, "created_at"),
        "updated_at": time(found, "updated_at"),
        "messages": found.messages,
        "owner_id": found.owner_id,
        "access": access(found.access),
        "deleted_at": time(found, "deleted_at"),
    }


def grant(found: context_pb2.Grant) -> dict[str, Any]:
    """Whom a thread is granted to."""
    return {
        "thread_id": found.thread_id,
        "grantee_id": found.grantee_id,
        "access": access(found.access),
        "created_at": time(found, "created_at"),
        "withdrawn_at": time(found, "withdrawn_at"),
    }


def context(found: context_pb2.StoredContext | context_pb2.GetContextResponse) -> dict[str, Any]:
    """An execution context, and what became of it."""
    frame = found.context
    return {
        **{name: getattr(frame, name) for name in _IDS},
        "connection_id": frame.connection_id or None,
        "roles": list(frame.roles),
        "tier": frame.tier,
        "scope": list(frame.scope) or None,
        "created_at": time(frame, "created_at"),
        "deadline": time(frame, "deadline"),
        "depth": frame.depth,
        "parent_request_id": frame.parent_request_id or None,
        "correlation_id": frame.correlation_id,
        "agent_context": _json(frame.agent_context),
        "audit_metadata": _json(frame.audit_metadata),
        "closed_at": time(found, "closed_at"),
    }


def entry(found: context_pb2.AuditEntry) -> dict[str, Any]:
    """A line of the audit trail."""
    return {
        "entry_id": found.entry_id,
        "at": time(found, "at"),
        "context_id": found.context_id or None,
        "thread_id": found.thread_id or None,
        "actor": found.actor,
        "action": found.action,
        "correlation_id": found.correlation_id,
        "detail": _json(found.detail),
    }


def message(found: context_pb2.Message) -> dict[str, Any]:
    """A message of a thread."""
    return {
        "message_id": found.message_id,
        "thread_id": found.thread_id,
        "position": found.position,
        "role": found.role,
        "content": found.content,
        "run_id": found.run_id or None,
        "created_at": time(found, "created_at"),
        "user_id": found.user_id,
    }


def artifact(found: context_pb2.Artifact) -> dict[str, Any]:
    """A file."""
    return {
        "artifact_id": found.artifact_id,
        "name": found.name,
        "bytes": found.size,
        "sha256": found.sha256,
        "media_type": found.media_type,
        "run_id": found.run_id or None,
        "created_at": time(found, "created_at"),
        "thread_id": found.thread_id or None,
        "user_id": found.user_id,
    }


def artifacts(found: context_pb2.ListArtifactsResponse) -> dict[str, Any]:
    """A page of files, and how much there may be of them."""
    figures = {"count": found.count, "bytes": found.bytes, "max_count": found.max_count, "max_bytes": found.max_bytes}
    return {"artifacts": [artifact(one) for one in found.artifacts], "next_page_token": found.next_page_token, **figures}


def tool(found: dispatcher_pb2.Tool) -> dict[str, Any]:
    """A tool."""
    return {
        "name": found.name,
        "version": found.version,
        "description": found.description,
        "input_schema": _json(found.input_schema),
        "output_schema": _json(found.output_schema),
        "tags": list(found.tags),
        "permission": found.permission,
        "side_effects": found.side_effects,
        "timeout_s": found.timeout.ToNanoseconds() / 1e9 if found.HasField("timeout") else None,
        "category": found.category,
        "min_role": found.min_role or None,
        "min_tier": found.min_tier or None,
        "enforcement": found.enforcement,
        "retries": found.retries,
        "idempotent": found.idempotent,
        "reconciles": found.reconciles,
        "concurrency": found.concurrency or None,
        "fallback": found.fallback or None,
        "deprecated": found.deprecated or None,
        "digest": found.digest,
    }


def agent(found: dispatcher_pb2.Agent) -> dict[str, Any]:
    """An agent."""
    return {
        "name": found.name,
        "version": found.version,
        "description": found.description,
        "input_schema": _json(found.input_schema),
        "output_schema": _json(found.output_schema),
        "deadline_s": found.deadline.ToNanoseconds() / 1e9 if found.HasField("deadline") else None,
        "tools": list(found.tools) if found.narrowed else None,
    }
