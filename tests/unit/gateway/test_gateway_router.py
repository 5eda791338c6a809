"""What frames and bodies ask the dispatcher for, and which field is named when they are wrong."""

from __future__ import annotations

import pytest

from gateway import router
from netra import errors, ids
from netra.dispatcher.v1 import approvals_pb2, dispatcher_pb2


@pytest.mark.parametrize("name", ["enqueue", "reject", "interrupt", "rollback"])
def test_what_to_do_when_the_thread_is_busy_has_four_names(name: str) -> None:
    request = router.start_run({"user_request": "x", "on_busy": name}, "", "r1")
    assert request.on_busy == dispatcher_pb2.OnBusy.Value(f"ON_BUSY_{name.upper()}")


def test_a_message_may_go_to_a_run_that_waits_and_a_start_never_does() -> None:
    assert router.message({"text": "x"}, "", "r1").deliver
    assert not router.start_run({"user_request": "x"}, "", "r1").deliver


@pytest.mark.parametrize("name", ["message", "content", "text"])
def test_what_is_sent_to_a_run_has_the_names_of_a_message_and_its_limit(name: str) -> None:
    run_id = ids.uuid7()
    request = router.sent({name: "hello"}, run_id, "r1", "granted")
    assert (request.run_id, request.request_id, request.message, request.grant_token) == (run_id, "r1", "hello", "granted")
    with pytest.raises(errors.TooLarge):
        router.sent({name: "x" * 8193}, run_id, "r1", "")


def test_a_decision_becomes_a_vote() -> None:
    approval_id = ids.uuid7()
    request = router.resolved({"decision": "reject", "comment": "No."}, approval_id, "")
    assert request == approvals_pb2.ResolveApprovalRequest(approval_id=approval_id, decision=approvals_pb2.DECISION_REJECT, comment="No.")


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({}, "payload.decision"),
        ({"decision": "approved"}, "payload.decision"),
        ({"decision": 1}, "payload.decision"),
        ({"decision": "approve", "comment": 1}, "payload.comment"),
        ({"decision": "approve", "comment": "x" * 2001}, "payload.comment"),
        ({"decision": "approve", "comment": "a\x00b"}, "payload.comment"),
    ],
)
def test_a_decision_that_is_none_is_refused_by_its_field(payload: dict[str, object], field: str) -> None:
    with pytest.raises(errors.InvalidPayload) as caught:
        router.resolved(payload, ids.uuid7(), "")
    assert caught.value.details["field"] == field
