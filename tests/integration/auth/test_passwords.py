"""Passwords are changed by those who know them, and reset by those whom an administrator trusts; guessing does not pay."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from chassis import channel
from netra.auth.v1 import auth_pb2
from tests.fixtures.accounts import Accounts, new_email, refused
from tests.fixtures.users import User

NEW = "another good password"


class TestChange:
    """The user knows the present one."""

    async def _change(self, accounts: Accounts, user: User, current: str, new: str = NEW, **more: Any) -> int:
        request = auth_pb2.ChangePasswordRequest(current_password=current, new_password=new, **more)
        return (await accounts.stub.ChangePassword(request, metadata=user.bearer)).sessions_ended

    async def test_the_new_one_counts_and_the_other_sessions_end(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        others = [await accounts.login(user.email, user.password) for _ in range(2)]
        assert await self._change(accounts, user, user.password) == 2
        assert [(await accounts.verified(each.access_token)).valid for each in others] == [False, False]
        assert (await accounts.verified(user.token)).valid
        assert (await refused(accounts.login(user.email, user.password))).code == "UNAUTHENTICATED"
        assert (await accounts.login(user.email, NEW)).user_id == user.user_id
        assert not await accounts.value("SELECT bool_or(security) FROM auth.revocations")

    async def test_on_request_it_is_for_reasons_of_security(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        await accounts.login(user.email, user.password)
        assert await self._change(accounts, user, user.password, cancel_runs=True) == 1
        assert await accounts.value("SELECT bool_and(security) FROM auth.revocations")

    async def test_the_present_one_must_be_right(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        request = auth_pb2.ChangePasswordRequest(current_password="not the password", new_password=NEW)
        found = await refused(accounts.stub.ChangePassword(request, metadata=user.bearer))
        assert (found.code, found.details["field"]) == ("INVALID_PAYLOAD", "current_password")
        assert await accounts.login(user.email, user.password)
        assert ("anonymous", "change_password", "refused") in await accounts.audited(user.user_id)

    async def test_a_thief_with_a_token_does_not_guess_the_password(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        request = auth_pb2.ChangePasswordRequest(current_password="not the password", new_password=NEW)
        codes = [(await refused(accounts.stub.ChangePassword(request, metadata=user.bearer))).code for _ in range(8)]
        assert codes == ["INVALID_PAYLOAD"] * 5 + ["RATE_LIMITED"] * 3

    @pytest.mark.parametrize("new", ["", "x" * 11, "x" * 1025])
    async def test_a_new_one_that_cannot_be_is_named(self, accounts: Accounts, new: str) -> None:
        user = await accounts.services.user()
        request = auth_pb2.ChangePasswordRequest(current_password=user.password, new_password=new)
        found = await refused(accounts.stub.ChangePassword(request, metadata=user.bearer))
        assert (found.code, found.details["field"]) == ("INVALID_PAYLOAD", "new_password")

    async def test_of_two_changes_at_once_one_counts(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        answers = await asyncio.gather(
            *(self._change(accounts, user, user.password, f"{NEW} {n}") for n in range(4)), return_exceptions=True
        )  # fmt: skip
        won = [number for number, answer in enumerate(answers) if isinstance(answer, int)]
        assert len(won) == 1
        await accounts.login(user.email, f"{NEW} {won[0]}")


class TestReset:
    """An administrator lets the user set a new one."""

    async def _token(self, accounts: Accounts, user: User) -> auth_pb2.CreateResetTokenResponse:
        request = auth_pb2.CreateResetTokenRequest(user_id=user.user_id)
        return await accounts.stub.CreateResetToken(request, metadata=await accounts.admin())

    async def _reset(self, accounts: Accounts, token: str, new: str = NEW) -> None:
        await accounts.stub.ResetPassword(auth_pb2.ResetPasswordRequest(reset_token=token, new_password=new))

    async def test_it_sets_the_password_once_and_ends_all_sessions(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        token = (await self._token(accounts, user)).reset_token
        await self._reset(accounts, token)
        assert not (await accounts.verified(user.token)).valid
        assert (await refused(accounts.login(user.email, user.password))).code == "UNAUTHENTICATED"
        fresh = await accounts.login(user.email, NEW)
        assert (await accounts.verified(fresh.access_token)).valid
        assert (await refused(self._reset(accounts, token, "a third good password"))).code == "UNAUTHENTICATED"

    async def test_of_many_at_once_one_wins(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        token = (await self._token(accounts, user)).reset_token
        answers = await asyncio.gather(*(self._reset(accounts, token, f"{NEW} {n}") for n in range(10)), return_exceptions=True)
        won = [number for number, answer in enumerate(answers) if answer is None]
        assert len(won) == 1
        await accounts.login(user.email, f"{NEW} {won[0]}")

    async def test_it_ends_after_an_hour_and_when_there_is_a_newer_one(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        first = (await self._token(accounts, user)).reset_token
        second = await self._token(accounts, user)
        assert (await refused(self._reset(accounts, first))).code == "UNAUTHENTICATED"
        await accounts.later(user.user_id, 3601)
        assert (await refused(self._reset(accounts, second.reset_token))).code == "UNAUTHENTICATED"
        assert (await accounts.login(user.email, user.password)).access_token

    async def test_a_password_that_cannot_be_uses_nothing_up(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        token = (await self._token(accounts, user)).reset_token
        found = await refused(self._reset(accounts, token, "short"))
        assert (found.code, found.details["field"]) == ("INVALID_PAYLOAD", "new_password")
        await self._reset(accounts, token)

    @pytest.mark.parametrize("token", ["", "nrs_" + "a" * 43, "nrt_" + "a" * 43, "x" * 5000])
    async def test_what_is_no_reset_token_is_refused(self, accounts: Accounts, token: str) -> None:
        assert (await refused(self._reset(accounts, token))).code == "UNAUTHENTICATED"

    @pytest.mark.parametrize("more", [{"roles": ["user"]}, {"tier": "enterprise"}])
    async def test_it_does_not_outlive_a_promotion_of_its_user(self, accounts: Accounts, more: dict[str, Any]) -> None:
        admin, user = await accounts.admin(), await accounts.services.user("readonly", "free")
        wanted = auth_pb2.CreateUserRequest(email=new_email(), roles=["readonly"])
        invited = await accounts.stub.CreateUser(wanted, metadata=admin)
        for user_id, token in (
            (user.user_id, (await self._token(accounts, user)).reset_token), (invited.user_id, invited.reset_token),
        ):  # fmt: skip
            await accounts.stub.UpdateUser(auth_pb2.UpdateUserRequest(user_id=user_id, **more), metadata=admin)
            assert (await refused(self._reset(accounts, token))).code == "UNAUTHENTICATED"

    @pytest.mark.parametrize("fate", ["disabled", "no administrator any more", "of a lower tier", "as before"])
    async def test_it_is_worth_no_more_than_who_made_it(self, accounts: Accounts, fate: str) -> None:
        admin, boss = await accounts.admin(), await accounts.services.user("admin", "business")
        user = await accounts.services.user("user", "business")
        reset = await accounts.stub.CreateResetToken(auth_pb2.CreateResetTokenRequest(user_id=user.user_id), metadata=boss.bearer)
        wanted = auth_pb2.CreateUserRequest(email=new_email(), tier="business")
        invited = await accounts.stub.CreateUser(wanted, metadata=boss.bearer)
        if fate == "disabled":
            await accounts.stub.DisableUser(auth_pb2.DisableUserRequest(user_id=boss.user_id), metadata=admin)
        elif fate != "as before":
            less: dict[str, Any] = {"tier": "free"} if fate == "of a lower tier" else {"roles": ["user"]}
            await accounts.stub.UpdateUser(auth_pb2.UpdateUserRequest(user_id=boss.user_id, **less), metadata=admin)
        for token in (reset.reset_token, invited.reset_token):
            if fate == "as before":
                await self._reset(accounts, token)
            else:
                assert (await refused(self._reset(accounts, token))).code == "UNAUTHENTICATED"
        assert (await accounts.verified(user.token)).valid == (fate != "as before")

    async def test_the_digest_is_all_that_is_kept(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        token = (await self._token(accounts, user)).reset_token
        kept = await accounts.value("SELECT token_digest FROM auth.reset_tokens WHERE user_id = $1", user.user_id)
        assert len(kept) == 32
        assert token.encode() not in kept


class TestGuessing:
    """Attempts that fail run out; the owner is still let in."""

    async def test_guesses_run_out_and_the_owner_signs_in_from_where_they_were_before(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        await accounts.login_from("192.0.2.1", user.email, user.password)
        codes = [(await refused(accounts.login_from("198.51.100.7", user.email, f"wrong {n}"))).code for n in range(30)]
        assert codes[:10] == ["UNAUTHENTICATED"] * 10
        assert set(codes[12:]) == {"RATE_LIMITED"}
        # the right password does not help the one who guessed
        assert (await refused(accounts.login_from("198.51.100.7", user.email, user.password))).code == "RATE_LIMITED"
        assert (await accounts.login_from("192.0.2.1", user.email, user.password)).access_token
        assert (await accounts.login_from("192.0.2.1", user.email, user.password, "another device")).access_token

    async def test_guesses_from_everywhere_do_not_lock_the_owner_out(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        await accounts.login_from("192.0.2.1", user.email, user.password)
        attempts = (accounts.login_from(f"198.51.100.{n}", user.email, "wrong") for n in range(70))
        codes = [(await refused(attempt)).code for attempt in attempts]
        assert codes.count("UNAUTHENTICATED") <= 52
        assert codes[-1] == "RATE_LIMITED"
        assert (await accounts.login_from("192.0.2.1", user.email, user.password)).access_token
        # somewhere new the owner has to wait, like everybody
        assert (await refused(accounts.login_from("203.0.113.1", user.email, user.password))).code == "RATE_LIMITED"

    async def test_the_answer_is_the_same_whether_or_not_there_is_such_a_user(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        stories = []
        for number, email in enumerate((user.email, "nobody@netra.example")):
            found = [await refused(accounts.login_from(f"198.51.100.{number}", email, f"wrong {n}")) for n in range(14)]
            assert all(error.retry_after_ms for error in found if error.code == "RATE_LIMITED")
            stories.append([(error.code, error.message, tuple(error.details)) for error in found])
        assert stories[0] == stories[1]

    async def test_many_at_once_gain_nothing(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        attempts = (accounts.login_from("198.51.100.7", user.email, f"wrong {n}") for n in range(40))
        answers = await asyncio.gather(*(refused(attempt) for attempt in attempts))
        assert len([error for error in answers if error.code == "UNAUTHENTICATED"]) <= 11

    async def test_a_flood_is_recorded_and_does_not_flood_the_record(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        for number in range(30):
            await refused(accounts.login_from("198.51.100.7", user.email, f"wrong {number}"))
        outcomes = [outcome for _, action, outcome in await accounts.audited(user.user_id) if action == "login"]
        assert outcomes.count("throttled") == 1
        assert 10 <= outcomes.count("refused") <= 12

    async def test_wrong_secrets_of_services_run_out_for_the_place_they_come_from(self, accounts: Accounts) -> None:
        grant = auth_pb2.ClientCredentialsGrant(client_id="events", client_secret="wrong")
        codes = [
            (await refused(accounts.stub.IssueToken(auth_pb2.IssueTokenRequest(client_credentials=grant)))).code for _ in range(64)
        ]  # fmt: skip
        assert codes[:60] == ["UNAUTHENTICATED"] * 60
        assert "RATE_LIMITED" in codes
        # another service at the same place does not suffer
        assert await accounts.services.service_token("context")

    async def test_a_known_device_is_forgotten_after_a_month(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        await accounts.login_from("192.0.2.1", user.email, user.password)
        await accounts.later(user.user_id, 31 * 86400)
        for number in range(12):
            await refused(accounts.login_from("192.0.2.1", user.email, f"wrong {number}"))
        assert (await refused(accounts.login_from("192.0.2.1", user.email, user.password))).code == "RATE_LIMITED"


async def test_passwords_and_tokens_are_nowhere_in_the_database(accounts: Accounts) -> None:
    user = await accounts.services.user()
    fresh = await accounts.login(user.email, user.password)
    await accounts.stub.ListSessions(auth_pb2.ListSessionsRequest(), metadata=channel.bearer(fresh.access_token))
    async with accounts.database() as admin:
        query = "SELECT oid::regclass::text AS name FROM pg_class WHERE relnamespace = 'auth'::regnamespace AND relkind = 'r'"
        names = [row["name"] for row in await admin.fetch(query)]
        dump = "".join([str(await admin.value(f"SELECT string_agg(t::text, ' ') FROM {name} AS t")) for name in names])  # noqa: S608
    assert user.email in dump
    for secret in (user.password, fresh.refresh_token, fresh.access_token, user.refresh_token):
        assert secret not in dump
        assert secret.encode().hex() not in dump
