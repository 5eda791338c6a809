"""The table: what is sent after the handshake, and what has to come back."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from tests.wire import peer
from tests.wire.peer import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, ask, close, frame

LIMIT = 65_536
_WRONG = ("close 1002",)
_FINE = ("answer a",)


@dataclass(frozen=True, slots=True)
class Case:
    """One thing a client may do."""

    group: str
    name: str
    sent: tuple[bytes, ...]
    expected: tuple[str, ...]
    # as right: where a server may fail the connection before it has answered what came earlier
    also: tuple[str, ...] = ()


def cases() -> list[Case]:
    """All of them."""
    groups = (_plain, _masks, _bits, _opcodes, _control, _fragments, _utf8, _utf8_in_parts, _closing, _closing_codes, _sizes, _lengths)
    return [case for group in groups for case in group()]


def _of_size(size: int) -> bytes:
    """A question of so many bytes."""
    bare = len(ask(payload={"x": ""}))
    return ask(payload={"x": "x" * (size - bare)})


def _plain() -> Iterator[Case]:
    yield Case("messages", "text", (frame(ask()),), _FINE)
    yield Case("messages", "two in one segment", (frame(ask("a")) + frame(ask("b")),), ("answer a", "answer b"))
    yield Case("messages", "byte by byte", tuple(bytes([byte]) for byte in frame(ask())), _FINE)
    yield Case("messages", "binary", (frame(ask(), BINARY),), ("error BINARY_NOT_SUPPORTED",))
    yield Case("messages", "binary, then text", (frame(b"\0\1", BINARY), frame(ask())), ("error BINARY_NOT_SUPPORTED", "answer a"))
    yield Case("messages", "not JSON", (frame(b"{"),), ("error BAD_JSON",))
    yield Case("messages", "empty", (frame(b""),), ("error BAD_JSON",))
    yield Case("messages", "not an object", (frame(b"[]"),), ("error NOT_AN_OBJECT",))


def _masks() -> Iterator[Case]:
    for name, opcode, payload in (("text", TEXT, ask()), ("empty text", TEXT, b""), ("binary", BINARY, b"x"), ("ping", PING, b"x"),
                                  ("pong", PONG, b"x"), ("close", CLOSE, struct.pack("!H", 1000))):  # fmt: skip
        yield Case("masking", f"unmasked {name}", (frame(payload, opcode, masked=False),), _WRONG)
    unmasked = frame(b"", CONTINUATION, masked=False)
    yield Case("masking", "unmasked continuation", (frame(ask(), fin=False), unmasked), _WRONG)


def _bits() -> Iterator[Case]:
    for rsv in range(1, 8):
        yield Case("reserved bits", f"text with RSV {rsv:03b}", (frame(ask(), rsv=rsv),), _WRONG)
    yield Case("reserved bits", "ping with RSV 100", (frame(b"", PING, rsv=4),), _WRONG)
    yield Case("reserved bits", "close with RSV 001", (frame(b"", CLOSE, rsv=1),), _WRONG)
    yield Case("reserved bits", "continuation with RSV 100", (frame(b"{", fin=False), frame(b"}", CONTINUATION, rsv=4)), _WRONG)


def _opcodes() -> Iterator[Case]:
    for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15):
        yield Case("opcodes", f"reserved {opcode}", (frame(b"", opcode),), _WRONG)
        yield Case("opcodes", f"reserved {opcode}, a message before it", (frame(ask()), frame(b"x", opcode)), (*_FINE, *_WRONG), _WRONG)


def _control() -> Iterator[Case]:
    yield Case("ping", "without payload", (frame(b"", PING),), ("pong ",))
    yield Case("ping", "with payload", (frame(b"hello", PING),), ("pong hello",))
    yield Case("ping", "bytes that are no text", (frame(b"\xff\xfe", PING),), ("pong \xff\xfe",))
    longest = peer.shown(b"p" * 125)
    yield Case("ping", "125 bytes", (frame(b"p" * 125, PING),), (f"pong {longest}",))
    yield Case("ping", "126 bytes", (frame(b"p" * 126, PING),), _WRONG)
    yield Case(
        "ping", "ten", (b"".join(frame(b"%d" % number, PING) for number in range(10)),), tuple(f"pong {number}" for number in range(10))
    )
    yield Case("ping", "not final", (frame(b"", PING, fin=False),), _WRONG)
    yield Case("pong", "nobody asked", (frame(b"hello", PONG), frame(ask())), _FINE)
    yield Case("pong", "126 bytes", (frame(b"p" * 126, PONG),), _WRONG)
    yield Case("pong", "not final", (frame(b"", PONG, fin=False),), _WRONG)


def _fragments() -> Iterator[Case]:
    text = ask()
    first, rest = frame(text[:5], fin=False), frame(text[5:], CONTINUATION)
    yield Case("fragments", "two", (first, rest), _FINE)
    yield Case("fragments", "two in one segment", (first + rest,), _FINE)
    single = [frame(text[place : place + 1], CONTINUATION if place else TEXT, fin=place + 1 == len(text)) for place in range(len(text))]
    yield Case("fragments", "each of one byte", tuple(single), _FINE)
    empty = frame(b"", CONTINUATION, fin=False)
    yield Case("fragments", "empty ones between", (first, empty, empty, rest), _FINE)
    yield Case(
        "fragments",
        "empty first, empty last",
        (frame(b"", fin=False), frame(text, CONTINUATION, fin=False), frame(b"", CONTINUATION)),
        _FINE,
    )
    yield Case("fragments", "ping between", (first, frame(b"x", PING), rest), ("pong x", *_FINE))
    yield Case("fragments", "pong between", (first, frame(b"x", PONG), rest), _FINE)
    # a close frame may come here; whether the message that it leaves unfinished is an error is not said
    yield Case("fragments", "close between", (first, close(1000)), ("close 1000",), _WRONG)
    yield Case("fragments", "binary", (frame(b"x", BINARY, fin=False), frame(b"y", CONTINUATION)), ("error BINARY_NOT_SUPPORTED",))
    yield Case("fragments", "continuation of nothing", (frame(text, CONTINUATION),), _WRONG)
    yield Case("fragments", "continuation of nothing, not final", (frame(text, CONTINUATION, fin=False),), _WRONG)
    yield Case("fragments", "continuation after the end", (first, rest, rest), (*_FINE, *_WRONG), _WRONG)
    yield Case("fragments", "text inside text", (first, frame(text)), _WRONG)
    yield Case("fragments", "binary inside text", (first, frame(b"x", BINARY)), _WRONG)


_VALID = {
    "two bytes": "é", "three bytes": "€", "four bytes": "😀", "the last code point": "\U0010ffff", "the last before surrogates": "\ud7ff",
    "the first after surrogates": "\ue000", "not a character": "\ufffe", "replacement character": "\ufffd", "the first of two": "\x80",
    "the first of three": "\u0800", "the first of four": "\U00010000",
}  # fmt: skip
_INVALID = {
    "a lone continuation": b"\x80", "two lone continuations": b"\x80\xbf", "cut after one of two": b"\xc3",
    "cut after two of three": b"\xe2\x82", "cut after three of four": b"\xf0\x9f\x98", "overlong slash, two": b"\xc0\xaf",
    "overlong slash, three": b"\xe0\x80\xaf", "overlong slash, four": b"\xf0\x80\x80\xaf", "overlong NUL": b"\xc0\x80",
    "surrogate high": b"\xed\xa0\x80", "surrogate low": b"\xed\xbf\xbf", "surrogate pair": b"\xed\xa0\xbd\xed\xb8\x80",
    "above the last code point": b"\xf4\x90\x80\x80", "five bytes": b"\xf8\x88\x80\x80\x80", "six bytes": b"\xfc\x84\x80\x80\x80\x80",
    "FE": b"\xfe", "FF": b"\xff", "Latin-1": b"\xe9t\xe9",
}  # fmt: skip


def _around(text: bytes) -> bytes:
    return b'{"type":"PING","id":"a","payload":{"x":"' + text + b'"}}'


def _utf8() -> Iterator[Case]:
    for name, text in _VALID.items():
        yield Case("UTF-8", name, (frame(_around(text.encode())),), _FINE)
    for name, wrong in _INVALID.items():
        yield Case("UTF-8", name, (frame(_around(wrong)),), ("close 1007",))


def _utf8_in_parts() -> Iterator[Case]:
    whole = _around("€😀".encode())
    for place in range(whole.index(b"\xe2") + 1, whole.index(b"\xe2") + 7):
        parts = (frame(whole[:place], fin=False), frame(whole[place:], CONTINUATION))
        yield Case("UTF-8", f"a character over two fragments, cut at {place}", parts, _FINE)
    wrong = _around(b"\xed\xa0\x80")
    cut = wrong.index(b"\xed") + 1
    yield Case(
        "UTF-8", "a surrogate over two fragments", (frame(wrong[:cut], fin=False), frame(wrong[cut:], CONTINUATION)), ("close 1007",)
    )


def _closing() -> Iterator[Case]:
    yield Case("closing", "without a code", (frame(b"", CLOSE),), ("close",))
    yield Case("closing", "one byte", (frame(b"\x03", CLOSE),), _WRONG)
    yield Case("closing", "with a reason", (close(1000, b"auf Wiedersehen"),), ("close 1000",))
    yield Case("closing", "a reason of 123 bytes", (close(1000, b"x" * 123),), ("close 1000",))
    yield Case("closing", "a reason of 124 bytes", (close(1000, b"x" * 124),), _WRONG)
    yield Case("closing", "a reason that is not UTF-8", (close(1000, b"\xff"),), ("close 1007",))
    yield Case("closing", "not final", (frame(struct.pack("!H", 1000), CLOSE, fin=False),), _WRONG)
    yield Case("closing", "a message after it", (close(1000) + frame(ask()),), ("close 1000",))
    yield Case("closing", "a ping after it", (close(1000) + frame(b"x", PING),), ("close 1000",))
    yield Case("closing", "twice", (close(1000) + close(1001),), ("close 1000",))
    yield Case("closing", "a message before it", (frame(ask()) + close(1001),), (*_FINE, "close 1001"), ("close 1001",))


def _closing_codes() -> Iterator[Case]:
    for code in (1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999):
        yield Case("closing", f"code {code}", (close(code),), (f"close {code}",))
    for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535):
        yield Case("closing", f"code {code}, which nobody may send", (close(code),), _WRONG)


def _sizes() -> Iterator[Case]:
    for size in (125, 126, 127, 128, 65_535, LIMIT):
        yield Case("sizes", f"{size} bytes", (frame(_of_size(size)),), _FINE)
    yield Case("sizes", f"{LIMIT + 1} bytes", (frame(_of_size(LIMIT + 1)),), ("error FRAME_TOO_LARGE",))
    half = _of_size(LIMIT + 1)
    yield Case(
        "sizes",
        f"{LIMIT + 1} bytes in two fragments",
        (frame(half[:9], fin=False), frame(half[9:], CONTINUATION)),
        ("error FRAME_TOO_LARGE",),
    )
    yield Case("sizes", f"{LIMIT + 1} bytes, then a message", (frame(half), frame(ask("b"))), ("error FRAME_TOO_LARGE", "answer b"))
    yield Case("sizes", "a mebibyte is announced", (frame(b"x" * 16, length=b"\x7f" + struct.pack("!Q", 1 << 20)),), ("close 1009",))
    yield Case("sizes", "an exbibyte is announced", (frame(b"x" * 16, length=b"\x7f" + struct.pack("!Q", 1 << 60)),), ("close 1009",))
    # a byte more than is read: what the server does not read makes a reset of its close, and the answer may be lost with it
    parts = [frame(b"x" * size, CONTINUATION if place else TEXT, fin=False) for place, size in enumerate([LIMIT] * 4 + [1])]
    yield Case("sizes", "fragments without end", tuple(parts), ("close 1009",))


def _lengths() -> Iterator[Case]:
    first_bit = b"\x7f" + struct.pack("!Q", 1 << 63)
    yield Case("lengths", "64 bits, the first one set", (frame(b"x" * 16, length=first_bit),), ("close 1002",), ("close 1009",))
