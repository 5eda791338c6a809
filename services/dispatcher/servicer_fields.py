"""What many RPCs of DispatcherService read and write in the same way; pure."""

from __future__ import annotations

import base64
import binascii
import datetime

from google.protobuf import duration_pb2, timestamp_pb2

from netra import errors, ids
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from services.dispatcher import runs

STATE = {state: pb.RunState.Value(f"RUN_STATE_{state.name}") for state in runs.RunState}
STATE_NAME = {value: state.value for state, value in STATE.items()}


def time(value: datetime.datetime | None) -> timestamp_pb2.Timestamp | None:
    """A moment, when there is one."""
    if value is None:
        return None
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(value)
    return stamp


def seconds(value: duration_pb2.Duration) -> float:
    """How long something is."""
    return value.seconds + value.nanos / 1e9


def duration(seconds: float) -> duration_pb2.Duration:
    """The same, the other way round."""
    found = duration_pb2.Duration()
    found.FromMicroseconds(round(seconds * 1e6))
    return found


def page_size(wanted: int) -> int:
    """How many are asked for. Raises `InvalidPayload`."""
    if not 0 <= wanted <= 200:
        raise errors.InvalidPayload("page_size must be from 1 to 200, or 0 for 50", field="page_size")
    return wanted or 50


def encoded(last: str) -> str:
    """The token of the page that begins behind this id."""
    return base64.urlsafe_b64encode(last.encode()).decode()


def decoded(token: str, kind: type[ids.Id]) -> str:
    """Behind which id a page begins; empty for the first. Raises `InvalidPayload`."""
    try:
        return kind(base64.urlsafe_b64decode(token).decode()) if token else ""
    except (binascii.Error, ValueError, errors.InvalidPayload):
        raise errors.InvalidPayload("page_token must be a next_page_token of this method", field="page_token") from None
