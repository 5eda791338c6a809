"""Files between this machine and a gateway: whole and checked, or not there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from netra import api, errors, files

DATA = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(DATA).hexdigest()


def answered_by(handler: Callable[[httpx.Request], Any], patience_s: float = 0.0) -> api.Api:
    found = api.Api("http://a.example", "t", patience_s=patience_s)
    found._http = httpx.AsyncClient(base_url=found.url, transport=httpx.MockTransport(handler))
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.csv", "text/csv"), ("A.CSV", "text/csv"), ("a.csv.gz", "application/gzip"), ("a.jsonl", "application/x-ndjson"),
        ("a.parquet", "application/vnd.apache.parquet"), ("a.html", "text/html"), ("a.zip", "application/octet-stream"),
        ("a", "application/octet-stream"), ("a.md", "text/markdown"), ("chart.svg", "image/svg+xml"),
    ],
)  # fmt: skip
def test_the_name_tells_the_media_type(name: str, kind: str) -> None:
    assert files.media_type(name) == kind


async def test_an_upload_sends_the_bytes_and_tells_how_far_it_is(tmp_path: Path) -> None:
    asked: list[httpx.Request] = []
    seen: list[tuple[int, int]] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(201, json={"artifact_id": "a", "sha256": hashlib.sha256(request.content).hexdigest()})

    (tmp_path / "log 1.csv").write_bytes(DATA)
    async with answered_by(_read(gateway)) as gate:
        found = await gate.upload(tmp_path / "log 1.csv", progress=lambda *at: seen.append(at))
    assert found == {"artifact_id": "a", "sha256": SHA256}
    request = asked[0]
    assert (request.method, request.url.path, dict(request.url.params)) == ("POST", "/v1/artifacts", {"name": "log 1.csv"})
    assert (request.headers["content-type"], request.headers["content-length"]) == ("text/csv", str(len(DATA)))
    assert "transfer-encoding" not in request.headers
    assert seen[-1] == (len(DATA), len(DATA))
    assert [at for at, _ in seen] == sorted({at for at, _ in seen})


def _read(gateway: Callable[[httpx.Request], httpx.Response]) -> Callable[[httpx.Request], Any]:
    async def handler(request: httpx.Request) -> httpx.Response:
        await request.aread()
        return gateway(request)

    return handler


async def test_what_arrived_otherwise_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(DATA)
    async with answered_by(_read(lambda _: httpx.Response(201, json={"sha256": "0" * 64}))) as gate:
        with pytest.raises(errors.Unavailable, match="SHA-256"):
            await gate.upload(tmp_path / "a")


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x"])
async def test_a_file_that_changes_while_it_is_sent_is_refused(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(DATA)
    with files.Outgoing(path, None) as file:
        path.write_bytes(change(DATA))
        with pytest.raises(errors.InvalidPayload, match="changed"):
            async for _ in file.pieces():
                pass


async def test_a_file_that_cannot_be_read_or_written_is_named(tmp_path: Path) -> None:
    async with answered_by(lambda _: httpx.Response(200)) as gate:
        with pytest.raises(errors.InvalidPayload, match=r"missing\.csv cannot be read: No such file"):
            await gate.upload(tmp_path / "missing.csv")
        with pytest.raises(errors.InvalidPayload, match=r"x cannot be written"):
            await gate.download("a", tmp_path / "nowhere" / "x")


class Pieces(httpx.AsyncByteStream):
    """What comes over a connection, and then its end or an error."""

    def __init__(self, data: bytes, error: Exception | None = None) -> None:
        self.data, self.error = data, error

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for at in range(0, len(self.data), 60_000):
            yield self.data[at : at + 60_000]
        if self.error is not None:
            raise self.error


def _sent(data: bytes, code: int = 200) -> httpx.Response:
    headers = {
        "content-type": "text/csv", "etag": f'"{SHA256}"', "content-length": str(len(data)),
        "content-disposition": "attachment; filename=\"_.csv\"; filename*=UTF-8''%C3%A9.csv",
    }  # fmt: skip
    return httpx.Response(code, headers=headers, stream=Pieces(data))


async def test_a_download_is_written_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    async with answered_by(lambda _: _sent(DATA)) as gate:
        found = await gate.download("a", tmp_path / "x", lambda *at: seen.append(at))
    assert found == {"artifact_id": "a", "name": "é.csv", "bytes": len(DATA), "sha256": SHA256, "media_type": "text/csv"}
    assert (tmp_path / "x").read_bytes() == DATA
    assert seen[-1] == (len(DATA), len(DATA))


async def test_what_is_not_whole_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"before")
    async with answered_by(lambda _: _sent(DATA[:-1])) as gate:
        with pytest.raises(errors.Unavailable, match="SHA-256"):
            await gate.download("a", tmp_path / "x")
    async with answered_by(lambda _: httpx.Response(404, json={"code": "NOT_FOUND", "message": "no"})) as gate:
        with pytest.raises(errors.NotFound):
            await gate.download("a", tmp_path / "x")
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"before"


async def test_a_download_that_breaks_off_goes_on_where_it_was(tmp_path: Path) -> None:
    ranges: list[str] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        ranges.append(request.headers.get("range", ""))
        if len(ranges) == 1:
            return httpx.Response(200, headers={"content-length": str(len(DATA))}, stream=Pieces(DATA[:300_000], httpx.ReadError("cut")))
        if len(ranges) == 2:
            return httpx.Response(503)
        return _sent(DATA[int(ranges[-1].removeprefix("bytes=").removesuffix("-")) :], 206)

    async with answered_by(gateway, patience_s=5) as gate:
        await gate.download("a", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA
    assert ranges[0] == ""
    assert ranges[1] == ranges[2] == "bytes=300000-"


async def test_without_patience_an_interruption_is_told(tmp_path: Path) -> None:
    async with answered_by(lambda _: httpx.Response(503)) as gate:
        with pytest.raises(errors.Unavailable):
            await gate.download("a", tmp_path / "x")


async def test_lists_and_deletes() -> None:
    asked: list[tuple[str, str]] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        asked.append((request.method, request.url.raw_path.decode()))
        return httpx.Response(204) if request.method == "DELETE" else httpx.Response(200, json={"artifacts": [{"artifact_id": "a"}]})

    async with answered_by(gateway) as gate:
        assert await gate.artifacts(5) == [{"artifact_id": "a"}]
        await gate.delete_artifact("a/../b")
    assert asked == [("GET", "/v1/artifacts?page_size=5"), ("DELETE", "/v1/artifacts/a%2F..%2Fb")]
