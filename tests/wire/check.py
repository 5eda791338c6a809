"""One case against a running gateway."""

from __future__ import annotations

from tests.wire import peer
from tests.wire.cases import Case
from tests.wire.handshakes import Handshake

_KEY = "dGhlIHNhbXBsZSBub25jZQ=="


async def seen(port: int, token: str, case: Case) -> str:
    """What came back."""
    async with peer.opened(port, token) as one:
        await one.say(*case.sent)
        return ", ".join(await one.outcome(ends=case.expected[-1].startswith("close")))


def expected(case: Case) -> str:
    """What has to come back."""
    return " or ".join(", ".join(one) for one in (case.expected, case.also) if one)


def agrees(wanted: str, found: str) -> bool:
    """Whether that is what was wanted."""
    return found in wanted.split(" or ")


async def answered(port: int, token: str, asked: Handshake) -> str:
    """The status of a handshake; 101 only with the right answer to the key, one protocol and no extension."""
    async with peer.connected(port) as one:
        answer = await one.shake(peer.request(port, token, **asked.changes))
    if answer["status"] != "101":
        return answer["status"]
    right = answer["sec-websocket-accept"] == peer.accepts(_KEY) and answer["sec-websocket-protocol"] == "netra.v1"
    return "101" if right and "sec-websocket-extensions" not in answer else f"101, but {answer}"
