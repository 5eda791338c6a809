"""Moments as protobuf timestamps, and back; pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from google.protobuf import timestamp_pb2

from netra import errors

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def moment(name: str, stamp: timestamp_pb2.Timestamp) -> datetime:
    """The moment of a timestamp. Raises `InvalidPayload` naming the field when it is out of range."""
    try:
        return _EPOCH + timedelta(seconds=stamp.seconds, microseconds=stamp.nanos // 1000)
    except OverflowError:
        raise errors.InvalidPayload(f"{name} is out of range", field=name) from None


def stamp(at: datetime) -> timestamp_pb2.Timestamp:
    """The timestamp of a moment."""
    made = timestamp_pb2.Timestamp()
    made.FromDatetime(at)
    return made
