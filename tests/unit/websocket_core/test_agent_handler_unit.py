"""What becomes of a START_AGENT frame inside the gateway before any service is asked."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta

from gateway import frames
from netra import ids
from netra.context import UserExecutionContext
from tests.fixtures.user_execution_context_fixtures import Somebody, websocket_scope


class TestAgentHandlerUnit:
    """Business value: whatever a user asks for is done in the name of exactly this user, and can be followed from end to end."""

    def test_user_execution_context_complete_creation(self) -> None:
        """Business value: a request says who asks, in which conversation, for which run, over which connection; nothing is made up."""
        who, thread_id, run_id, connection_id = Somebody(tier="enterprise"), ids.ThreadId.new(), ids.RunId.new(), ids.ConnectionId.new()
        deadline = datetime.now(UTC) + timedelta(minutes=5)
        payload = {"agent": "supervisor", "user_request": "Where does the money go?", "inputs": {"days": 30}}
        text = json.dumps({"type": "START_AGENT", "id": "m-1", "thread_id": thread_id, "payload": payload})
        frame = frames.parse(text, 65_536)
        context = UserExecutionContext.from_websocket(
            websocket_scope("Netra/1.0"), who, thread_id=frame.thread_id, run_id=run_id, request_id=frame.id, connection_id=connection_id,
            deadline=deadline, agent_context={"goal": frame.payload["user_request"], "inputs": frame.payload["inputs"]},
        )  # fmt: skip
        assert (context.user_id, context.tenant_id, context.session_id) == (who.user_id, who.tenant_id, who.session_id)
        assert (context.roles, context.tier, context.scope) == (("user",), "enterprise", None)
        assert (context.thread_id, context.run_id, context.request_id) == (thread_id, run_id, "m-1")
        assert (context.connection_id, context.deadline) == (connection_id, deadline)
        assert (context.depth, context.parent_request_id) == (0, None)
        assert context.agent_context["goal"] == "Where does the money go?"
        assert context.agent_context["inputs"]["days"] == 30
        assert context.audit_metadata["client_ip"] == "203.0.113.7"
        assert context.audit_metadata["user_agent"] == "Netra/1.0"
        assert "hidden" not in json.dumps(context.to_dict())
        # each id is of its own kind, and every field has come to the other side of a call
        kinds = {name: type(getattr(context, name)) for name in ("user_id", "tenant_id", "session_id", "thread_id", "run_id", "request_id")}
        assert kinds == {
            "user_id": ids.UserId, "tenant_id": ids.TenantId, "session_id": ids.SessionId, "thread_id": ids.ThreadId, "run_id": ids.RunId,
            "request_id": ids.RequestId,
        }  # fmt: skip
        assert type(context.correlation_id) is ids.CorrelationId
        again = UserExecutionContext.from_proto(context.to_proto())
        assert again == context
        assert all(getattr(again, field.name) == getattr(context, field.name) for field in dataclasses.fields(context))
