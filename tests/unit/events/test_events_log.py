"""What may be appended to the record."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import orjson
import pytest

from netra import errors, ids
from netra.events.v1 import events_pb2
from services.events import frames, log

_NOW = datetime(2026, 11, 20, 12, 0, tzinfo=UTC)
_RUN, _USER, _THREAD = ids.uuid7(), ids.uuid7(), ids.uuid7()


def _event(kind: str = "agent_thinking", data: bytes = b'{"a":1}') -> events_pb2.NewEvent:
    return events_pb2.NewEvent(event_id=ids.uuid7(), type=kind, data=data)


def _request(
    first_seq: int, *events: events_pb2.NewEvent, epoch: int = 1, end: bool = False, run_id: str = _RUN
) -> events_pb2.AppendRequest:  # fmt: skip
    return events_pb2.AppendRequest(
        append_id=first_seq, run_id=run_id, epoch=epoch, first_seq=first_seq, events=events or [_event()], end=end
    )  # fmt: skip


def _head(run_id: str = _RUN, user_id: str = _USER, **changes: object) -> log.Head:
    shared = frames.envelope(user_id=user_id, thread_id=_THREAD, run_id=run_id, request_id="r", correlation_id="c", trace_id="t")
    head = log.Head(run_id, user_id, _THREAD, shared, "free", 1, 1, b"", 0, 0, _NOW, False, "")
    for name, value in changes.items():
        setattr(head, name, value)
    return head


def _ledger(*heads: log.Head, last: int = 0) -> log.Ledger:
    heads = heads or (_head(),)
    return log.Ledger({head.run_id: head for head in heads}, {head.user_id: last for head in heads}, _NOW)


def _added(ledger: log.Ledger, request: events_pb2.AppendRequest) -> log.Outcome:
    ledger.add(log.checked(request))
    return ledger.outcomes[-1]


def _code(outcome: log.Outcome) -> str:
    return outcome.refused.code if outcome.refused is not None else ""


def test_cursor_goes_on_per_user_and_seq_per_run() -> None:
    other = ids.uuid7()
    ledger = _ledger(_head(), _head(other), last=7)

    assert _added(ledger, _request(1, _event(), _event())).last_cursor == 9
    assert _added(ledger, _request(1, _event(), run_id=other)).last_cursor == 10
    assert _added(ledger, _request(3, _event())).last_cursor == 11

    assert [(row.event.run_id, row.event.seq, row.event.cursor) for row in ledger.events] == [
        (_RUN, 1, 8), (_RUN, 2, 9), (other, 1, 10), (_RUN, 3, 11),
    ]  # fmt: skip
    assert orjson.loads(ledger.events[-1].event.frame)["cursor"] == 11
    assert ledger.cursors == {_USER: 11}
    assert ledger.changed[_RUN].next_seq == 4


@pytest.mark.parametrize(("first_seq", "epoch", "code"), [(2, 1, "FAILED_PRECONDITION"), (1, 2, "FENCED"), (1, 0, "FENCED")])
def test_gap_and_strange_epochs_are_refused_without_a_trace(first_seq: int, epoch: int, code: str) -> None:
    ledger = _ledger()
    assert _code(_added(ledger, _request(first_seq, epoch=epoch))) == code
    assert not ledger.events
    assert not ledger.changed
    assert ledger.cursors == {_USER: 0}


def test_run_that_is_not_open_is_refused() -> None:
    assert _code(_added(_ledger(), _request(1, run_id=ids.uuid7()))) == "NOT_FOUND"


def test_the_last_append_again_is_acknowledged_again() -> None:
    ledger, request = _ledger(), _request(1)
    assert _added(ledger, request).last_cursor == _added(ledger, request).last_cursor == 1
    assert len(ledger.events) == 1


def test_same_seq_with_other_content_is_refused() -> None:
    ledger = _ledger()
    _added(ledger, _request(1))
    assert _code(_added(ledger, _request(1))) == "FAILED_PRECONDITION"


def test_an_earlier_append_again_is_told_by_its_events() -> None:
    request = _request(1)
    known = request.events[0]
    ledger = _ledger(_head(next_seq=3), last=9)
    ledger.earlier = {(_RUN, 1): (known.event_id, known.type, 4)}
    assert log.overlapping([log.checked(request)], ledger.heads)
    assert _added(ledger, request).last_cursor == 4
    assert _code(_added(ledger, _request(1))) == "FAILED_PRECONDITION"


def test_steps_alone_are_told_by_their_keys() -> None:
    steps = [events_pb2.Step(key="s1", result=b"1")]
    request = events_pb2.AppendRequest(append_id=1, run_id=_RUN, epoch=1, first_seq=3, steps=steps)
    ledger = _ledger(_head(next_seq=3, last_cursor=9), last=9)
    ledger.earlier_steps = frozenset({(_RUN, "s1")})
    assert _added(ledger, request).last_cursor == 9
    assert not ledger.steps
    ledger.earlier_steps = frozenset()
    assert _added(ledger, request).last_cursor == 9
    assert [row.key for row in ledger.steps] == ["s1"]


def test_nothing_follows_an_end_but_its_own_repetition() -> None:
    ledger, last = _ledger(), _request(1, _event("agent_completed"), end=True)
    _added(ledger, last)
    assert ledger.events[-1].event.ends
    assert ledger.changed[_RUN].terminal_type == "agent_completed"
    assert _code(_added(ledger, _request(2))) == "FAILED_PRECONDITION"
    assert _added(ledger, last).last_cursor == 1


def test_time_never_goes_backwards_within_a_run() -> None:
    later = _NOW + timedelta(seconds=5)
    ledger = _ledger(_head(last_at=later))
    _added(ledger, _request(1))
    assert ledger.events[0].at == later


@pytest.mark.parametrize(
    "data", [b"", b"[1]", b"null", b'{"a":', b'{"a":"\xff"}', b'{"a":"\x00"}', b'{"a":NaN}', b'{"a":"\\ud800"}', b"{" * 5000]
)
def test_data_that_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(errors.InvalidPayload):
        log.checked(_request(1, _event(data=data)))


@pytest.mark.parametrize("kind", ["", "Agent", "a b", "a" * 65, 'x"', "a\n"])
def test_kind_is_lower_case_letters(kind: str) -> None:
    with pytest.raises(errors.InvalidPayload):
        log.checked(_request(1, _event(kind)))


def test_append_has_a_limit_of_bytes() -> None:
    half = b'{"a":"' + b"x" * (log.MAX_APPEND_BYTES // 2) + b'"}'
    assert log.checked(_request(1, _event(data=half))).size == len(half)
    with pytest.raises(errors.TooLarge):
        log.checked(_request(1, _event(data=half), _event(data=half)))


def test_append_that_holds_nothing_is_refused() -> None:
    with pytest.raises(errors.InvalidPayload):
        log.checked(events_pb2.AppendRequest(run_id=_RUN, epoch=1, first_seq=1))
