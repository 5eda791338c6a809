"""Splices the envelope of an event around its ready-made data, as bytes; pure."""

from __future__ import annotations

from datetime import UTC, datetime

_TRANSIENT = b'{"type":"%b","after_seq":%d,%b,"timestamp":"%b","data":%b}'
_FRAME = b'{"type":"%b","cursor":%d,"seq":%d,"event_id":"%b",%b,"timestamp":"%b","data":%b}'
_CURSOR, _SEQ = b',"cursor":', b',"seq":'
# where the data of a frame begins, and how the frame of an event ends whose data was erased: nothing before the data can look like it
DATA, ERASED = b',"data":', b',"data":{"erased":true}}'


def envelope(*, user_id: str, thread_id: str, run_id: str, request_id: str, correlation_id: str, trace_id: str) -> bytes:
    """The part that all frames of a run share; without a run, its id is null. The ids are of an alphabet that JSON does not escape."""
    names = {
        "user_id": user_id, "thread_id": thread_id, "run_id": run_id,
        "request_id": request_id, "correlation_id": correlation_id, "trace_id": trace_id,
    }  # fmt: skip
    shared = ",".join(f'"{name}":"{value}"' for name, value in names.items())
    return (shared if run_id else shared.replace('"run_id":""', '"run_id":null')).encode("ascii")


def timestamp(at: datetime) -> bytes:
    """UTC with microseconds, as clients see it."""
    return at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode("ascii")


def splice(shared: bytes, *, kind: str, cursor: int, seq: int, event_id: str, at: bytes, data: bytes) -> bytes:
    """The whole frame: one JSON object, UTF-8."""
    return _FRAME % (kind.encode("ascii"), cursor, seq, event_id.encode("ascii"), shared, at, data)


def without_cursor(frame: bytes) -> bytes:
    """The frame as it is shown to others than its owner: its place in the owner's record is left out."""
    head, _, rest = frame.partition(_CURSOR)
    return head + rest[rest.index(_SEQ) :]


def passing(shared: bytes, *, kind: str, after_seq: int, at: bytes, data: bytes) -> bytes:
    """The frame of what is not recorded: without cursor, seq and event_id, for it has no place in the record."""
    return _TRANSIENT % (kind.encode("ascii"), after_seq, shared, at, data)
