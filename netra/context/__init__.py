"""The frozen frame a run executes in."""

from netra.context.execution import UserExecutionContext
from netra.context.isolation import Isolation
from netra.context.managed import Scope, managed

__all__ = ["UserExecutionContext", "managed", "Scope", "Isolation"]
