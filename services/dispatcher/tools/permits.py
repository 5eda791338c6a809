"""May these permissions call this tool; pure."""

from __future__ import annotations

from netra import errors
from netra.tool import ToolSpec


def may_call(spec: ToolSpec, permissions: frozenset[str]) -> bool:
    """Whether the permissions are enough."""
    return "tools:execute" in permissions and spec.permission in permissions


def require(spec: ToolSpec, permissions: frozenset[str]) -> None:
    """Raises `PermissionDenied` naming the missing permission."""
    for needed in ("tools:execute", spec.permission):
        if needed not in permissions:
            message = f"The tool {spec.name} needs the permission {needed}, which your role and tier do not have."
            raise errors.PermissionDenied(message, permission=needed, tool=spec.name)
