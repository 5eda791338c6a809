"""Interactive calls as their callers are answered, out of what is kept of their outcomes; pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from netra import errors
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from services.dispatcher import runs

_STATE = {"success": runs.RunState.COMPLETED, "cancelled": runs.RunState.CANCELLED, "timeout": runs.RunState.TIMED_OUT}


def of(
    kept: Mapping[str, Any], tool_call_id: str, execution_time_ms: float, *, attempts: int = 0,
    enforcement: Mapping[str, object] | None = None, answered_by: str = "",
) -> bytes:  # fmt: skip
    """The answer that an outcome means: status, with the result or the error."""
    answer = pb.ExecuteToolResponse(
        tool_call_id=tool_call_id, status=kept["status"], preview=kept.get("preview", ""), attempts=attempts, answered_by=answered_by,
        enforcement=b"" if enforcement is None else orjson.dumps(dict(enforcement)),
    )  # fmt: skip
    answer.execution_time.FromMicroseconds(round(execution_time_ms * 1000))
    if "result" in kept:
        answer.result = orjson.dumps(kept["result"])
    if "result_ref" in kept:
        answer.result_ref.CopyFrom(pb.ResultRef(**kept["result_ref"]))
    if "error" in kept:
        answer.error.CopyFrom(_error(kept["error"]))
    elif "error_ref" in kept:
        # it is in the record by reference: how it began must do
        answer.error.CopyFrom(pb.ToolError(code=errors.ToolFailed.code, message=kept.get("error_preview", ""), details=b"{}"))
    return answer.SerializeToString()


def state_after(status: str) -> runs.RunState:
    """The final state of an interactive call."""
    return _STATE.get(status, runs.RunState.FAILED)


def lost() -> pb.ExecuteToolResponse:
    """The answer when nothing is kept."""
    error = errors.OwnerLost("The process that ran the tool died. What it recorded of the call is in the record of the run.")
    return pb.ExecuteToolResponse(status="unknown", error=pb.ToolError(code=error.code, message=error.message, details=b"{}"))


def _error(data: Mapping[str, Any]) -> pb.ToolError:
    return pb.ToolError(code=data["code"], message=data["message"], details=orjson.dumps(data["details"]))
