"""The class of error that a service raises is the class its caller catches."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from chassis import status
from netra import errors
from netra.status.v1 import reason_pb2


def _tree(root: type[errors.NetraError]) -> list[type[errors.NetraError]]:
    return [found for child in root.__subclasses__() for found in [child, *_tree(child)]]


KINDS = [kind for kind in _tree(errors.NetraError) if errors.by_code(kind.code) is kind]


def _over_the_wire(error: errors.NetraError) -> grpc.aio.AioRpcError:
    sent = rpc_status.to_status(status.to_proto(error))
    trailing = grpc.aio.Metadata(*sent.trailing_metadata)
    return grpc.aio.AioRpcError(sent.code, grpc.aio.Metadata(), trailing, sent.details)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_hop(kind: type[errors.NetraError]) -> None:
    sent = kind("something specific", retry_after_ms=1500, field="payload.text")
    back = status.from_rpc(_over_the_wire(sent))
    assert type(back) is kind
    assert (back.message, back.retry_after_ms, back.details) == ("something specific", 1500, {"field": "payload.text"})


@pytest.mark.parametrize("kind", KINDS)
def test_every_code_is_a_reason_of_the_contract(kind: type[errors.NetraError]) -> None:
    assert reason_pb2.Reason.Value(f"REASON_{kind.code}") > 0


def test_a_wrong_field_is_named_in_the_standard_detail() -> None:
    details = status.to_proto(errors.InvalidPayload("must not be empty", field="user_request")).details
    bad = error_details_pb2.BadRequest()
    assert any(detail.Unpack(bad) for detail in details)
    assert bad.field_violations[0].field == "user_request"


def test_an_unknown_error_shows_a_support_code_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    shown = status.as_netra(RuntimeError("password=hunter2"))
    assert type(shown) is errors.Internal
    assert "hunter2" not in shown.message
    assert shown.details["support_code"] in shown.message


@pytest.mark.parametrize("side", ["Received", "CLIENT: Sent"])
def test_a_message_that_grpc_finds_too_large_is_not_one_call_too_many(side: str) -> None:
    details = f"{side} message larger than max (5242880 vs. 4194304)"
    error = grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), grpc.aio.Metadata(), details)
    assert type(status.from_rpc(error)) is errors.TooLarge
    error = grpc.aio.AioRpcError(grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.aio.Metadata(), grpc.aio.Metadata(), "too many pings")
    assert type(status.from_rpc(error)) is errors.RateLimited
