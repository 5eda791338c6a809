"""Whose word about an address is believed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from chassis import identity
from netra import errors
from services.auth import callers


def _peer(name: str) -> Any:
    return SimpleNamespace(peer=lambda: name)


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("ipv4:192.0.2.1:5000", "192.0.2.1"),
        ("ipv6:%5B2001:db8::1%5D:5000", "2001:db8::1"),
        ("ipv6:%5B::ffff:192.0.2.1%5D:5000", "192.0.2.1"),
        ("unix:/tmp/socket", ""),
        ("ipv4:nonsense", ""),
        ("", ""),
    ],
)
def test_the_other_end_of_the_line_counts(peer: str, address: str) -> None:
    assert callers.origin("198.51.100.7", _peer(peer)).address == address


def test_the_gateway_is_believed_and_no_other_service() -> None:
    peer = _peer("ipv4:127.0.0.1:5000")
    identity.bind(identity.Caller(service="gateway"))
    assert callers.origin("198.51.100.7", peer).address == "198.51.100.7"
    assert callers.origin("2001:DB8:0::7", peer).address == "2001:db8::7"
    assert callers.origin("not an address", peer).address == ""
    identity.bind(identity.Caller(service="context"))
    assert callers.origin("198.51.100.7", peer).address == "127.0.0.1"


def test_a_household_is_one_place() -> None:
    assert callers.Origin("2001:db8:1:2:3::4").network == callers.Origin("2001:db8:1:2:ffff::1").network
    assert callers.Origin("2001:db8:1:2::1").network != callers.Origin("2001:db8:1:3::1").network
    assert callers.Origin("192.0.2.1").network == "192.0.2.1"
    assert callers.Origin("").network == ""


@pytest.mark.parametrize("device", ["x" * 201, "a\0b"])
def test_a_device_has_a_name_that_can_be_kept(device: str) -> None:
    with pytest.raises(errors.InvalidPayload) as caught:
        callers.origin("", _peer(""), device)
    assert caught.value.details["field"] == "device"
