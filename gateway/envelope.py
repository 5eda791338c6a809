"""One text frame of RFC 6455, made once however many sockets it goes to; pure."""

from __future__ import annotations


def text(payload: bytes) -> bytes:
    """The payload, which is UTF-8, as it goes over the line."""
    # 0x81: a text message in one fragment; servers do not mask
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65536:
        return b"\x81\x7e%b%b" % (size.to_bytes(2, "big"), payload)
    return b"\x81\x7f%b%b" % (size.to_bytes(8, "big"), payload)
