"""Every error that crosses a boundary.

NetraError
├── Unauthenticated            no valid credential
├── PermissionDenied           known, but may not
├── NotFound                   absent, or somebody else's
├── InvalidPayload             a field is wrong; names it
│   ├── InvalidContext         an execution context cannot be made of this
│   │   ├── PlaceholderValue   a value that was never meant
│   │   ├── ReservedKey        a key that only the platform sets
│   │   ├── DepthExceeded      more than 10 generations
│   │   └── ContextIsolation   it holds what another user's holds
│   ├── TooLarge               over a limit; names it
│   ├── BadJson                not RFC 8259 JSON
│   ├── DuplicateKey           an object names a key twice
│   ├── NotAnObject            JSON, but not an object
│   ├── UnknownType            a frame of a type that does not exist
│   └── BinaryNotSupported     only text frames are read
├── AlreadyExists              same id, other payload
├── Busy                       the thread has an active run
├── RateLimited                too many, too fast; says when to come back
├── QuotaExceeded              a limit of the tier
├── FailedPrecondition         not in a state that allows this
│   └── NonDeterministicAgent  a replay asked for another step than the record has
├── Fenced                     a newer owner has the run
├── SandboxUnavailable         the wall a tool demands is not here
├── SecurityViolation          a tool's code tried what its sandbox forbids
├── ResourceExhausted          a call took more than it may; names the limit
├── DeadlineExceeded           out of time
├── Cancelled                  stopped by its owner
├── ToolFailed                 a tool failed in its own way
├── AgentFailed                an agent raised an error of its own
├── OwnerLost                  the process that owned a run died
├── Unavailable                a part of the platform is not reachable just now
└── Internal                   a fault of the platform
"""

from __future__ import annotations

from typing import ClassVar


class NetraError(Exception):
    """Something went wrong."""

    code: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str = "", *, retry_after_ms: int | None = None, **details: object) -> None:
        self.message = message or (type(self).__doc__ or "").partition("\n")[0]
        self.details: dict[str, str] = {name: str(value) for name, value in details.items()}
        self.retry_after_ms = retry_after_ms
        super().__init__(self.message)


class Unauthenticated(NetraError):
    """No valid credential came with the call. Sign in and try again."""

    code = "UNAUTHENTICATED"


class PermissionDenied(NetraError):
    """The caller may not do this."""

    code = "PERMISSION_DENIED"


class NotFound(NetraError):
    """There is no such thing."""

    code = "NOT_FOUND"


class InvalidPayload(NetraError):
    """A field is missing or wrong."""

    code = "INVALID_PAYLOAD"


class InvalidContext(InvalidPayload):
    """An execution context cannot be made of this."""


class PlaceholderValue(InvalidContext):
    """A placeholder stands where a real value belongs."""


class ReservedKey(InvalidContext):
    """A key is set by the platform alone."""


class DepthExceeded(InvalidContext):
    """An execution context has at most 10 generations of children."""


class ContextIsolation(InvalidContext):
    """An execution context holds something that another user's holds as well."""


class TooLarge(InvalidPayload):
    """Something is larger than its limit."""

    code = "FRAME_TOO_LARGE"


class BadJson(InvalidPayload):
    """This is not JSON as RFC 8259 describes it."""

    code = "BAD_JSON"


class DuplicateKey(InvalidPayload):
    """A JSON object names the same key twice."""

    code = "DUPLICATE_KEY"


class NotAnObject(InvalidPayload):
    """The JSON must be an object."""

    code = "NOT_AN_OBJECT"


class UnknownType(InvalidPayload):
    """There is no frame of this type."""

    code = "UNKNOWN_TYPE"


class BinaryNotSupported(InvalidPayload):
    """Binary frames are not read. Send text frames."""

    code = "BINARY_NOT_SUPPORTED"


class AlreadyExists(NetraError):
    """The same request id was used with another payload. Use a fresh UUID for each request."""

    code = "ALREADY_EXISTS"


class Busy(NetraError):
    """The thread has an active run. Wait for its end, or send on_busy=enqueue."""

    code = "BUSY"
    retryable = True


class RateLimited(NetraError):
    """Too many calls in a short time."""

    code = "RATE_LIMITED"
    retryable = True


class QuotaExceeded(NetraError):
    """A limit of the caller's tier is reached."""

    code = "QUOTA_EXCEEDED"


class FailedPrecondition(NetraError):
    """The thing is not in a state that allows this."""

    code = "FAILED_PRECONDITION"


class NonDeterministicAgent(FailedPrecondition):
    """A replay asked for another step than the record has."""


class Fenced(NetraError):
    """A newer owner has the run, or the append does not follow its head."""

    code = "FENCED"


class SandboxUnavailable(NetraError):
    """The enforcement tier the tool demands is not available here."""

    code = "SANDBOX_UNAVAILABLE"


class SecurityViolation(NetraError):
    """The tool's code tried what its sandbox forbids."""

    code = "SECURITY_VIOLATION"


class ResourceExhausted(NetraError):
    """The call took more than it may."""

    code = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(NetraError):
    """The deadline passed before the work was done."""

    code = "DEADLINE_EXCEEDED"
    retryable = True


class Cancelled(NetraError):
    """The work was cancelled by its owner."""

    code = "CANCELLED"


class ToolFailed(NetraError):
    """The tool failed."""

    code = "TOOL_FAILED"


class AgentFailed(NetraError):
    """The agent failed."""

    code = "AGENT_FAILED"


class OwnerLost(NetraError):
    """The process that ran this died, and the run could not be carried on. Start it again."""

    code = "OWNER_LOST"
    retryable = True


class Unavailable(NetraError):
    """A part of the platform is not reachable just now. Try again."""

    code = "UNAVAILABLE"
    retryable = True


class Internal(NetraError):
    """A fault of the platform."""

    code = "INTERNAL"


def _tree(root: type[NetraError]) -> list[type[NetraError]]:
    return [root, *(found for child in root.__subclasses__() for found in _tree(child))]


def by_code(code: str) -> type[NetraError]:
    """The most general class with this code; `Internal` for an unknown one."""
    return next((found for found in _tree(NetraError)[1:] if found.code == code), Internal)
