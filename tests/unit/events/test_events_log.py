"""What may be appended to the record."""

from __future__ import annotations

import hashlib
import uuid
from datetime import UTC, datetime, timedelta

import orjson
import pytest

from netra import errors, ids
from netra.context import UserExecutionContext
from netra.events.v1 import events_pb2
from services.events import frames, heads, ledger, log

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


def _head(run_id: str = _RUN, user_id: str = _USER, **changes: object) -> ledger.Head:
    shared = frames.envelope(user_id=user_id, thread_id=_THREAD, run_id=run_id, request_id="r", correlation_id="c", trace_id="t")
    head = ledger.Head(run_id, user_id, _THREAD, shared, "free", _NOW, 1, 1, b"", 0, 0, _NOW, False, "")
    for name, value in changes.items():
        setattr(head, name, value)
    return head


def _ledger(*heads: ledger.Head, last: int = 0) -> ledger.Ledger:
    heads = heads or (_head(),)
    return ledger.Ledger({head.run_id: head for head in heads}, {head.user_id: ledger.Cursor(last, _NOW) for head in heads}, _NOW)


def _added(book: ledger.Ledger, request: events_pb2.AppendRequest) -> log.Outcome:
    book.add(log.checked(request))
    return book.outcomes[-1]


def _code(outcome: log.Outcome) -> str:
    return outcome.refused.code if outcome.refused is not None else ""


def test_cursor_goes_on_per_user_and_seq_per_run() -> None:
    other = ids.uuid7()
    book = _ledger(_head(), _head(other), last=7)

    assert _added(book, _request(1, _event(), _event())).last_cursor == 9
    assert _added(book, _request(1, _event(), run_id=other)).last_cursor == 10
    assert _added(book, _request(3, _event())).last_cursor == 11

    assert [(row.event.run_id, row.event.seq, row.event.cursor) for row in book.events] == [
        (_RUN, 1, 8), (_RUN, 2, 9), (other, 1, 10), (_RUN, 3, 11),
    ]  # fmt: skip
    assert orjson.loads(book.events[-1].event.frame)["cursor"] == 11
    assert book.moved[_USER].last == 11
    assert book.changed[_RUN].next_seq == 4


@pytest.mark.parametrize(("first_seq", "epoch", "code"), [(2, 1, "FAILED_PRECONDITION"), (1, 2, "FENCED"), (1, 0, "FENCED")])
def test_gap_and_strange_epochs_are_refused_without_a_trace(first_seq: int, epoch: int, code: str) -> None:
    book = _ledger()
    assert _code(_added(book, _request(first_seq, epoch=epoch))) == code
    assert not book.events
    assert not book.changed
    assert not book.moved


def test_run_that_is_not_open_is_refused() -> None:
    assert _code(_added(_ledger(), _request(1, run_id=ids.uuid7()))) == "NOT_FOUND"


def test_the_last_append_again_is_acknowledged_again() -> None:
    book, request = _ledger(), _request(1)
    assert _added(book, request).last_cursor == _added(book, request).last_cursor == 1
    assert len(book.events) == 1


def test_same_seq_with_other_content_is_refused() -> None:
    book = _ledger()
    _added(book, _request(1))
    assert _code(_added(book, _request(1))) == "FAILED_PRECONDITION"


def _as_recorded(book: ledger.Ledger) -> None:
    """Make the book's events those of an earlier transaction."""
    book.earlier = {
        (row.event.run_id, row.event.seq): ledger.Earlier(row.event.cursor, row.at, hashlib.sha256(row.event.frame).digest())
        for row in book.events
    }
    book.earlier_steps = {(row.run_id, row.key): hashlib.sha256(row.result).digest() for row in book.steps}


def _changed(request: events_pb2.AppendRequest, **changes: object) -> events_pb2.AppendRequest:
    """The request with another first event."""
    changed = events_pb2.AppendRequest()
    changed.CopyFrom(request)
    for name, value in changes.items():
        setattr(changed.events[0], name, value)
    return changed


def test_an_earlier_append_again_is_told_by_its_content() -> None:
    first, second = _request(1, _event(), _event()), _request(3, _event("tool_executing"))
    first.steps.add(key="s1", result=b"1")
    book = _ledger(last=3)
    for request in (first, second):
        _added(book, request)
    assert not ledger.overlapping([log.checked(second)], book.heads)
    assert ledger.overlapping([log.checked(first)], book.heads)
    _as_recorded(book)
    assert _added(book, first).last_cursor == 5
    for other in ({"data": b'{"a":2}'}, {"type": "agent_started"}, {"event_id": ids.uuid7()}):
        assert _code(_added(book, _changed(first, **other))) == "FAILED_PRECONDITION"
    first.steps[0].result = b"2"
    assert _code(_added(book, first)) == "FAILED_PRECONDITION"
    assert len(book.events) == 3


def test_steps_are_not_asked_for_once_they_are_gone_with_the_end_of_their_run() -> None:
    first, last = _request(1), _request(2, _event("agent_completed"), end=True)
    first.steps.add(key="s1", result=b"1")
    book = _ledger()
    for request in (first, last):
        _added(book, request)
    _as_recorded(book)
    book.earlier_steps = {}
    assert _added(book, first).last_cursor == 1
    book.heads[_RUN].ended = False
    assert _code(_added(book, first)) == "FAILED_PRECONDITION"


def test_steps_alone_are_told_by_their_results() -> None:
    steps = [events_pb2.Step(key="s1", result=b"1")]
    request = events_pb2.AppendRequest(append_id=1, run_id=_RUN, epoch=1, first_seq=3, steps=steps)
    book = _ledger(_head(next_seq=3, last_cursor=9), last=9)
    book.earlier_steps = {(_RUN, "s1"): hashlib.sha256(b"1").digest()}
    assert _added(book, request).last_cursor == 9
    assert not book.steps
    book.earlier_steps = {}
    assert _added(book, request).last_cursor == 9
    assert [row.key for row in book.steps] == ["s1"]


def _context(user_id: str = _USER) -> UserExecutionContext:
    new = ids.uuid7
    return UserExecutionContext.from_request(
        user_id=ids.UserId(user_id), tenant_id=ids.TenantId(new()), session_id=ids.SessionId(new()), thread_id=ids.ThreadId(_THREAD),
        run_id=ids.RunId(new()), request_id=ids.RequestId("m1"), roles=("user",), tier="free",
    )  # fmt: skip


def _noted(*events: events_pb2.NewEvent) -> events_pb2.AppendRequest:
    return events_pb2.AppendRequest(append_id=1, context_token="token", events=events)


def test_an_event_without_a_run_has_a_cursor_and_no_run() -> None:
    book, request, context = _ledger(last=7), _noted(_event("quality_alert"), _event("security_violation")), _context()
    for _ in range(2):
        book.add(log.checked(request, context))
        assert book.outcomes[-1].last_cursor == 9
    frame = orjson.loads(book.events[0].event.frame)
    assert (frame["cursor"], frame["seq"], frame["run_id"], frame["thread_id"]) == (8, 0, None, _THREAD)
    assert [row.event.run_id for row in book.events] == ["", ""]
    assert book.marks == {(_USER, _NOW.date(), "free"): 8}
    book.add(log.checked(_changed(request, data=b"{}"), context))
    assert _code(book.outcomes[-1]) == "ALREADY_EXISTS"
    assert len(book.events) == 2


@pytest.mark.parametrize("field", [{"run_id": _RUN}, {"epoch": 1}, {"first_seq": 1}, {"end": True}])
def test_an_event_without_a_run_has_nothing_of_a_run(field: dict[str, object]) -> None:
    request = _noted(_event())
    for name, value in field.items():
        setattr(request, name, value)
    with pytest.raises(errors.InvalidPayload):
        log.checked(request, _context())


def _shown(data: bytes = b"{}", kind: str = "agent_delta") -> events_pb2.AppendRequest:
    return events_pb2.AppendRequest(run_id=_RUN, epoch=1, transients=[events_pb2.Transient(type=kind, data=data, after_seq=1)])


def test_an_append_may_only_show_something_and_then_nothing_of_it_is_recorded() -> None:
    assert not log.checked(_shown()).is_recorded
    both = _request(1)
    both.transients.add(type="agent_delta", data=b"{}")
    assert log.checked(both).is_recorded
    # what is shown does not make it another append
    assert log.checked(both).digest == log.checked(_request(1, *both.events)).digest


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (_shown(b"[]"), "transients.data"), (_shown(b"{"), "transients.data"), (_shown(kind="A"), "transients.type"),
        (events_pb2.AppendRequest(run_id="x", transients=_shown().transients), "run_id"),
        (events_pb2.AppendRequest(run_id=_RUN, transients=_shown().transients, end=True), "end"),
    ],
)  # fmt: skip
def test_what_cannot_be_shown_is_refused_by_its_field(request_: events_pb2.AppendRequest, field: str) -> None:
    with pytest.raises(errors.InvalidPayload) as refused:
        log.checked(request_)
    assert refused.value.details["field"] == field


def test_what_is_shown_belongs_to_a_run_and_counts_for_the_size_of_the_append() -> None:
    beside = _noted(_event())
    beside.transients.add(type="agent_delta", data=b"{}")
    with pytest.raises(errors.InvalidPayload):
        log.checked(beside, _context())
    with pytest.raises(errors.TooLarge):
        log.checked(_shown(_sized(log.MAX_APPEND_BYTES + 1)))
    with pytest.raises(errors.TooLarge):
        log.checked(events_pb2.AppendRequest(run_id=_RUN, epoch=1, transients=_shown().transients[:] * (log.MAX_ENTRIES + 1)))


def test_ids_of_events_without_a_run_tell_their_time_and_are_different() -> None:
    event = _event()
    for events in ([event, event], [events_pb2.NewEvent(event_id=str(uuid.uuid4()), type="x", data=b"{}")]):
        with pytest.raises(errors.InvalidPayload):
            log.checked(_noted(*events), _context())


def test_nothing_follows_an_end_but_its_own_repetition() -> None:
    book, last = _ledger(), _request(1, _event("agent_completed"), end=True)
    _added(book, last)
    assert book.events[-1].event.ends
    assert book.changed[_RUN].terminal_type == "agent_completed"
    assert _code(_added(book, _request(2))) == "FAILED_PRECONDITION"
    assert _added(book, last).last_cursor == 1


def test_time_never_goes_backwards_in_a_run_or_in_a_users_record() -> None:
    later, latest, other = _NOW + timedelta(seconds=5), _NOW + timedelta(days=1), ids.uuid7()
    book = _ledger(_head(last_at=later), _head(other))
    _added(book, _request(1))
    assert book.events[0].at == later
    _added(book, _request(1, run_id=other))
    assert book.events[1].at == later
    book.cursors[_USER].last_at = latest
    _added(book, _request(2))
    assert book.events[2].at == book.moved[_USER].last_at == latest
    assert book.marks == {(_USER, later.date(), "free"): 1, (_USER, latest.date(), "free"): 3}


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


def _sized(size: int) -> bytes:
    return b'{"a":"' + b"x" * (size - 8) + b'"}'


def test_every_limit_is_named() -> None:
    quarter = _sized(log.MAX_APPEND_BYTES // 4)
    whole = log.checked(_request(1, *[_event(data=quarter)] * 3))
    assert len(quarter) * 3 < whole.size < len(quarter) * 3 + 200
    assert log.checked(_request(1, _event(data=_sized(log.MAX_EVENT_BYTES))))
    too_large = {
        "events.data": [_event(data=_sized(log.MAX_EVENT_BYTES + 1))],
        "events": [_event(data=quarter)] * 4,
    }
    for field, events in too_large.items():
        with pytest.raises(errors.TooLarge) as refused:
            log.checked(_request(1, *events))
        assert refused.value.details["field"] == field
    with pytest.raises(errors.TooLarge, match="1000 events"):
        log.checked(_request(1, *[_event()] * (log.MAX_ENTRIES + 1)))
    big = _request(1)
    big.steps.add(key="s", result=b"x" * log.MAX_APPEND_BYTES)
    with pytest.raises(errors.TooLarge):
        log.checked(big)


def test_append_that_holds_nothing_is_refused() -> None:
    with pytest.raises(errors.InvalidPayload):
        log.checked(events_pb2.AppendRequest(run_id=_RUN, epoch=1, first_seq=1))


def test_an_append_that_opens_a_run_is_its_first() -> None:
    opens = heads.NewHead(_RUN, _USER, ids.uuid7(), _THREAD, "r", "c", "", "free", None)
    assert log.checked(_request(1), opens=opens).opens == opens
    for request in (_request(2), _request(1, epoch=0)):
        with pytest.raises(errors.InvalidPayload) as refused:
            log.checked(request, opens=opens)
        assert refused.value.details["field"] == "open"


def test_what_opens_a_run_is_the_same_append_as_what_does_not() -> None:
    request = _request(1)
    before = log.checked(request).digest
    request.open.trace_id, request.open.context_token = "0" * 32, "token"
    assert log.checked(request).digest == before


@pytest.mark.parametrize("trace_id", ["0" * 31, "0" * 33, "G" * 32, "A" * 32])
def test_a_trace_is_as_it_is_written(trace_id: str) -> None:
    context = UserExecutionContext.from_request(
        user_id=_USER, tenant_id=ids.uuid7(), session_id=ids.uuid7(), thread_id=_THREAD, run_id=_RUN, request_id="r", roles=("user",),
        tier="free",
    )  # fmt: skip
    assert heads.new(context, ids.RunId(_RUN), "").trace_id == ""
    with pytest.raises(errors.InvalidPayload) as refused:
        heads.new(context, ids.RunId(_RUN), trace_id)
    assert refused.value.details["field"] == "trace_id"
    with pytest.raises(errors.PermissionDenied):
        heads.new(context, ids.RunId.new(), "")


@pytest.mark.parametrize(
    ("kind", "data", "until"),
    [
        ("agent_suspended", b'{"until":"2026-11-27T12:00:00+00:00"}', _NOW + timedelta(days=7)),
        ("agent_suspended", b'{"until":"2026-11-27T12:00:00"}', _NOW + timedelta(days=7)),
        ("agent_suspended", b'{"until":"some day"}', None),
        ("agent_suspended", b'{"until":7}', None),
        ("agent_suspended", b"{}", None),
        ("agent_thinking", b'{"until":"2026-11-27T12:00:00+00:00"}', None),
    ],
)
def test_until_when_a_run_waits_is_said_by_the_event_that_puts_it_away(kind: str, data: bytes, until: datetime | None) -> None:
    assert log.waits_until(_event(kind, data)) == until
