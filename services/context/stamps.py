"""Moments as protobuf timestamps, and back; pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from google.protobuf import timestamp_pb2

from netra import errors

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def moment(name: str, stamp: timestamp_pb2.Timestamp) -> datetime:
    """The moment of a timestamp. Raises `InvalidPayload` naming the field when it is out of range."""
    try:
        return _EPOCH + timedelta(seconds=stamp.seconds, microseconds=stamp.nanos // 1000)
    except OverflowError:
        raise errors.InvalidPayload(f"{name} is out of range", field=name) from None


def stamp(at: datetime) -> timestamp_pb2.Timestamp:
    """The timestamp of a moment."""
    # in whole numbers: a time of ours is of UTC, which `FromDatetime` would find out by the calendar
    seconds, micros = divmod((at - _EPOCH) // _MICROSECOND, 1_000_000)
    return timestamp_pb2.Timestamp(seconds=seconds, nanos=micros * 1000)
