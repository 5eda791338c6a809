"""The envelope is spliced around ready-made data."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import orjson

from netra import ids
from services.events import frames


def test_frame_is_one_object_in_the_order_of_the_protocol() -> None:
    run, user, thread, event = (ids.uuid7() for _ in range(4))
    shared = frames.envelope(user_id=user, thread_id=thread, run_id=run, request_id="m:1", correlation_id="c" * 32, trace_id="t" * 32)
    at = frames.timestamp(datetime(2026, 11, 20, 20, 15, 4, 123, tzinfo=UTC))

    data = '{"reasoning":"ü\\u0000"}'.encode()
    frame = orjson.loads(frames.splice(shared, kind="agent_thinking", cursor=42, seq=3, event_id=event, at=at, data=data))

    assert frame == {
        "type": "agent_thinking", "cursor": 42, "seq": 3, "event_id": event, "user_id": user, "thread_id": thread, "run_id": run,
        "request_id": "m:1", "correlation_id": "c" * 32, "trace_id": "t" * 32, "timestamp": "2026-11-20T20:15:04.000123Z",
        "data": {"reasoning": "ü\x00"},
    }  # fmt: skip
    assert list(frame)[:4] == ["type", "cursor", "seq", "event_id"]
    assert list(frame)[-2:] == ["timestamp", "data"]


def _frame(data: bytes, cursor: int = 42, seq: int = 3) -> bytes:
    shared = frames.envelope(
        user_id=ids.uuid7(), thread_id=ids.uuid7(), run_id=ids.uuid7(), request_id="m", correlation_id="c", trace_id="t"
    )
    at = frames.timestamp(datetime(2026, 11, 20, tzinfo=UTC))
    return frames.splice(shared, kind="tool_completed", cursor=cursor, seq=seq, event_id=ids.uuid7(), at=at, data=data)


def test_the_cursor_is_left_out_for_others_and_nothing_else_of_the_frame() -> None:
    for data in (b"{}", b'{"cursor":1,"seq":2}', b'{"a":",\\"cursor\\":7,\\"seq\\":8"}', b'{"x":{"type":"y","cursor":9,"seq":1}}'):
        for cursor, seq in ((1, 1), (2**62, 7)):
            frame = _frame(data, cursor, seq)
            shown = frames.without_cursor(frame)
            assert orjson.loads(shown) == {name: value for name, value in orjson.loads(frame).items() if name != "cursor"}
            assert shown.endswith(b',"data":' + data + b"}")


def test_where_the_data_begins_is_found_whatever_is_in_it() -> None:
    for data in (b"{}", b'{"data":{"data":1}}', b'{"a":",\\"data\\":"}'):
        frame = _frame(data)
        head = frame[: frame.index(frames.DATA)]
        assert frame == head + b',"data":' + data + b"}"
        assert orjson.loads(head + frames.ERASED) == {**orjson.loads(frame), "data": {"erased": True}}


def test_timestamp_is_utc_whatever_the_zone() -> None:
    east = timezone(timedelta(hours=2))
    assert frames.timestamp(datetime(2026, 1, 1, 1, 0, tzinfo=east)) == b"2025-12-31T23:00:00.000000Z"
