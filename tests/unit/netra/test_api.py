"""The HTTP resources: the end of a run is never lost, and an address of somebody else is told apart."""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console

from netra import api, client, credentials, errors, transfers

ENDED = {"ended_at": "2026-11-21T00:00:00Z"}


def event(cursor: int) -> dict[str, Any]:
    return {"cursor": cursor, "type": "agent_completed" if cursor == 5 else "agent_thinking"}


def streamed(*cursors: int) -> httpx.Response:
    return httpx.Response(200, text="".join(f"id: {cursor}\ndata: {json.dumps(event(cursor))}\n\n" for cursor in cursors))


def answered_by(handler: Any) -> api.Api:
    found = api.Api("http://a.example", "t")
    found._http = httpx.AsyncClient(base_url=found.url, transport=httpx.MockTransport(handler))
    return found


async def test_a_stream_that_is_cut_before_the_run_ends_loses_nothing() -> None:
    def gateway(request: httpx.Request) -> httpx.Response:
        if not request.url.path.endswith("/events"):
            return httpx.Response(200, json=ENDED)
        if request.headers.get("accept") == "text/event-stream":
            return httpx.Response(200, text=streamed(1, 2).text + 'event: agent_delta\ndata: {"type": "agent_delta"}\n\n')
        rest = range(int(request.url.params["after"]) + 1, 6)
        return httpx.Response(200, json={"events": [event(cursor) for cursor in rest], "next_after": 5})

    async with answered_by(gateway) as gate:
        assert [found["cursor"] async for found in gate.events("r", follow=True)] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("text", ["<html>", "[]", "", '"text"'])
async def test_an_answer_of_somebody_else_is_told(text: str) -> None:
    async with answered_by(lambda _: httpx.Response(200, text=text)) as gate:
        with pytest.raises(errors.Unavailable, match="did not answer as a Netra gateway"):
            await gate.runs()


async def test_all_tools_are_listed_page_by_page() -> None:
    asked: list[dict[str, str]] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        asked.append(dict(request.url.params))
        pages = {"": (["a", "b"], "t1"), "t1": (["c"], "t2"), "t2": ([], "")}
        names, token = pages[request.url.params.get("page_token", "")]
        return httpx.Response(200, json={"tools": [{"name": name} for name in names], "next_page_token": token})

    async with answered_by(gateway) as gate:
        assert [tool["name"] for tool in await gate.tools(category="x")] == ["a", "b", "c"]
    assert asked == [{"category": "x"}, {"category": "x", "page_token": "t1"}, {"category": "x", "page_token": "t2"}]


async def test_a_gateway_of_an_earlier_release_has_one_page_of_tools() -> None:
    async with answered_by(lambda _: httpx.Response(200, json={"tools": [{"name": "a"}]})) as gate:
        assert await gate.tools() == [{"name": "a"}]


class _Slow:
    """A gateway that renews slowly."""

    renewed = 0

    def __init__(self, _: str) -> None: ...

    async def __aenter__(self) -> _Slow:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def refresh(self, _: str) -> dict[str, Any]:
        await asyncio.sleep(0.1)
        _Slow.renewed += 1
        return {"access_token": "fresh", "refresh_token": "r2", "expires_in": 600}


@pytest.mark.timeout(10)
async def test_two_who_need_a_fresh_token_at_once_get_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "Api", _Slow)
    monkeypatch.setattr(_Slow, "renewed", 0)
    store = credentials.Store(tmp_path)
    store.keep("http://a", {"access_token": "old", "refresh_token": "r1", "expires_in": 1})
    assert list(await asyncio.gather(store.token("http://a"), store.token("http://a"))) == ["fresh", "fresh"]
    assert _Slow.renewed == 1


async def test_a_thread_is_erased_under_the_same_key_whenever_it_is_asked_for() -> None:
    keys: list[str] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["Idempotency-Key"])
        return httpx.Response(503, json={"code": "UNAVAILABLE", "message": "away"}) if len(keys) == 1 else httpx.Response(200, json={})

    for thread_id in ("0192f0c1-2b6a-7c3d-8e4f-0a1b2c3d4e5f", "0192F0C1-2B6A-7C3D-8E4F-0A1B2C3D4E5F", "another"):
        async with answered_by(gateway) as gate:
            if not keys:
                with pytest.raises(errors.Unavailable):
                    await gate.erase_thread(thread_id)
            await gate.erase_thread(thread_id)
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert len(keys) == 4


@pytest.mark.parametrize("thread_id", ["", "0192f0c1-2b6a-7c3d-8e4f-0a1b2c3d4e5f"])
async def test_a_file_goes_into_a_thread_when_one_is_named(thread_id: str, tmp_path: Path) -> None:
    asked: list[dict[str, str]] = []

    def gateway(request: httpx.Request) -> httpx.Response:
        asked.append(dict(request.url.params))
        body = request.read()
        return httpx.Response(201, json={"artifact_id": "a", "name": "x.csv", "bytes": 1, "sha256": hashlib.sha256(body).hexdigest()})

    (tmp_path / "x.csv").write_text("1")
    async with answered_by(gateway) as gate:
        kept = [
            await client.Client(gate, 1.0).upload(tmp_path / "x.csv", thread_id=thread_id),
            {"artifact_id": await transfers.upload(gate, tmp_path / "x.csv", Console(quiet=True), thread_id)},
        ]
    assert [one["artifact_id"] for one in kept] == ["a", "a"]
    assert asked == [{"name": "x.csv"} | ({"thread_id": thread_id} if thread_id else {})] * 2


def test_without_tls_no_certificate_is_believed() -> None:
    plain = api._believed("http://127.0.0.1:1")
    assert isinstance(plain, ssl.SSLContext)
    assert (plain.get_ca_certs(), plain.verify_mode, plain.check_hostname) == ([], ssl.CERT_REQUIRED, True)
    assert api._believed("HTTPS://netra.example") is True
