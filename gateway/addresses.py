"""Which network address a client has, behind the proxies that the operator trusts; pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def networks(text: str) -> tuple[Network, ...]:
    """`10.0.0.0/8, 127.0.0.1` as networks. Raises `ValueError` naming the one that is none."""
    return tuple(ipaddress.ip_network(entry.strip()) for entry in text.split(",") if entry.strip())


def client(peer: str, forwarded: Iterable[str], trusted: Sequence[Network]) -> str:
    """The peer; when that is a trusted proxy, the last address in X-Forwarded-For that is none. Empty when there is no peer."""
    address = _address(peer)
    if address is None:
        return ""
    hops = [hop for line in forwarded for hop in line.split(",")]
    while hops and _is_in(address, trusted):
        behind = _address(hops.pop())
        if behind is None:
            break
        address = behind
    return str(address)


def counted(address: str) -> str:
    """As whom an address is counted: IPv6 by its /64, which is what one customer has."""
    found = _address(address)
    return str(ipaddress.ip_network((found, 64), strict=False)) if isinstance(found, ipaddress.IPv6Address) else address


def _is_in(address: Address, trusted: Sequence[Network]) -> bool:
    return any(address in network for network in trusted)


def _address(text: str) -> Address | None:
    host = text.strip()
    if host.startswith("["):
        host = host[1:].partition("]")[0]
    elif host.count(":") == 1:
        host = host.partition(":")[0]
    try:
        found = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
    # one client is one address, whichever way it is written
    return found.ipv4_mapped or found if isinstance(found, ipaddress.IPv6Address) else found
