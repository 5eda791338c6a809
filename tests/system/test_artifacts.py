"""Files through the gateway: streamed both ways, whole or not at all."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from netra import errors, ids
from netra.api import Api
from tests.fixtures import web
from tests.fixtures.stack import System, gateway_url
from tests.fixtures.users import NewUser, User

DATA = random.Random(1).randbytes(3 * 1024 * 1024 + 17)
SHA256 = hashlib.sha256(DATA).hexdigest()


def _client(system: System, user: User) -> httpx.AsyncClient:
    return web.client(base_url=gateway_url(system), headers={"Authorization": f"Bearer {user.token}"}, timeout=30)


async def _put(client: httpx.AsyncClient, content: Any = DATA, name: str = "log.csv", **headers: str) -> httpx.Response:
    return await client.post("/v1/artifacts", params={"name": name}, content=content, headers={"Content-Type": "text/csv", **headers})


async def test_a_file_there_and_back(system: System, new_user: NewUser, tmp_path: Path) -> None:
    (tmp_path / "été.csv").write_bytes(DATA)
    seen: list[tuple[int, int]] = []
    async with Api(gateway_url(system), new_user().token) as api:
        put = await api.upload(tmp_path / "été.csv", progress=lambda *at: seen.append(at))
        assert {name: put[name] for name in ("name", "bytes", "sha256", "media_type", "run_id")} == {
            "name": "été.csv", "bytes": len(DATA), "sha256": SHA256, "media_type": "text/csv", "run_id": None,
        }  # fmt: skip
        assert seen[-1] == (len(DATA), len(DATA))
        assert await api.artifacts() == [put]
        got = await api.download(put["artifact_id"], tmp_path / "back.csv")
        assert got == {name: put[name] for name in got}
        assert (tmp_path / "back.csv").read_bytes() == DATA
        await api.delete_artifact(put["artifact_id"])
        assert await api.artifacts() == []
        with pytest.raises(errors.NotFound):
            await api.download(put["artifact_id"], tmp_path / "gone.csv")
        with pytest.raises(errors.NotFound):
            await api.delete_artifact(put["artifact_id"])


async def test_an_answer_says_what_was_kept_and_a_download_cannot_act_as_a_page(system: System, new_user: NewUser) -> None:
    async with _client(system, new_user()) as client:
        put = await client.post("/v1/artifacts?name=a.html", content=b"<script>", headers={"Content-Type": "Text/HTML; charset=utf-8"})
        assert (put.status_code, put.headers["location"]) == (201, f"/v1/artifacts/{put.json()['artifact_id']}")
        assert put.json()["media_type"] == "text/html"
        for method in ("GET", "HEAD"):
            got = await client.request(method, put.headers["location"])
            shown = {name: got.headers[name] for name in ("content-type", "content-length", "etag", "accept-ranges")}
            assert shown == {
                "content-type": "text/html",
                "content-length": "8",
                "etag": f'"{put.json()["sha256"]}"',
                "accept-ranges": "bytes",
            }
            assert got.headers["content-disposition"] == "attachment; filename=\"a.html\"; filename*=UTF-8''a.html"
            assert got.headers["content-security-policy"] == "sandbox; default-src 'none'"
            assert got.headers.get_list("x-content-type-options") == ["nosniff"]
            assert got.content == (b"<script>" if method == "GET" else b"")
        # without a media type it is bytes
        bare = await client.post("/v1/artifacts?name=a", content=b"")
        assert (bare.json()["media_type"], bare.json()["bytes"]) == ("application/octet-stream", 0)
        assert (await client.get(bare.headers["location"])).content == b""


async def test_parts(system: System, new_user: NewUser) -> None:
    async with _client(system, new_user()) as client:
        path = (await _put(client)).headers["location"]
        for asked, part in (("bytes=5-9", DATA[5:10]), ("bytes=1048577-", DATA[1048577:]), ("bytes=-3", DATA[-3:])):
            got = await client.get(path, headers={"Range": asked})
            assert (got.status_code, got.content) == (206, part)
            assert got.headers["content-range"].endswith(f"/{len(DATA)}")
        beyond = await client.get(path, headers={"Range": f"bytes={len(DATA)}-"})
        assert (beyond.status_code, beyond.headers["content-range"]) == (416, f"bytes */{len(DATA)}")


async def test_a_key_makes_one_artifact(system: System, new_user: NewUser) -> None:
    async with _client(system, new_user()) as client:
        key = {"Idempotency-Key": ids.uuid7()}
        first, second = await _put(client, **key), await _put(client, **key)
        assert first.json() == second.json()
        other = await _put(client, DATA[:-1], **key)
        assert (other.status_code, other.json()["code"]) == (409, "ALREADY_EXISTS")
        assert len((await client.get("/v1/artifacts")).json()["artifacts"]) == 1


async def test_pages(system: System, new_user: NewUser) -> None:
    async with _client(system, new_user()) as client:
        puts = [(await _put(client, b"x", f"{number}.csv")).json() for number in range(3)]
        first = (await client.get("/v1/artifacts", params={"page_size": 2})).json()
        rest = (await client.get("/v1/artifacts", params={"page_size": 2, "page_token": first["next_page_token"]})).json()
        assert first["artifacts"] + rest["artifacts"] == puts[::-1]
        assert rest["next_page_token"] == ""


async def _chunked() -> AsyncIterator[bytes]:
    for at in range(0, len(DATA), 100_000):
        yield DATA[at : at + 100_000]


async def test_a_body_of_unknown_length(system: System, new_user: NewUser) -> None:
    async with _client(system, new_user()) as client:
        assert (await _put(client, _chunked())).json()["sha256"] == SHA256
        assert (await _put(client, _chunked(), **{"X-Content-SHA256": SHA256.upper()})).status_code == 201


@pytest.mark.parametrize(
    ("name", "headers", "field"),
    [
        ("a/b", {}, "name"),
        ("", {}, "query.name"),
        ("a", {"Content-Type": "application/x-www-form-urlencoded"}, "media_type"),
        ("a", {"X-Content-SHA256": "0" * 64}, "sha256"),
        ("a", {"Content-Encoding": "gzip"}, "Content-Encoding"),
    ],
)
async def test_what_is_wrong_is_named(system: System, new_user: NewUser, name: str, headers: dict[str, str], field: str) -> None:
    async with _client(system, new_user()) as client:
        answer = await _put(client, DATA, name, **headers)
        assert (answer.status_code, answer.json()["code"], answer.json()["details"]["field"]) == (400, "INVALID_PAYLOAD", field)
        assert (await client.get("/v1/artifacts")).json()["artifacts"] == []


async def test_a_readonly_user_keeps_nothing(system: System, new_user: NewUser) -> None:
    async with _client(system, new_user(role="readonly")) as client:
        assert (await _put(client)).status_code == 403
        assert (await client.get("/v1/artifacts")).json()["artifacts"] == []


@contextlib.asynccontextmanager
async def _begun(system: System, user: User, *headers: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", system.ports["gateway"])
    lines = ["POST /v1/artifacts?name=a HTTP/1.1", "Host: a", f"Authorization: Bearer {user.token}", *headers, "", ""]
    try:
        writer.write("\r\n".join(lines).encode())
        yield reader, writer
    finally:
        writer.close()
        await writer.wait_closed()


async def test_what_is_too_large_is_refused_before_it_is_sent(system: System, new_user: NewUser) -> None:
    user = new_user()
    async with _begun(system, user, f"Content-Length: {2**40}", "Expect: 100-continue") as (reader, _):
        answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        assert answer.startswith(b"HTTP/1.1 413 ")
    # the positive control
    async with _begun(system, user, "Content-Length: 5", "Expect: 100-continue") as (reader, writer):
        assert await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10) == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"12345")
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)).startswith(b"HTTP/1.1 201 ")


@pytest.mark.parametrize("framing", [f"Content-Length: {2 * len(DATA)}", "Transfer-Encoding: chunked"])
async def test_an_upload_that_breaks_off_leaves_nothing(system: System, new_user: NewUser, framing: str) -> None:
    user, key = new_user(), ids.uuid7()
    async with _begun(system, user, framing, f"Idempotency-Key: {key}") as (_, writer):
        writer.write(DATA if "Length" in framing else b"%x\r\n%s\r\n" % (len(DATA), DATA))
        await writer.drain()
    async with _client(system, user) as client:
        put = await _put(client, b"other", **{"Idempotency-Key": key})
        assert (put.status_code, put.json()["bytes"]) == (201, 5)
        assert (await client.get("/v1/artifacts")).json()["artifacts"] == [put.json()]
