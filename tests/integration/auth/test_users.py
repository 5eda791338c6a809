"""Administrators make, see, change and stop the users of their tenant."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from chassis import channel
from netra import ids
from netra.auth.v1 import auth_pb2
from tests.fixtures.accounts import Accounts, new_email, refused

_SOME_HASH = "$argon2id$"


def _wanted(**more: Any) -> auth_pb2.CreateUserRequest:
    return auth_pb2.CreateUserRequest(**{"email": new_email(), "password": "a good password"} | more)


class TestCreate:
    """Administrators make users, in their own tenant."""

    async def test_a_new_user_signs_in_with_the_least_unless_told_otherwise(self, accounts: Accounts) -> None:
        admin = await accounts.admin()
        least, more = _wanted(), _wanted(roles=["readonly", "admin"], tier="mid")
        made = [(await accounts.stub.CreateUser(wanted, metadata=admin)).user_id for wanted in (least, more)]
        told = [await accounts.verified((await accounts.login(wanted.email, wanted.password)).access_token) for wanted in (least, more)]
        assert [answer.principal.user_id for answer in told] == made
        assert [(list(answer.principal.roles), answer.principal.tier) for answer in told] == [
            (["user"], "free"), (["admin", "readonly"], "business"),
        ]  # fmt: skip
        own = await accounts.verified(admin[0][1].removeprefix("Bearer "))
        assert {answer.principal.tenant_id for answer in told} == {own.principal.tenant_id}

    @pytest.mark.parametrize("role", ["user", "readonly"])
    async def test_only_administrators_may(self, accounts: Accounts, role: str) -> None:
        user, wanted = await accounts.services.user(role=role), _wanted()
        assert (await refused(accounts.stub.CreateUser(wanted, metadata=user.bearer))).code == "PERMISSION_DENIED"
        assert (await refused(accounts.stub.CreateUser(wanted))).code == "UNAUTHENTICATED"
        assert (await refused(accounts.login(wanted.email, wanted.password))).code == "UNAUTHENTICATED"

    async def test_an_address_belongs_to_one_user_in_any_case(self, accounts: Accounts) -> None:
        admin, wanted = await accounts.admin(), _wanted()
        await accounts.stub.CreateUser(wanted, metadata=admin)
        taken = _wanted(email=wanted.email.upper(), password="another password")
        found = await refused(accounts.stub.CreateUser(taken, metadata=admin))
        assert (found.code, found.details["field"]) == ("ALREADY_EXISTS", "email")
        await accounts.login(wanted.email, wanted.password)

    @pytest.mark.parametrize(
        ("more", "field"),
        [
            ({"email": "no address"}, "email"),
            ({"password": "x" * 11}, "password"),
            ({"password": "x" * 1025}, "password"),
            ({"roles": ["god"]}, "roles"),
            ({"tier": "gold"}, "tier"),
        ],
    )
    async def test_a_wrong_field_is_named(self, accounts: Accounts, more: dict[str, Any], field: str) -> None:
        found = await refused(accounts.stub.CreateUser(_wanted(**more), metadata=await accounts.admin()))
        assert (found.code, found.details["field"]) == ("INVALID_PAYLOAD", field)

    async def test_an_invited_user_sets_the_first_password_once(self, accounts: Accounts) -> None:
        wanted = _wanted(password="")
        made = await accounts.stub.CreateUser(wanted, metadata=await accounts.admin())
        assert made.reset_token.startswith("nrs_")
        await accounts.later(made.user_id, 6 * 86400)
        assert (await refused(accounts.login(wanted.email, ""))).code == "UNAUTHENTICATED"
        request = auth_pb2.ResetPasswordRequest(reset_token=made.reset_token, new_password="my first password")
        await accounts.stub.ResetPassword(request)
        assert (await accounts.login(wanted.email, "my first password")).user_id == made.user_id
        assert (await refused(accounts.stub.ResetPassword(request))).code == "UNAUTHENTICATED"

    async def test_an_invitation_ends(self, accounts: Accounts) -> None:
        made = await accounts.stub.CreateUser(_wanted(password=""), metadata=await accounts.admin())
        await accounts.later(made.user_id, 8 * 86400)
        request = auth_pb2.ResetPasswordRequest(reset_token=made.reset_token, new_password="my first password")
        assert (await refused(accounts.stub.ResetPassword(request))).code == "UNAUTHENTICATED"


class TestRead:
    """Administrators see the users of their tenant, and it is recorded that they looked."""

    async def test_a_user_is_shown_without_any_secret(self, accounts: Accounts) -> None:
        admin, user = await accounts.admin(), await accounts.services.user(tier="early")
        found = (await accounts.stub.GetUser(auth_pb2.GetUserRequest(user_id=user.user_id), metadata=admin)).user
        assert (found.user_id, found.email, list(found.roles), found.tier, found.version) == (
            user.user_id,
            user.email,
            ["user"],
            "early",
            1,
        )
        assert found.HasField("created_at")
        assert not found.HasField("disabled_at")
        assert _SOME_HASH not in str(found)
        assert (await accounts.audited(user.user_id))[-1][1:] == ("get_user", "ok")

    async def test_pages_go_from_the_newest_to_the_oldest(self, accounts: Accounts) -> None:
        admin = await accounts.admin()
        made = [(await accounts.stub.CreateUser(_wanted(email=f"page{n}@x.example"), metadata=admin)).user_id for n in range(5)]
        seen: list[str] = []
        token = ""
        for size in (2, 2, 1):
            request = auth_pb2.ListUsersRequest(page_size=2, page_token=token, email_contains="PAGE")
            page = await accounts.stub.ListUsers(request, metadata=admin)
            assert len(page.users) == size
            seen += [user.user_id for user in page.users]
            token = page.next_page_token
        assert seen == made[::-1]
        assert token == ""
        query = "SELECT count(*) FROM auth.audit WHERE action = 'list_users' AND tenant_id IS NOT NULL"
        assert await accounts.value(query) == 3

    async def test_a_percent_sign_is_no_wildcard(self, accounts: Accounts) -> None:
        request = auth_pb2.ListUsersRequest(email_contains="%")
        assert not (await accounts.stub.ListUsers(request, metadata=await accounts.admin())).users

    @pytest.mark.parametrize("more", [{"page_size": 201}, {"page_size": -1}, {"page_token": "?"}, {"page_token": "eHg="}])
    async def test_what_is_no_page_is_refused(self, accounts: Accounts, more: dict[str, Any]) -> None:
        found = await refused(accounts.stub.ListUsers(auth_pb2.ListUsersRequest(**more), metadata=await accounts.admin()))
        assert (found.code, found.details["field"]) == ("INVALID_PAYLOAD", next(iter(more)))

    async def test_nobody_sees_or_touches_another_tenant(self, accounts: Accounts) -> None:
        user, foreign = await accounts.services.user(), await accounts.foreign_admin()
        listed = await accounts.stub.ListUsers(auth_pb2.ListUsersRequest(), metadata=foreign.bearer)
        assert [each.user_id for each in listed.users] == [foreign.user_id]
        stub, name = accounts.stub, user.user_id
        calls = (
            stub.GetUser(auth_pb2.GetUserRequest(user_id=name), metadata=foreign.bearer),
            stub.UpdateUser(auth_pb2.UpdateUserRequest(user_id=name, tier="free"), metadata=foreign.bearer),
            stub.DisableUser(auth_pb2.DisableUserRequest(user_id=name), metadata=foreign.bearer),
            stub.EnableUser(auth_pb2.EnableUserRequest(user_id=name), metadata=foreign.bearer),
            stub.CreateResetToken(auth_pb2.CreateResetTokenRequest(user_id=name), metadata=foreign.bearer),
            stub.GetUser(auth_pb2.GetUserRequest(user_id=ids.uuid7()), metadata=foreign.bearer),
        )
        assert {(await refused(call)).code for call in calls} == {"NOT_FOUND"}
        assert (await accounts.verified(user.token)).valid


class TestUpdate:
    """Roles and tiers change; fewer rights count at once."""

    async def _update(self, accounts: Accounts, user_id: str, **more: Any) -> auth_pb2.User:
        request = auth_pb2.UpdateUserRequest(user_id=user_id, **more)
        return (await accounts.stub.UpdateUser(request, metadata=await accounts.admin())).user

    async def test_more_rights_come_with_the_next_token(self, accounts: Accounts) -> None:
        user = await accounts.services.user(role="readonly", tier="free")
        changed = await self._update(accounts, user.user_id, roles=["user"], tier="mid")
        assert (list(changed.roles), changed.tier, changed.version) == (["user"], "business", 2)
        assert (await accounts.verified(user.token)).valid
        fresh = await accounts.verified((await accounts.refresh(user.refresh_token)).access_token)
        assert (list(fresh.principal.roles), fresh.principal.tier) == (["user"], "business")

    @pytest.mark.parametrize("more", [{"roles": ["readonly"]}, {"tier": "free"}])
    async def test_fewer_rights_end_the_sessions(self, accounts: Accounts, more: dict[str, Any]) -> None:
        user = await accounts.services.user(tier="business")
        await self._update(accounts, user.user_id, **more)
        assert not (await accounts.verified(user.token)).valid
        assert (await refused(accounts.refresh(user.refresh_token))).code == "UNAUTHENTICATED"
        # runs go on: nothing was done that is wrong
        assert not await accounts.value("SELECT bool_or(security) FROM auth.revocations")

    async def test_nothing_to_change_changes_nothing(self, accounts: Accounts) -> None:
        user = await accounts.services.user(tier="business")
        assert (await self._update(accounts, user.user_id)).version == 1
        assert (await self._update(accounts, user.user_id, roles=["user"], tier="business")).version == 1

    async def test_all_of_many_changes_at_once_count(self, accounts: Accounts) -> None:
        user, admin = await accounts.services.user(tier="free"), await accounts.admin()
        tiers = ("early", "business", "enterprise")
        requests = [auth_pb2.UpdateUserRequest(user_id=user.user_id, tier=tier) for tier in tiers]
        answers = await asyncio.gather(*(accounts.stub.UpdateUser(request, metadata=admin) for request in requests))
        assert sorted(answer.user.version for answer in answers) == [2, 3, 4]

    async def test_administrators_keep_their_own_role(self, accounts: Accounts) -> None:
        admin = await accounts.services.user(role="admin")
        request = auth_pb2.UpdateUserRequest(user_id=admin.user_id, roles=["user"])
        assert (await refused(accounts.stub.UpdateUser(request, metadata=admin.bearer))).code == "FAILED_PRECONDITION"


class TestDisable:
    """A user who is stopped is stopped everywhere at once."""

    async def test_everything_they_have_ends(self, accounts: Accounts) -> None:
        admin, user = await accounts.admin(), await accounts.services.user()
        second = await accounts.login(user.email, user.password)
        reset = await accounts.stub.CreateResetToken(auth_pb2.CreateResetTokenRequest(user_id=user.user_id), metadata=admin)
        request = auth_pb2.DisableUserRequest(user_id=user.user_id, reason="left the company")
        disabled = (await accounts.stub.DisableUser(request, metadata=admin)).user
        assert disabled.HasField("disabled_at")
        assert [(await accounts.verified(token)).valid for token in (user.token, second.access_token)] == [False, False]
        assert (await refused(accounts.refresh(user.refresh_token))).code == "UNAUTHENTICATED"
        assert (await refused(accounts.login(user.email, user.password))).code == "UNAUTHENTICATED"
        used = auth_pb2.ResetPasswordRequest(reset_token=reset.reset_token, new_password="another password")
        assert (await refused(accounts.stub.ResetPassword(used))).code == "UNAUTHENTICATED"
        query = "SELECT array_agg(coalesce(user_id::text, 'session') ORDER BY user_id NULLS LAST) FROM auth.revocations WHERE security"
        assert await accounts.value(query) == [user.user_id, "session", "session"]
        assert (await accounts.value("SELECT detail FROM auth.audit WHERE action = 'disable_user'")).endswith("left the company")

    async def test_twice_is_as_good_as_once_and_enabling_lets_them_in_again(self, accounts: Accounts) -> None:
        admin, user = await accounts.admin(), await accounts.services.user()
        for _ in range(2):
            await accounts.stub.DisableUser(auth_pb2.DisableUserRequest(user_id=user.user_id), metadata=admin)
        assert await accounts.value("SELECT count(*) FROM auth.audit WHERE action = 'disable_user'") == 1
        for _ in range(2):
            enabled = (await accounts.stub.EnableUser(auth_pb2.EnableUserRequest(user_id=user.user_id), metadata=admin)).user
            assert not enabled.HasField("disabled_at")
        # what ended does not live again, what begins now is believed at once
        assert not (await accounts.verified(user.token)).valid
        tokens = await accounts.login(user.email, user.password)
        await accounts.stub.ListSessions(auth_pb2.ListSessionsRequest(), metadata=channel.bearer(tokens.access_token))

    async def test_administrators_do_not_stop_themselves(self, accounts: Accounts) -> None:
        admin = await accounts.services.user(role="admin")
        request = auth_pb2.DisableUserRequest(user_id=admin.user_id)
        assert (await refused(accounts.stub.DisableUser(request, metadata=admin.bearer))).code == "FAILED_PRECONDITION"

    async def test_a_sign_in_at_the_same_time_leaves_nothing_behind(self, accounts: Accounts) -> None:
        admin = await accounts.admin()
        for _ in range(5):
            user = await accounts.services.user()
            request = auth_pb2.DisableUserRequest(user_id=user.user_id)
            results = await asyncio.gather(
                *(accounts.login(user.email, user.password) for _ in range(4)),
                accounts.stub.DisableUser(request, metadata=admin), return_exceptions=True,
            )  # fmt: skip
            tokens = [each.access_token for each in results if isinstance(each, auth_pb2.Tokens)]
            assert [(await accounts.verified(token)).valid for token in tokens] == [False] * len(tokens)
            live = "SELECT count(*) FROM auth.sessions WHERE user_id = $1 AND ended_at IS NULL"
            assert await accounts.value(live, user.user_id) == 0
