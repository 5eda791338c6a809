"""The frozen frame a run executes in."""

from netra.context.execution import UserExecutionContext

__all__ = ["UserExecutionContext"]
