"""The frozen frame a run executes in."""

from netra.context.execution import CALLS, UserExecutionContext
from netra.context.isolation import Isolation
from netra.context.managed import Scope, managed

__all__ = ["CALLS", "UserExecutionContext", "managed", "Scope", "Isolation"]
