"""Where a call comes from: the network address of the client, and what its device is called."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

from chassis import identity
from netra import errors

MAX_DEVICE = 200
# of an IPv6 address, what an access provider gives to one household
_PREFIX_V6 = 64


@dataclass(frozen=True, slots=True)
class Origin:
    """Where somebody signs in from. An address that is not known is empty."""

    address: str = ""
    device: str = ""

    @property
    def network(self) -> str:
        """What counts as one place: the IPv4 address, or the IPv6 network."""
        if ":" not in self.address:
            return self.address
        return str(ipaddress.IPv6Network((self.address, _PREFIX_V6), strict=False).network_address)


def origin(client_address: str, context: Any, device: str = "") -> Origin:
    """The origin of a call. What the gateway says of its client is believed; of anybody else, the other end of the line counts.

    Raises `InvalidPayload` when the device is no text of at most 200 characters.
    """
    if len(device) > MAX_DEVICE or "\0" in device:
        raise errors.InvalidPayload(f"device must be a text of at most {MAX_DEVICE} characters", field="device")
    said = client_address if identity.current().service == "gateway" else _peer(context.peer())
    return Origin(_canonical(said), device)


def present() -> identity.Principal:
    """The user who makes the call themselves: what acts for them makes no credentials and rules over nobody. Raises `PermissionDenied`."""
    user = identity.current().user
    if user.actor:
        raise errors.PermissionDenied("A service that acts for a user cannot do this. The user must do it.")
    return user


def _peer(name: str) -> str:
    # as gRPC writes it: ipv4:192.0.2.1:5000, ipv6:%5B2001:db8::1%5D:5000
    kind, _, rest = unquote(name).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else ""


def _canonical(address: str) -> str:
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return ""
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return str(mapped or found)
