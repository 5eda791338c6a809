"""What anybody may ask costs little, however often it is asked."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from gateway import http, kept, openapi, problems
from gateway.settings import GatewaySettings
from netra import errors
from netra.auth.v1 import auth_pb2


class _Services:
    """Counts what it is asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.auth = SimpleNamespace(GetKeys=self._keys)
        self.channels = dict.fromkeys(("auth", "context", "dispatcher", "events"), SimpleNamespace(unary_unary=lambda *_: None))

    async def serving(self) -> dict[str, bool]:
        self.asked.append("serving")
        return {"auth": True}

    async def _keys(self, _request: Any) -> auth_pb2.GetKeysResponse:
        self.asked.append("keys")
        return auth_pb2.GetKeysResponse()


async def _nobody(_request: Any) -> str:
    return ""


def _api(services: _Services) -> http.Api:
    edge = SimpleNamespace(
        settings=GatewaySettings(), callers=SimpleNamespace(nobody=_nobody), open=SimpleNamespace(draining=asyncio.Event()),
        verifier=SimpleNamespace(trust=SimpleNamespace(ready=True)), tail=SimpleNamespace(connected=True, live=True),
    )  # fmt: skip
    return http.Api(edge, services)  # type: ignore[arg-type]


async def test_what_is_asked_often_is_asked_on_once(monkeypatch: pytest.MonkeyPatch) -> None:
    services = _Services()
    api, request, described = _api(services), Request({"type": "http"}), openapi.document

    def document(*given: Any) -> Any:
        services.asked.append("document")
        return described(*given)

    monkeypatch.setattr(openapi, "document", document)
    for _ in range(20):
        for endpoint in (api.readyz, api.jwks, api.openapi):
            assert (await endpoint(request)).status_code == 200
    assert services.asked == ["serving", "keys", "document"]


async def test_a_gateway_that_drains_says_so_at_once() -> None:
    api = _api(_Services())
    assert (await api.readyz(Request({"type": "http"}))).status_code == 200
    api._edge.open.draining.set()
    assert (await api.readyz(Request({"type": "http"}))).status_code == 503


async def test_an_answer_is_kept_for_a_moment_and_asked_for_by_one() -> None:
    answers, go_on, asked = iter(range(10)), asyncio.Event(), asyncio.Event()

    async def ask() -> int:
        found = next(answers)
        if found:
            asked.set()
            await go_on.wait()
        return found

    old = kept.Kept(ask, 0.0)
    assert await old() == 0
    old._fresh_s = 60.0
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        renewed = group.create_task(old())
        await asked.wait()
        assert [await old() for _ in range(3)] == [0, 0, 0]
        go_on.set()
    assert (renewed.result(), await old()) == (1, 1)


async def test_what_could_not_be_asked_is_asked_again() -> None:
    fails = [True, False]

    async def ask() -> str:
        if fails.pop(0):
            raise errors.Unavailable
        return "found"

    found = kept.Kept(ask, 60.0)
    with pytest.raises(errors.Unavailable):
        await found()
    assert await found() == "found"


async def test_a_client_that_goes_away_amid_its_body_is_no_fault_of_ours() -> None:
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    with pytest.raises(errors.Cancelled):
        await problems.raw_body(Request({"type": "http", "headers": []}, receive), 100)
