"""What a user asks to be done to threads and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from chassis import identity, telemetry
from netra import errors, ids


@dataclass(frozen=True, slots=True)
class Change:
    """A change, and who asks for it under which request id; without a thread it is about everything of the user."""

    user_id: ids.UserId
    request_id: ids.RequestId
    action: str
    thread_id: ids.ThreadId | None = None
    # what else is asked; the audit trail shows it
    detail: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    actor: str = ""
    correlation_id: str = ""

    @property
    def asked(self) -> str:
        """What the request id stands for: under the same one nothing else can be asked."""
        return " ".join((self.action, self.thread_id or "everything", *(self.detail[name] for name in sorted(self.detail))))


def of(request_id: str, action: str, thread_id: str | None = None, **detail: str) -> Change:
    """A change that the user of the call at hand asks for. Raises `InvalidPayload` naming the field that is wrong."""
    user = identity.current().user
    thread = None if thread_id is None else ids.ThreadId(thread_id)
    return Change(
        user.user_id, ids.RequestId(request_id), action, thread, MappingProxyType(detail), user.actor or user.user_id,
        telemetry.correlation_id(),
    )  # fmt: skip


def no_thread() -> errors.NotFound:
    """The error for a thread that is not there, or not for this user: nobody can tell which."""
    return errors.NotFound("There is no such thread.", field="thread_id")


def only_read() -> errors.PermissionDenied:
    """The error for a thread that was granted to the user for reading, when they write."""
    return errors.PermissionDenied("The thread was granted to you for reading.", field="thread_id")


def not_yours() -> errors.PermissionDenied:
    """The error for a thread that was granted to the user, who knows of it but does not rule over it."""
    return errors.PermissionDenied("The thread was granted to you. Only its owner may do this.")
