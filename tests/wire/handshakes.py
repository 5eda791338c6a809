"""The table of handshakes: what is asked, and with which status it is answered."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Handshake:
    """One way to ask; a change is that of a header, None leaves it out."""

    name: str
    status: str
    changes: dict[str, str | None] = field(default_factory=dict)


def handshakes(token: str) -> list[Handshake]:
    """All of them; 101 where RFC 6455 and the protocol allow it."""
    return [
        Handshake("as it should be", "101"),
        Handshake("upgrade in capitals", "101", {"Upgrade": "WebSocket"}),
        Handshake("connection with more words", "101", {"Connection": "keep-alive, Upgrade"}),
        Handshake("an extension that is not known", "101", {"Sec-WebSocket-Extensions": "x-unknown"}),
        Handshake("deflate is offered", "101", {"Sec-WebSocket-Extensions": "permessage-deflate"}),
        Handshake("token in Authorization", "101", {"Sec-WebSocket-Protocol": "netra.v1", "Authorization": f"Bearer {token}"}),
        Handshake("no key", "400", {"Sec-WebSocket-Key": None}),
        Handshake("a key that is too short", "400", {"Sec-WebSocket-Key": "c2hvcnQ="}),
        Handshake("a key that is not base64", "400", {"Sec-WebSocket-Key": "!!!!!!!!!!!!!!!!!!!!!!!!"}),
        Handshake("version 12", "426", {"Sec-WebSocket-Version": "12"}),
        Handshake("no version", "426", {"Sec-WebSocket-Version": None}),
        Handshake("POST", "405", {"line": "POST /ws HTTP/1.1"}),
        Handshake("HTTP/1.0", "400", {"line": "GET /ws HTTP/1.0"}),
        Handshake("another path", "404", {"line": "GET /nowhere HTTP/1.1"}),
        Handshake("no token", "401", {"Sec-WebSocket-Protocol": "netra.v1"}),
        Handshake("a wrong token", "401", {"Sec-WebSocket-Protocol": f"netra.v1, bearer.{token[:-6]}"}),
        Handshake("the token in the address", "400", {"line": f"GET /ws?token={token} HTTP/1.1", "Sec-WebSocket-Protocol": "netra.v1"}),
        Handshake("a foreign origin", "403", {"Origin": "https://elsewhere.example"}),
        Handshake("origin null", "403", {"Origin": "null"}),
    ]
