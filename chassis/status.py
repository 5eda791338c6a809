"""NetraError <-> gRPC status with ErrorInfo, both directions, nowhere else."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterator
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from chassis import lifecycle, log, telemetry
from netra import errors

DOMAIN = "netra"
_log = log.get(__name__)

_GRPC_CODE: dict[str, int] = {
    "UNAUTHENTICATED": code_pb2.UNAUTHENTICATED,
    "PERMISSION_DENIED": code_pb2.PERMISSION_DENIED,
    "NOT_FOUND": code_pb2.NOT_FOUND,
    "INVALID_PAYLOAD": code_pb2.INVALID_ARGUMENT,
    "FRAME_TOO_LARGE": code_pb2.INVALID_ARGUMENT,
    "ALREADY_EXISTS": code_pb2.ALREADY_EXISTS,
    "BUSY": code_pb2.FAILED_PRECONDITION,
    "RATE_LIMITED": code_pb2.RESOURCE_EXHAUSTED,
    "QUOTA_EXCEEDED": code_pb2.RESOURCE_EXHAUSTED,
    "FAILED_PRECONDITION": code_pb2.FAILED_PRECONDITION,
    "FENCED": code_pb2.ABORTED,
    "SANDBOX_UNAVAILABLE": code_pb2.FAILED_PRECONDITION,
    "RESOURCE_EXHAUSTED": code_pb2.RESOURCE_EXHAUSTED,
    "SECURITY_VIOLATION": code_pb2.PERMISSION_DENIED,
    "DEADLINE_EXCEEDED": code_pb2.DEADLINE_EXCEEDED,
    "CANCELLED": code_pb2.CANCELLED,
    "OWNER_LOST": code_pb2.ABORTED,
    "UNAVAILABLE": code_pb2.UNAVAILABLE,
}
# longer ones would not fit into the trailers of a call
_MAX_MESSAGE = 1024
# how grpc itself refuses a message, with the code of one who calls too often
_TOO_LARGE = "larger than max"
_BY_STATUS: dict[grpc.StatusCode, type[errors.NetraError]] = {
    grpc.StatusCode.UNAUTHENTICATED: errors.Unauthenticated,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidPayload,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPrecondition,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.RateLimited,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceeded,
    # who cancels a call is not told of it, and a service that means it says so: the other side has cut it
    grpc.StatusCode.CANCELLED: errors.Unavailable,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
}


def as_netra(error: BaseException) -> errors.NetraError:
    """The error to show for any exception. Unknown ones are logged in full and shown as a support code only.

    A `CancelledError` is that of something else which was waited for; that of the task at hand is nobody's to show: see `told_to_stop`.
    """
    if isinstance(error, errors.NetraError):
        return error
    if isinstance(error, grpc.aio.AioRpcError):
        return from_rpc(error)
    if isinstance(error, TimeoutError):
        return errors.DeadlineExceeded()
    if isinstance(error, asyncio.CancelledError):
        return stopped()
    support_code = secrets.token_hex(4).upper()
    _log.error("internal error", support_code=support_code, exc_info=error)
    return errors.Internal(f"Something went wrong here. Support code {support_code}.", support_code=support_code)


def stopped() -> errors.Unavailable:
    """What a call came to that was cut because something stops, and not because anybody cancelled it."""
    return errors.Unavailable("A part of the platform stopped while this was under way. Try again.")


def to_proto(error: errors.NetraError) -> status_pb2.Status:
    """The rich status: ErrorInfo always, BadRequest when a field is at fault, RetryInfo when waiting helps."""
    details = [_packed(error_details_pb2.ErrorInfo(reason=error.code, domain=DOMAIN, metadata=_metadata(error)))]
    if "field" in error.details:
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.details["field"], description=_short(error.message))
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if error.retry_after_ms is not None:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(error.retry_after_ms)
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(code=_GRPC_CODE.get(error.code, code_pb2.INTERNAL), message=_short(error.message), details=details)


def _short(text: str) -> str:
    return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 1] + "…"


def _packed(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _metadata(error: errors.NetraError) -> dict[str, str]:
    correlation = telemetry.correlation_id()
    return {**{name: _short(value) for name, value in error.details.items()}, **({"correlation_id": correlation} if correlation else {})}


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: errors.NetraError) -> None:
    """End the call with the error."""
    # abort_with_status loses nothing; trailing metadata set before is kept
    await context.abort_with_status(rpc_status.to_status(to_proto(error)))


def from_rpc(error: grpc.aio.AioRpcError) -> errors.NetraError:
    """The error that the other side raised; for a transport failure the class that fits its status code."""
    rich = rpc_status.from_call(error)  # type: ignore[arg-type]
    info, delay = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    retry_after_ms: int | None = None
    for detail in rich.details if rich is not None else ():
        if detail.Unpack(delay):
            retry_after_ms = delay.retry_delay.ToMilliseconds()
        detail.Unpack(info)
    if info.domain == DOMAIN:
        details = {name: value for name, value in info.metadata.items() if name != "correlation_id"}
        known = errors.by_code(info.reason)(error.details() or "", retry_after_ms=retry_after_ms)
        known.details = details
        return known
    if error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED and _TOO_LARGE in (error.details() or ""):
        return errors.TooLarge("A message between two parts of the platform is larger than it may be.")
    return _BY_STATUS.get(error.code(), errors.Internal)()


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise `NetraError` instead of gRPC's errors; of a channel that is closed meanwhile, too."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc(error) from None
    except grpc.aio.UsageError as error:
        if "closed" not in str(error):
            raise
        raise stopped() from None
    except asyncio.CancelledError:
        if lifecycle.told_to_stop():
            raise
        raise stopped() from None
