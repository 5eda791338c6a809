"""Sign-in with a real outside provider: who becomes which user, and every way of cheating refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import grpc
import pytest

from chassis import channel, status
from netra import errors
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from tests.fixtures import oidc
from tests.fixtures.storage import ADMIN, Services

PAGE = "https://app.netra.example/signed-in?tab=1"


class Door:
    """The gateway's part: starts and ends sign-ins."""

    def __init__(self, services: Services, provider: oidc.Provider, other: oidc.Provider) -> None:
        self.services, self.provider, self.other = services, provider, other
        self.stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(services.channel("auth"))
        self._caller: channel.Metadata = ()

    async def gateway(self) -> channel.Metadata:
        """Metadata of the gateway's calls."""
        self._caller = self._caller or await self.services.service_token("gateway")
        return self._caller

    async def start(self, provider: str = "makes", redirect_uri: str = "") -> auth_pb2.StartOidcResponse:
        """Begin."""
        request = auth_pb2.StartOidcRequest(provider=provider, redirect_uri=redirect_uri, callback_uri=oidc.CALLBACK)
        return await self.stub.StartOidc(request, metadata=await self.gateway())

    async def finish(self, back: dict[str, str], binding: str) -> auth_pb2.FinishOidcResponse:
        """End."""
        request = auth_pb2.FinishOidcRequest(
            state=back.get("state", ""), code=back.get("code", ""), issuer=back.get("iss", ""), error=back.get("error", ""),
            binding=binding, device="a browser", client_address="192.0.2.7",
        )  # fmt: skip
        return await self.stub.FinishOidc(request, metadata=await self.gateway())

    async def signed_in(self, name: str, provider: str = "makes", redirect_uri: str = "") -> auth_pb2.FinishOidcResponse:
        """All of it."""
        began = await self.start(provider, redirect_uri)
        return await self.finish(await oidc.sign_in(began.authorization_url, name), began.binding)

    async def who(self, tokens: auth_pb2.Tokens) -> auth_pb2.GetPermissionsResponse:
        """Whom the tokens name."""
        return await self.stub.GetPermissions(auth_pb2.GetPermissionsRequest(), metadata=channel.bearer(tokens.access_token))

    async def refusal(self, back: dict[str, str], binding: str) -> errors.NetraError:
        """Why it was not ended."""
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self.finish(back, binding)
        return status.from_rpc(caught.value)


@pytest.fixture(scope="module")
def providers() -> Iterator[tuple[oidc.Provider, oidc.Provider]]:
    """Two providers, which remember nothing that matters to the next test."""
    with oidc.provider() as one, oidc.provider() as other:
        yield one, other


@pytest.fixture
async def door(services: Services, tmp_path: Path, providers: tuple[oidc.Provider, oidc.Provider]) -> Door:
    """Auth with three entries: one makes users and knows pages; one of the same provider links; the other provider knows nobody."""
    one, other = providers
    entries: dict[str, dict[str, Any]] = {
        "makes": one.entry(create_users=True, tier="early", redirects=[PAGE]),
        "links": one.entry(link_verified_email=True),
        "other": other.entry(create_users=True),
    }
    await services.auth(oidc_providers=oidc.write(tmp_path / "oidc.json", **entries))
    return Door(services, one, other)


async def test_a_person_becomes_a_user_and_stays_the_same_one(door: Door) -> None:
    first = await door.who((await door.signed_in("ada")).tokens)
    assert (first.email, first.principal.tier, list(first.principal.roles)) == ("ada@netra.example", "early", ["user"])
    again = await door.who((await door.signed_in("ada")).tokens)
    assert again.principal.user_id == first.principal.user_id
    assert again.principal.session_id != first.principal.session_id


async def test_a_frontend_gets_a_code_that_works_once(door: Door) -> None:
    finished = await door.signed_in("bea", redirect_uri=PAGE)
    assert not finished.HasField("tokens")
    assert finished.redirect_to.startswith(f"{PAGE}&code=nlc_")
    code = dict(parse_qsl(urlsplit(finished.redirect_to).query))["code"]
    request = auth_pb2.IssueTokenRequest(login_code=auth_pb2.LoginCodeGrant(code=code))
    assert (await door.who((await door.stub.IssueToken(request)).tokens)).email == "bea@netra.example"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.stub.IssueToken(request)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_an_existing_user_is_linked_only_where_the_operator_allows_it(door: Door) -> None:
    name = ADMIN.partition("@")[0]
    began = await door.start("makes")
    refused = await door.refusal(await oidc.sign_in(began.authorization_url, name), began.binding)
    assert isinstance(refused, errors.PermissionDenied)
    linked = await door.who((await door.signed_in(name, "links")).tokens)
    assert linked.email == ADMIN


@pytest.mark.parametrize(("name", "provider"), [("unverified-cleo", "makes"), ("dan", "links")])
async def test_somebody_unknown_or_unverified_stays_outside(door: Door, name: str, provider: str) -> None:
    began = await door.start(provider)
    refused = await door.refusal(await oidc.sign_in(began.authorization_url, name), began.binding)
    assert isinstance(refused, errors.PermissionDenied)


async def test_an_answer_counts_once(door: Door) -> None:
    began = await door.start()
    back = await oidc.sign_in(began.authorization_url, "eve")
    await door.finish(back, began.binding)
    assert isinstance(await door.refusal(back, began.binding), errors.Unauthenticated)


async def test_a_code_does_not_fit_another_sign_in(door: Door) -> None:
    """The code of one sign-in with the state of another: its verifier and its nonce are others."""
    first, second = await door.start(), await door.start()
    stolen = await oidc.sign_in(first.authorization_url, "fay")
    state = dict(parse_qsl(urlsplit(second.authorization_url).query))["state"]
    assert isinstance(await door.refusal({**stolen, "state": state}, second.binding), errors.Unauthenticated)


@pytest.mark.parametrize("change", [{"state": "a" * 43}, {"state": ""}, {"iss": ""}, {"code": ""}, {"error": "access_denied", "code": ""}])
async def test_an_answer_that_is_not_whole_is_refused(door: Door, change: dict[str, str]) -> None:
    began = await door.start()
    back = await oidc.sign_in(began.authorization_url, "gil")
    assert isinstance(await door.refusal({**back, **change}, began.binding), errors.Unauthenticated)


async def test_the_answer_of_another_provider_is_refused(door: Door) -> None:
    """Issuer mix-up (RFC 9207): the browser was led to another provider, and comes back with our state."""
    began, elsewhere = await door.start("makes"), await door.start("other")
    back = await oidc.sign_in(elsewhere.authorization_url, "hal")
    state = dict(parse_qsl(urlsplit(began.authorization_url).query))["state"]
    assert back["iss"] == door.other.issuer
    assert isinstance(await door.refusal({**back, "state": state}, began.binding), errors.Unauthenticated)


async def test_a_sign_in_belongs_to_the_browser_that_began_it(door: Door) -> None:
    began, other = await door.start(), await door.start()
    back = await oidc.sign_in(began.authorization_url, "ida")
    assert isinstance(await door.refusal(back, other.binding), errors.Unauthenticated)
    # and is spent by the attempt
    assert isinstance(await door.refusal(back, began.binding), errors.Unauthenticated)


@pytest.mark.parametrize("page", ["https://app.netra.example/signed-in", "https://evil.example/", f"{PAGE}.evil", f"{PAGE}#x"])
async def test_a_sign_in_ends_at_no_page_but_those_listed(door: Door, page: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.start(redirect_uri=page)
    assert status.from_rpc(caught.value).details["field"] == "redirect_uri"


async def test_only_the_gateway_carries_sign_ins(door: Door) -> None:
    user = await door.services.user()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.stub.StartOidc(auth_pb2.StartOidcRequest(provider="makes"), metadata=user.bearer)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
