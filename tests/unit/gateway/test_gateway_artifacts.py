"""Files over HTTP: which part is sent, under what name, and what ends an upload or a download early."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import pytest
from starlette.requests import Request

from gateway import artifacts
from netra import errors
from netra.context.v1 import context_pb2

FOUND = context_pb2.Artifact(artifact_id="a", name="a.csv", media_type="text/csv", size=100, sha256="ab" * 32)
ETAG = f'"{FOUND.sha256}"'


@pytest.mark.parametrize(
    ("asked", "first", "end", "partial"),
    [
        ("", 0, 100, False), ("bytes=0-", 0, 100, True), ("bytes=10-19", 10, 20, True), ("bytes=99-", 99, 100, True),
        ("bytes=90-1000", 90, 100, True), ("bytes=-10", 90, 100, True), ("bytes=-1000", 0, 100, True),
        ("bytes=0-0", 0, 1, True),
        # more than one, another unit, nonsense: all of it
        ("bytes=0-1,5-6", 0, 100, False), ("lines=1-2", 0, 100, False), ("bytes=a-b", 0, 100, False), ("bytes=-", 0, 100, False),
    ],
)  # fmt: skip
def test_a_range(asked: str, first: int, end: int, partial: bool) -> None:
    assert artifacts._span({"range": asked}, FOUND) == artifacts._Span(first, end, partial)


@pytest.mark.parametrize("asked", ["bytes=100-", "bytes=20-10", "bytes=-0", f"bytes={10**18}-"])
def test_a_range_that_is_not_there(asked: str) -> None:
    assert artifacts._span({"range": asked}, FOUND) is None


def test_a_range_of_another_artifact_means_all() -> None:
    assert artifacts._span({"range": "bytes=5-", "if-range": '"other"'}, FOUND) == artifacts._Span(0, 100, partial=False)
    assert artifacts._span({"range": "bytes=5-", "if-range": ETAG}, FOUND) == artifacts._Span(5, 100, partial=True)


@pytest.mark.parametrize(
    ("name", "plain"), [("a b.csv", "a b.csv"), ('a"b\\c.csv', "a_b_c.csv"), ("été%20.csv", "_t__20.csv"), ("日本", "__")]
)  # fmt: skip
def test_a_name_cannot_leave_its_header(name: str, plain: str) -> None:
    found = context_pb2.Artifact(name=name, media_type="text/html", size=1)
    headers = artifacts._headers(found, artifacts._Span(0, 1, partial=False))
    shown = headers["Content-Disposition"]
    assert shown.startswith(f"attachment; filename=\"{plain}\"; filename*=UTF-8''")
    assert unquote(shown.partition("UTF-8''")[2]) == name
    assert shown.isascii()
    assert headers["Content-Security-Policy"] == "sandbox; default-src 'none'"


class _Call:
    """A download from the context service: these parts, then this error or the end."""

    def __init__(self, parts: int, error: Exception | None = None) -> None:
        self.parts, self.error, self.cancelled = parts, error, False

    async def __aiter__(self) -> AsyncIterator[context_pb2.GetArtifactResponse]:
        for _ in range(self.parts):
            yield context_pb2.GetArtifactResponse(data=b"0123456789")
        if self.error is not None:
            raise self.error

    def cancel(self) -> None:
        self.cancelled = True


class _Peer:
    """A peer that takes so many messages, or goes away."""

    def __init__(self, room: int = 1000, *, leaves: bool = False) -> None:
        self.room, self.sent, self.left, self.cut = room, list[Any](), asyncio.Event(), False
        if leaves:
            self.left.set()

    async def send(self, message: Any) -> None:
        if len(self.sent) >= self.room:
            await asyncio.Event().wait()
        self.sent.append(message)

    async def receive(self) -> Any:
        await self.left.wait()
        return {"type": "http.disconnect"}

    def end(self) -> None:
        self.cut = True
        self.left.set()

    async def take(self, call: _Call, span: artifacts._Span, *, method: str = "GET", revoked: bool = False) -> bytes:
        sent = artifacts._Sent(call, FOUND, span, lambda: revoked, 0.05)  # type: ignore[arg-type]
        async with asyncio.timeout(5):
            await sent({"type": "http", "method": method, "state": {"cut": self.end}}, self.receive, self.send)
        assert call.cancelled
        return b"".join(message.get("body", b"") for message in self.sent)


WHOLE = artifacts._Span(0, 100, partial=False)


async def test_a_download_is_whole() -> None:
    peer = _Peer()
    assert await peer.take(_Call(10), WHOLE) == b"0123456789" * 10
    assert not peer.cut
    assert peer.sent[-1]["more_body"] is False
    assert (peer.sent[0]["status"], dict(peer.sent[0]["headers"])[b"content-length"]) == (200, b"100")


async def test_a_part_ends_where_it_was_asked_to() -> None:
    peer = _Peer()
    assert await peer.take(_Call(9), artifacts._Span(10, 25, partial=True)) == b"012345678901234"
    assert (peer.sent[0]["status"], dict(peer.sent[0]["headers"])[b"content-range"]) == (206, b"bytes 10-24/100")


async def test_a_question_for_the_headers_gets_them_alone() -> None:
    assert await _Peer().take(_Call(10), WHOLE, method="HEAD") == b""


@pytest.mark.parametrize("call", [_Call(5), _Call(5, errors.NotFound()), _Call(5, errors.Unavailable())])
async def test_a_download_that_cannot_go_on_is_cut(call: _Call) -> None:
    peer = _Peer()
    await peer.take(call, WHOLE)
    assert peer.cut
    assert peer.sent[-1]["more_body"] is True


async def test_a_download_ends_with_the_session() -> None:
    peer = _Peer()
    assert await peer.take(_Call(10), WHOLE, revoked=True) == b""
    assert peer.cut


async def test_a_peer_that_takes_nothing_is_cut() -> None:
    peer = _Peer(room=3)
    await peer.take(_Call(10), WHOLE)
    assert peer.cut


async def test_a_peer_that_is_gone_is_sent_no_more() -> None:
    peer = _Peer(room=3, leaves=True)
    await peer.take(_Call(10), WHOLE)
    assert not peer.cut


class _Accepted:
    """An upload to the context service, whose header was accepted or refused."""

    def __init__(self, refused: bool = False) -> None:
        self.refused = refused

    async def initial_metadata(self) -> dict[str, str]:
        return {} if self.refused else {"x-netra-accepted": "header"}


def _body(*messages: dict[str, Any], refused: bool = False, revoked: bool = False) -> artifacts._Body:
    waiting = list(messages)

    async def receive() -> Any:
        if not waiting:
            await asyncio.Event().wait()
        return waiting.pop(0)

    body = artifacts._Body(Request({"type": "http", "method": "POST", "headers": []}, receive), 0.05, lambda: revoked)
    body.call = _Accepted(refused)  # type: ignore[assignment]
    return body


def _came(data: bytes, more: bool) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


async def _parts(body: artifacts._Body) -> list[context_pb2.PutArtifactRequest]:
    return [part async for part in body.parts(context_pb2.ArtifactHeader(name="n"))]


async def test_a_body_becomes_parts_of_64_kib() -> None:
    parts = await _parts(_body(_came(b"x" * 150_000, True), _came(b"", True), _came(b"y", False)))
    assert parts[0].header.name == "n"
    assert [len(part.data) for part in parts[1:-1]] == [65536, 65536, 18928, 1]
    assert parts[-1].end


async def test_an_empty_body_is_one() -> None:
    assert [part.WhichOneof("part") for part in await _parts(_body(_came(b"", False)))] == ["header", "end"]


async def test_what_was_refused_is_not_read() -> None:
    assert [part.WhichOneof("part") for part in await _parts(_body(refused=True))] == ["header"]


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (lambda: _body(_came(b"x", True)), errors.DeadlineExceeded),
        (lambda: _body(_came(b"x", True), {"type": "http.disconnect"}), errors.Cancelled),
        (lambda: _body(_came(b"x", True), _came(b"x", False), revoked=True), errors.Unauthenticated),
    ],
)  # fmt: skip
async def test_a_body_that_does_not_come_ends_the_upload(body: Any, kind: type[errors.NetraError]) -> None:
    one = body()
    with pytest.raises(kind):
        await _parts(one)
    assert isinstance(one.failure, kind)


@pytest.mark.parametrize("first", [1, 1_000_000])
async def test_an_upload_that_trickles_ends_however_it_began(first: int) -> None:
    sizes = itertools.chain([first], itertools.repeat(1))

    async def receive() -> Any:
        await asyncio.sleep(0.005)
        return _came(b"x" * next(sizes), True)

    body = artifacts._Body(Request({"type": "http", "method": "POST", "headers": []}, receive), 0.05, lambda: False)
    body.call = _Accepted()  # type: ignore[assignment]
    async with asyncio.timeout(5):
        with pytest.raises(errors.DeadlineExceeded):
            await _parts(body)


@pytest.mark.parametrize(
    ("query", "headers", "field"),
    [
        (b"", [], "query.name"),
        (b"name=a", [(b"content-encoding", b"gzip")], "Content-Encoding"),
        (b"name=a", [(b"idempotency-key", b"a b")], "request_id"),
    ],
)
def test_headers_that_are_refused(query: bytes, headers: list[tuple[bytes, bytes]], field: str) -> None:
    with pytest.raises(errors.InvalidPayload) as refused:
        artifacts._header(Request({"type": "http", "method": "POST", "query_string": query, "headers": headers}))
    assert refused.value.details["field"] == field


def test_headers_tell_what_comes() -> None:
    headers = [
        (b"content-type", b"text/csv"), (b"content-length", b"12"), (b"x-content-sha256", b"AB" * 32), (b"idempotency-key", b"k1"),
    ]  # fmt: skip
    found = artifacts._header(Request({"type": "http", "method": "POST", "query_string": b"name=%C3%A9", "headers": headers}))
    told = SimpleNamespace(request_id="k1", name="é", media_type="text/csv", size=12, sha256="ab" * 32)
    assert {name: getattr(found, name) for name in vars(told)} == vars(told)
