"""What a browser brings to a sign-in, and what of it is passed on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from chassis import channel
from gateway import app, sign_in
from gateway.settings import GatewaySettings
from netra import errors
from netra.auth.v1 import auth_pb2

_PAGE = {"Origin": "https://app.netra.example"}
_TOKENS = auth_pb2.Tokens(access_token="a", refresh_token="r", user_id="u")


class _Auth:
    """Stands for auth; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    async def IssueToken(self, request: Any, metadata: Any) -> Any:
        self.asked.append(request)
        return auth_pb2.IssueTokenResponse(tokens=_TOKENS)

    async def StartOidc(self, request: Any, metadata: Any) -> Any:
        self.asked.append(request)
        return auth_pb2.StartOidcResponse(authorization_url="https://id.netra.example/", binding="the binding")

    async def FinishOidc(self, request: Any, metadata: Any) -> Any:
        self.asked.append(request)
        return auth_pb2.FinishOidcResponse(redirect_to="https://app.netra.example/?code=nlc_x")


async def _own() -> channel.Metadata:
    return channel.bearer("the gateway's")


async def _nobody(request: Any) -> str:
    return "198.51.100.1"


@pytest.fixture
def auth() -> _Auth:
    return _Auth()


@pytest.fixture
def browser(auth: _Auth) -> httpx.AsyncClient:
    """Keeps cookies as a browser does."""
    edge = SimpleNamespace(settings=GatewaySettings(public_url="http://gateway.netra.example"), callers=SimpleNamespace(nobody=_nobody))
    routes = sign_in.SignIn(edge, SimpleNamespace(auth=auth, credentials=_own)).routes()  # type: ignore[arg-type]
    served = Starlette(
        routes=[Route(path, endpoint, methods=[method]) for method, path, endpoint in routes],
        exception_handlers={errors.NetraError: app._refused},
    )
    transport = httpx.ASGITransport(app=served)
    return httpx.AsyncClient(transport=transport, base_url="http://gateway.netra.example", trust_env=False)


@pytest.mark.parametrize(
    ("headers", "device"),
    [
        ({}, "netra cli"),
        (_PAGE, "browser"),
        ({"Sec-Fetch-Mode": "cors"}, "browser"),
        (_PAGE | {"User-Agent": "Mozilla/5.0"}, "Mozilla/5.0"),
    ],
)
async def test_a_page_is_no_command_line(auth: _Auth, browser: httpx.AsyncClient, headers: dict[str, str], device: str) -> None:
    body = {"email": "ann@netra.example", "password": "a good password"}
    assert (await browser.post("/auth/login", json=body, headers={"User-Agent": "netra cli", **headers})).status_code == 200
    assert auth.asked[0].device == device


async def test_a_code_is_exchanged_by_the_browser_that_began_the_sign_in(auth: _Auth, browser: httpx.AsyncClient) -> None:
    await browser.get("/auth/oidc/start", params={"provider": "corp", "redirect_uri": "https://app.netra.example/"})
    await browser.get("/auth/oidc/callback", params={"state": "s", "code": "c"})
    await browser.post("/auth/token", data={"grant_type": "authorization_code", "code": "nlc_x"})
    assert (auth.asked[1].binding, auth.asked[2].login_code.binding) == ("the binding", "the binding")
    # and once
    await browser.post("/auth/token", data={"grant_type": "authorization_code", "code": "nlc_x"})
    assert auth.asked[3].login_code.binding == ""


async def test_a_frontend_may_bring_a_challenge_and_its_verifier(auth: _Auth, browser: httpx.AsyncClient) -> None:
    await browser.get("/auth/oidc/start", params={"provider": "corp", "code_challenge": "the challenge", "code_challenge_method": "S256"})
    assert auth.asked[0].code_challenge == "the challenge"
    await browser.post("/auth/token", data={"grant_type": "authorization_code", "code": "nlc_x", "code_verifier": "the verifier"})
    assert auth.asked[1].login_code.code_verifier == "the verifier"


async def test_a_plain_challenge_is_none(auth: _Auth, browser: httpx.AsyncClient) -> None:
    query = {"provider": "corp", "code_challenge": "the challenge", "code_challenge_method": "plain"}
    assert (await browser.get("/auth/oidc/start", params=query)).status_code == 400
    assert auth.asked == []
