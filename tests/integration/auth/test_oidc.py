"""Sign-in with a real outside provider: who becomes which user, and every way of cheating refused."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import grpc
import pytest

from chassis import channel, status
from netra import errors, ids
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from services.auth import callers, throttle
from standalone import prepare
from tests.fixtures import oidc
from tests.fixtures.accounts import Accounts, refused
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import ADMIN, Services

TENANT = ids.uuid7()
PAGE = "https://app.netra.example/signed-in?tab=1"


class Door:
    """The gateway's part: starts and ends sign-ins."""

    def __init__(self, accounts: Accounts, provider: oidc.Provider, other: oidc.Provider) -> None:
        self.accounts, self.services, self.provider, self.other = accounts, accounts.services, provider, other
        self.stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(accounts.services.channel("auth"))
        self._caller: channel.Metadata = ()

    async def gateway(self) -> channel.Metadata:
        """Metadata of the gateway's calls."""
        self._caller = self._caller or await self.services.service_token("gateway")
        return self._caller

    async def start(self, provider: str = "makes", redirect_uri: str = "", challenge: str = "") -> auth_pb2.StartOidcResponse:
        """Begin."""
        request = auth_pb2.StartOidcRequest(
            provider=provider, redirect_uri=redirect_uri, callback_uri=oidc.CALLBACK, code_challenge=challenge
        )  # fmt: skip
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

    async def code(self, name: str, challenge: str = "") -> tuple[str, str]:
        """A one-time code, and the binding of the browser that has it."""
        began = await self.start(redirect_uri=PAGE, challenge=challenge)
        finished = await self.finish(await oidc.sign_in(began.authorization_url, name), began.binding)
        return dict(parse_qsl(urlsplit(finished.redirect_to).query))["code"], began.binding

    async def redeem(self, code: str, **more: str) -> auth_pb2.Tokens:
        """The tokens for a code."""
        grant = auth_pb2.LoginCodeGrant(code=code, **more)
        return (await self.stub.IssueToken(auth_pb2.IssueTokenRequest(login_code=grant))).tokens

    async def ready(self, name: str, provider: str) -> auth_pb2.FinishOidcRequest:
        """All of it but the last step."""
        began = await self.start(provider)
        back = await oidc.sign_in(began.authorization_url, name)
        return auth_pb2.FinishOidcRequest(state=back["state"], code=back["code"], issuer=back["iss"], binding=began.binding)

    async def person(self, name: str, tier: str = "free", role: str = "user", tenant_id: str = "") -> str:
        """A user whom an administrator made, with the address of somebody at the provider."""
        wanted = auth_pb2.CreateUserRequest(email=f"{name}@netra.example", password="a good password", roles=[role], tier=tier)
        user_id = (await self.stub.CreateUser(wanted, metadata=await self.accounts.admin())).user_id
        if tenant_id:
            async with self.accounts.database() as owner:
                await owner.execute("UPDATE auth.users SET tenant_id = $2 WHERE user_id = $1", user_id, tenant_id)
        return user_id

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
async def door(
    services: Services, tmp_path: Path, providers: tuple[oidc.Provider, oidc.Provider], stores: Standalone, database: str
) -> Door:
    """Auth with entries of one provider, of which one makes users and knows pages and the others link, and one of another provider."""
    one, other = providers
    entries: dict[str, dict[str, Any]] = {
        "makes": one.entry(create_users=True, tier="early", redirects=[PAGE]),
        "links": one.entry(link_verified_email=True),
        "links-all": one.entry(link_verified_email=True, link_admins=True),
        "of-a-tenant": one.entry(link_verified_email=True, link_admins=True, tenant_id=TENANT),
        "other": other.entry(create_users=True),
    }
    await services.auth(oidc_providers=oidc.write(tmp_path / "oidc.json", **entries))
    return Door(Accounts(services, prepare.on_database(stores.postgres_admin_url, database)), one, other)


async def test_a_person_becomes_a_user_and_stays_the_same_one(door: Door) -> None:
    first = await door.who((await door.signed_in("ada")).tokens)
    assert (first.email, first.principal.tier, list(first.principal.roles)) == ("ada@netra.example", "early", ["user"])
    again = await door.who((await door.signed_in("ada")).tokens)
    assert again.principal.user_id == first.principal.user_id
    assert again.principal.session_id != first.principal.session_id


async def test_a_frontend_gets_a_code_that_works_once(door: Door) -> None:
    began = await door.start(redirect_uri=PAGE)
    finished = await door.finish(await oidc.sign_in(began.authorization_url, "bea"), began.binding)
    assert not finished.HasField("tokens")
    assert finished.redirect_to.startswith(f"{PAGE}&code=nlc_")
    code = dict(parse_qsl(urlsplit(finished.redirect_to).query))["code"]
    request = auth_pb2.IssueTokenRequest(login_code=auth_pb2.LoginCodeGrant(code=code, binding=began.binding))
    assert (await door.who((await door.stub.IssueToken(request)).tokens)).email == "bea@netra.example"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await door.stub.IssueToken(request)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_an_existing_user_is_linked_only_where_the_operator_allows_it(door: Door) -> None:
    await door.person("jo")
    began = await door.start("makes")
    found = await door.refusal(await oidc.sign_in(began.authorization_url, "jo"), began.binding)
    assert isinstance(found, errors.PermissionDenied)
    linked = await door.who((await door.signed_in("jo", "links")).tokens)
    assert linked.email == "jo@netra.example"


async def test_administrators_are_linked_only_where_the_operator_says_so_of_them(door: Door) -> None:
    name = ADMIN.partition("@")[0]
    assert isinstance(await refused(door.signed_in(name, "links")), errors.PermissionDenied)
    assert await door.accounts.value("SELECT count(*) FROM auth.identities") == 0
    linked = await door.who((await door.signed_in(name, "links-all")).tokens)
    assert linked.email == ADMIN


async def test_a_provider_of_one_tenant_lets_nobody_in_as_a_user_of_another(door: Door) -> None:
    await door.person("kim", tenant_id=ids.uuid7())
    assert isinstance(await refused(door.signed_in("kim", "of-a-tenant")), errors.PermissionDenied)
    assert await door.accounts.value("SELECT count(*) FROM auth.identities") == 0
    mine = await door.person("lee", tenant_id=TENANT)
    assert (await door.signed_in("lee", "of-a-tenant")).tokens.user_id == mine


async def test_whoever_moved_to_another_tenant_is_not_let_in_by_the_provider_of_the_old_one(door: Door) -> None:
    user_id = await door.person("mia", tenant_id=TENANT)
    await door.signed_in("mia", "of-a-tenant")
    async with door.accounts.database() as owner:
        await owner.execute("UPDATE auth.users SET tenant_id = gen_random_uuid() WHERE user_id = $1", user_id)
    assert isinstance(await refused(door.signed_in("mia", "of-a-tenant")), errors.PermissionDenied)


async def test_whoever_is_disabled_is_not_linked(door: Door) -> None:
    user_id = await door.person("nat")
    request = auth_pb2.DisableUserRequest(user_id=user_id)
    await door.stub.DisableUser(request, metadata=await door.accounts.admin())
    assert isinstance(await refused(door.signed_in("nat", "links")), errors.PermissionDenied)
    assert await door.accounts.value("SELECT count(*) FROM auth.identities") == 0


async def test_a_code_is_good_for_the_browser_that_began_the_sign_in_alone(door: Door) -> None:
    """Somebody who is led to another's code is not signed in as them; a code that leaked is worth nothing."""
    (code, binding), (leaked, _) = await door.code("oda"), await door.code("oda")
    other = (await door.start(redirect_uri=PAGE)).binding
    for proof in ({}, {"binding": other}, {"code_verifier": other}):
        assert isinstance(await refused(door.redeem(leaked, **proof)), errors.Unauthenticated)
    assert (await door.who(await door.redeem(code, binding=binding))).email == "oda@netra.example"


async def test_a_code_is_good_for_the_frontend_that_brings_its_verifier_alone(door: Door) -> None:
    verifier = "a-verifier-as-rfc-7636-wants-it_0123456789.~"
    challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
    for wrong in ({}, {"code_verifier": verifier[:-1] + "x"}, {"code_verifier": challenge}):
        code, _ = await door.code("pia", challenge)
        assert isinstance(await refused(door.redeem(code, **wrong)), errors.Unauthenticated)
        # and is spent by the attempt
        assert isinstance(await refused(door.redeem(code, code_verifier=verifier)), errors.Unauthenticated)
    code, binding = await door.code("pia", challenge)
    assert isinstance(await refused(door.redeem(code, binding=binding)), errors.Unauthenticated)
    code, binding = await door.code("pia", challenge)
    assert (await door.redeem(code, code_verifier=verifier, binding=binding)).access_token


@pytest.mark.parametrize("challenge", ["x", "a" * 42, "a" * 44, "ä" * 43, "+" * 43, "a" * 42 + "="])
async def test_what_is_no_challenge_is_refused(door: Door, challenge: str) -> None:
    assert (await refused(door.start(redirect_uri=PAGE, challenge=challenge))).details["field"] == "code_challenge"


async def test_a_new_password_ends_codes_that_nobody_has_redeemed(door: Door) -> None:
    code, binding = await door.code("quin")
    user_id = await door.accounts.value("SELECT user_id FROM auth.users WHERE email = 'quin@netra.example'")
    made = auth_pb2.CreateResetTokenRequest(user_id=str(user_id))
    async with door.accounts.database() as owner:
        tenant_id = await owner.value("SELECT tenant_id FROM auth.users WHERE email = $1", ADMIN)
        await owner.execute("UPDATE auth.users SET tenant_id = $2 WHERE user_id = $1", user_id, tenant_id)
    token = (await door.stub.CreateResetToken(made, metadata=await door.accounts.admin())).reset_token
    await door.stub.ResetPassword(auth_pb2.ResetPasswordRequest(reset_token=token, new_password="another good password"))
    assert isinstance(await refused(door.redeem(code, binding=binding)), errors.Unauthenticated)


@pytest.mark.parametrize("known", [False, True], ids=["made", "linked"])
async def test_of_first_sign_ins_at_the_same_time_each_is_let_in_as_the_same_user(door: Door, known: bool) -> None:
    if known:
        await door.person("ray")
    requests = [await door.ready("ray", "links" if known else "makes") for _ in range(3)]
    role, statement = ("netra_auth_system", "INSERT INTO auth.identities") if known else ("netra_auth", "INSERT INTO auth.users")
    async with asyncio.TaskGroup() as group:
        async with door.accounts.locked():
            calls = [group.create_task(_finished(door, request)) for request in requests]
            # one has done it and waits for the record, the others for what it has done
            await door.accounts.until_waiting(2, role, statement)
    assert len({call.result() for call in calls}) == 1
    assert await door.accounts.value("SELECT count(*) FROM auth.identities") == 1


async def _finished(door: Door, request: auth_pb2.FinishOidcRequest) -> str:
    return (await door.stub.FinishOidc(request, metadata=await door.gateway())).tokens.user_id


async def test_a_first_sign_in_that_is_cut_off_leaves_nothing_behind(door: Door) -> None:
    async with door.accounts.database() as owner:
        await owner.execute("ALTER TABLE auth.identities ADD CONSTRAINT cut_off CHECK (false) NOT VALID")
        with pytest.raises(grpc.aio.AioRpcError):
            await door.signed_in("sue")
        await owner.execute("ALTER TABLE auth.identities DROP CONSTRAINT cut_off")
    assert await door.accounts.value("SELECT count(*) FROM auth.users WHERE email = 'sue@netra.example'") == 0
    assert (await door.signed_in("sue")).tokens.access_token


async def test_answers_that_are_refused_fill_no_record(door: Door) -> None:
    began = [await door.start() for _ in range(10)]
    (budget,) = throttle.unguessable("oidc", callers.Origin("192.0.2.7"))
    async with door.accounts.counting() as counted:
        await counted.take(*budget.counted, cost=budget.burst)
    codes: Counter[str] = Counter()
    for each in began:
        state = dict(parse_qsl(urlsplit(each.authorization_url).query))["state"]
        codes[(await door.refusal({"state": state, "error": "access_denied", "iss": door.provider.issuer}, each.binding)).code] += 1
    assert codes["RATE_LIMITED"] >= 1
    recorded = "SELECT count(*) FROM auth.audit WHERE action = 'login' AND outcome = 'refused'"
    assert await door.accounts.value(recorded) == codes["UNAUTHENTICATED"]


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
