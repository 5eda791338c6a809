"""Sign-in with a real outside provider, as a browser and a frontend do it over the gateway."""

from __future__ import annotations

import base64
import hashlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import httpx
import pytest

from tests.fixtures import oidc, web
from tests.fixtures.storage import Services

PAGE = "https://app.netra.example/signed-in"


@dataclass(slots=True)
class Door:
    """The gateway as a browser finds it."""

    browser: httpx.AsyncClient
    callback: str

    async def back(self, name: str, **query: str) -> httpx.Response:
        """What the gateway says to a browser that comes back from the provider."""
        began = await self.browser.get("/auth/oidc/start", params={"provider": "corp", **query})
        assert began.status_code == 303, began.text
        return await self.browser.get(self.callback, params=await oidc.sign_in(began.headers["location"], name, self.callback))


@pytest.fixture
async def door(services: Services, tmp_path: Path) -> AsyncIterator[Door]:
    """Auth, which knows one provider, and the gateway, which the provider sends browsers back to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    callback = f"{base}/auth/oidc/callback"
    with oidc.provider(callback) as provider:
        entry = provider.entry(create_users=True, tier="early", redirects=[PAGE])
        await services.auth(oidc_providers=oidc.write(tmp_path / "oidc.json", corp=entry))
        await services.context()
        await services.events()
        await services.dispatcher()
        await services.gateway(port=port)
        async with web.client(base_url=base, timeout=20, trust_env=False) as browser:
            yield Door(browser, callback)


async def _who(door: Door, access_token: str) -> tuple[str, str]:
    answer = await door.browser.get("/v1/me", headers={"Authorization": f"Bearer {access_token}"})
    assert answer.status_code == 200, answer.text
    return answer.json()["email"], answer.json()["tier"]


async def test_a_frontend_gets_a_code_and_exchanges_it_for_tokens(door: Door) -> None:
    sent = await door.back("ada", redirect_uri=PAGE)
    assert (sent.status_code, sent.headers["cache-control"], sent.headers["referrer-policy"]) == (303, "no-store", "no-referrer")
    address = urlsplit(sent.headers["location"])
    assert f"{address.scheme}://{address.netloc}{address.path}" == PAGE
    form = {"grant_type": "authorization_code", "code": dict(parse_qsl(address.query))["code"]}
    tokens = await door.browser.post("/auth/token", data=form)
    assert tokens.status_code == 200, tokens.text
    assert await _who(door, tokens.json()["access_token"]) == ("ada@netra.example", "early")
    renewed = await door.browser.post("/auth/refresh", json={"refresh_token": tokens.json()["refresh_token"]})
    assert renewed.status_code == 200
    again = await door.browser.post("/auth/token", data=form)
    assert (again.status_code, again.json()["error"]) == (400, "invalid_grant")


async def test_a_frontend_that_has_no_cookie_brings_the_verifier_of_its_challenge(door: Door) -> None:
    verifier = "a-verifier-as-rfc-7636-wants-it_0123456789.~"
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    for proof, status in (({"code_verifier": verifier}, 200), ({}, 400)):
        sent = await door.back("dan", redirect_uri=PAGE, code_challenge=challenge, code_challenge_method="S256")
        form = {"grant_type": "authorization_code", "code": dict(parse_qsl(urlsplit(sent.headers["location"]).query))["code"], **proof}
        async with web.client(base_url=door.browser.base_url, timeout=20, trust_env=False) as elsewhere:
            assert (await elsewhere.post("/auth/token", data=form)).status_code == status


async def test_a_browser_without_a_frontend_gets_the_tokens_themselves(door: Door) -> None:
    tokens = await door.back("bea")
    assert tokens.status_code == 200, tokens.text
    assert await _who(door, tokens.json()["access_token"]) == ("bea@netra.example", "early")
    assert "netra_oidc" not in dict(door.browser.cookies)


async def test_a_browser_that_did_not_begin_the_sign_in_cannot_end_it(door: Door) -> None:
    began = await door.browser.get("/auth/oidc/start", params={"provider": "corp"})
    back = await oidc.sign_in(began.headers["location"], "cleo", door.callback)
    async with web.client(timeout=20, trust_env=False) as other:
        refused = await other.get(door.callback, params=back)
    assert (refused.status_code, refused.json()["code"]) == (401, "UNAUTHENTICATED")
