"""A service finds an active user of a tenant for another user of it; nobody else is there."""

from __future__ import annotations

from typing import Any

from netra import ids
from netra.auth.v1 import auth_pb2
from tests.fixtures.accounts import Accounts, new_email, refused


async def _tenant(accounts: Accounts) -> str:
    found = await accounts.verified((await accounts.admin())[0][1].removeprefix("Bearer "))
    return found.principal.tenant_id


async def test_an_active_user_of_the_tenant_is_found_by_id_and_by_address_in_any_case(accounts: Accounts) -> None:
    user, tenant_id = await accounts.services.user(), await _tenant(accounts)
    context = await accounts.services.service_token("context")
    ways: tuple[dict[str, str], ...] = ({"user_id": user.user_id}, {"email": user.email}, {"email": f" {user.email.upper()} "})
    for named in ways:
        request = auth_pb2.ResolveUserRequest(tenant_id=tenant_id, **named)
        assert (await accounts.stub.ResolveUser(request, metadata=context)).user_id == user.user_id


async def test_a_foreign_a_disabled_and_an_unknown_user_get_one_answer(accounts: Accounts) -> None:
    tenant_id, context = await _tenant(accounts), await accounts.services.service_token("context")
    foreign, disabled = await accounts.foreign_admin(), await accounts.services.user()
    await accounts.stub.DisableUser(auth_pb2.DisableUserRequest(user_id=disabled.user_id), metadata=await accounts.admin())
    by_id = [foreign.user_id, disabled.user_id, ids.UserId.new()]
    by_email = [foreign.email, disabled.email, new_email()]
    named: list[dict[str, Any]] = [*({"user_id": each} for each in by_id), *({"email": each} for each in by_email)]
    answers = []
    for each in named:
        request = auth_pb2.ResolveUserRequest(tenant_id=tenant_id, **each)
        error = await refused(accounts.stub.ResolveUser(request, metadata=context))
        answers.append((error.code, error.message, error.details["field"]))
    assert len(set(answers[:3])) == 1
    assert len(set(answers[3:])) == 1
    assert {(code, field) for code, _, field in answers} == {("NOT_FOUND", "user_id"), ("NOT_FOUND", "email")}
    # the one who is foreign here is found in their own tenant
    own = (await accounts.verified(foreign.token)).principal.tenant_id
    request = auth_pb2.ResolveUserRequest(tenant_id=own, email=foreign.email)
    assert (await accounts.stub.ResolveUser(request, metadata=context)).user_id == foreign.user_id


async def test_users_and_other_services_do_not_look_people_up(accounts: Accounts) -> None:
    tenant_id, user = await _tenant(accounts), await accounts.services.user()
    request = auth_pb2.ResolveUserRequest(tenant_id=tenant_id, user_id=user.user_id)
    for metadata in (user.bearer, await accounts.admin(), await accounts.services.service_token("dispatcher")):
        assert (await refused(accounts.stub.ResolveUser(request, metadata=metadata))).code == "PERMISSION_DENIED"
    assert (await refused(accounts.stub.ResolveUser(request))).code == "UNAUTHENTICATED"


async def test_what_cannot_be_a_user_is_refused_by_field(accounts: Accounts) -> None:
    tenant_id, context = await _tenant(accounts), await accounts.services.service_token("context")
    wrong: tuple[tuple[dict[str, str], str], ...] = (
        ({"tenant_id": "x", "email": new_email()}, "tenant_id"),
        ({"tenant_id": tenant_id, "user_id": "x"}, "user_id"),
        ({"tenant_id": tenant_id, "email": "no address"}, "email"),
        ({"tenant_id": tenant_id}, "email"),
    )
    for fields, field in wrong:
        error = await refused(accounts.stub.ResolveUser(auth_pb2.ResolveUserRequest(**fields), metadata=context))
        assert (error.code, error.details["field"]) == ("INVALID_PAYLOAD", field)
