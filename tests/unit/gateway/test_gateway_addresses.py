"""A client's address is its peer's, unless a proxy that the operator trusts says otherwise."""

from __future__ import annotations

import pydantic
import pytest

from chassis import audit, trust
from gateway import addresses, entitlements
from gateway.settings import GatewaySettings
from netra import errors
from tests.fixtures import permits

_PROXIES = addresses.networks("10.0.0.0/8, fd00::/8, 127.0.0.1")


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("203.0.113.9", ["198.51.100.1"], "203.0.113.9"),
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["192.0.2.66, 198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["192.0.2.66", "198.51.100.1, 10.9.9.9"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1:4711"], "198.51.100.1"),
        ("fd00::1", ["[2001:db8::7]:4711"], "2001:db8::7"),
        ("10.0.0.1", ["::ffff:198.51.100.1"], "198.51.100.1"),
        ("::ffff:10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["198.51.100.1, unknown"], "10.0.0.1"),
        ("10.0.0.1", ["10.0.0.2, 10.0.0.3"], "10.0.0.2"),
        ("", ["198.51.100.1"], ""),
        ("/run/netra.sock", ["198.51.100.1"], ""),
    ],
)
def test_the_address_of_a_client(peer: str, forwarded: list[str], expected: str) -> None:
    assert addresses.client(peer, forwarded, _PROXIES) == expected


def test_by_default_no_proxy_is_believed() -> None:
    assert addresses.client("127.0.0.1", ["198.51.100.1"], GatewaySettings().proxies) == "127.0.0.1"


@pytest.mark.parametrize("wrong", ["10.0.0.1/8", "everybody", "10.0.0.0/33"])
def test_a_network_that_is_none_is_refused_at_start(wrong: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=r"does not appear to be|has host bits set"):
        GatewaySettings(trusted_proxies=wrong)


def test_where_browsers_are_sent_back_to_is_not_what_a_client_says() -> None:
    assert GatewaySettings(env="prod", public_url="https://netra.example/").base_url("evil.example") == "https://netra.example"
    assert GatewaySettings(env="dev").base_url("localhost:8080") == "http://localhost:8080"
    for settings, host in ((GatewaySettings(env="dev"), "evil.example"), (GatewaySettings(env="prod"), "localhost:8080")):
        with pytest.raises(errors.FailedPrecondition, match="NETRA_PUBLIC_URL"):
            settings.base_url(host)


@pytest.mark.parametrize("wrong", ["netra.example", "ftp://netra.example", "https://user@netra.example", "https://netra.example?x=1"])
def test_a_public_address_that_is_none_is_refused_at_start(wrong: str) -> None:
    with pytest.raises(pydantic.ValidationError):
        GatewaySettings(public_url=wrong)


@pytest.mark.parametrize(
    ("address", "counted"),
    [
        ("198.51.100.7", "198.51.100.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::", "2001:db8:1:2::/64"),
        ("::ffff:198.51.100.7", "::ffff:198.51.100.7"),
        ("", ""),
    ],
)
async def test_an_address_of_six_counts_as_its_network(address: str, counted: str) -> None:
    assert addresses.counted(address) == counted
    asked = permits.Counted()
    entitled = entitlements.Entitlements(trust.Trust(), asked, audit.Refusals(permits.Told().send), 7)
    await entitled.count_anonymous(address)
    assert asked.asked == [("anonymous_requests", counted or "unknown", 7)]
