"""Refresh tokens: one child each, however many ask; the same answer for seconds, the end of the session after that."""

from __future__ import annotations

import asyncio

import pytest

from chassis import channel
from netra.auth.v1 import auth_pb2
from tests.fixtures.accounts import Accounts, refused

GRACE_S = 10


async def test_a_refresh_rotates_the_pair_within_the_session(accounts: Accounts) -> None:
    user = await accounts.services.user()
    second = await accounts.refresh(user.refresh_token)
    third = await accounts.refresh(second.refresh_token)
    assert len({user.refresh_token, second.refresh_token, third.refresh_token}) == 3
    answers = [await accounts.verified(token) for token in (user.token, second.access_token, third.access_token)]
    assert [answer.valid for answer in answers] == [True] * 3
    assert len({answer.principal.session_id for answer in answers}) == 1


@pytest.mark.parametrize("token", ["", "junk", "nrt_" + "a" * 43, "nrs_" + "a" * 43])
async def test_what_is_no_refresh_token_is_refused(accounts: Accounts, token: str) -> None:
    assert (await refused(accounts.refresh(token))).code == "UNAUTHENTICATED"


async def test_of_twenty_who_bring_one_refresh_token_all_get_its_one_child(accounts: Accounts) -> None:
    user = await accounts.services.user()
    token = user.refresh_token
    for _ in range(5):
        answers = await asyncio.gather(*(accounts.refresh(token) for _ in range(20)))
        assert len({answer.refresh_token for answer in answers}) == 1
        token = answers[0].refresh_token
    # the first one and five children
    assert await accounts.value("SELECT count(*) FROM auth.refresh_tokens WHERE user_id = $1", user.user_id) == 6
    assert await accounts.value("SELECT count(*) FROM auth.refresh_tokens WHERE user_id = $1 AND used_at IS NULL", user.user_id) == 1


async def test_racers_at_two_replicas_get_the_same_child(accounts: Accounts) -> None:
    user = await accounts.services.user()
    async with accounts.replica() as other:
        answers = await asyncio.gather(*(where.refresh(user.refresh_token) for where in (accounts, other) * 10))
    assert len({answer.refresh_token for answer in answers}) == 1
    assert await accounts.value("SELECT count(*) FROM auth.refresh_tokens WHERE user_id = $1", user.user_id) == 2


async def test_a_lost_answer_can_be_asked_for_again_for_a_moment(accounts: Accounts) -> None:
    user = await accounts.services.user()
    first = await accounts.refresh(user.refresh_token)
    await accounts.later(user.user_id, GRACE_S - 2)
    again = await accounts.refresh(user.refresh_token)
    assert again.refresh_token == first.refresh_token
    assert (await accounts.verified(again.access_token)).valid
    await accounts.refresh(first.refresh_token)


async def test_reuse_after_that_ends_the_session_and_no_other(accounts: Accounts) -> None:
    user = await accounts.services.user()
    elsewhere = await accounts.login(user.email, user.password)
    child = await accounts.refresh(user.refresh_token)
    await accounts.later(user.user_id, GRACE_S + 1)
    assert (await refused(accounts.refresh(user.refresh_token))).code == "UNAUTHENTICATED"
    assert [(await accounts.verified(token)).valid for token in (user.token, child.access_token)] == [False, False]
    assert (await refused(accounts.refresh(child.refresh_token))).code == "UNAUTHENTICATED"
    assert (await accounts.verified(elsewhere.access_token)).valid
    await accounts.refresh(elsewhere.refresh_token)
    assert ("auth", "end_session", "ok") in await accounts.audited(user.user_id)
    assert await accounts.value("SELECT bool_and(security) FROM auth.revocations")


async def test_reuse_within_the_moment_ends_the_session_when_the_child_has_been_used(accounts: Accounts) -> None:
    user = await accounts.services.user()
    child = await accounts.refresh(user.refresh_token)
    grandchild = await accounts.refresh(child.refresh_token)
    assert (await refused(accounts.refresh(user.refresh_token))).code == "UNAUTHENTICATED"
    assert (await refused(accounts.refresh(grandchild.refresh_token))).code == "UNAUTHENTICATED"


@pytest.mark.parametrize("over", ["logout", "expiry"])
async def test_reuse_after_the_end_of_the_session_is_for_reasons_of_security_too(accounts: Accounts, over: str) -> None:
    user = await accounts.services.user()
    child = await accounts.refresh(user.refresh_token)
    if over == "logout":
        await accounts.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=channel.bearer(child.access_token))
    await accounts.later(user.user_id, 9 * 3600 if over == "expiry" else GRACE_S + 1)
    for _ in range(3):
        assert (await refused(accounts.refresh(user.refresh_token))).code == "UNAUTHENTICATED"
    # however often it is brought, it is told and recorded once
    told = [False, True] if over == "logout" else [True]
    assert await accounts.value("SELECT array_agg(security ORDER BY revoked_at) FROM auth.revocations") == told
    recorded = [actor for actor, action, _ in await accounts.audited(user.user_id) if action == "end_session"]
    assert recorded == [f"user:{user.user_id}", "auth"][-len(told) :]
    following = accounts.stub.WatchTrust(auth_pb2.WatchTrustRequest(), metadata=await accounts.services.service_token("dispatcher"))
    assert [each.security for each in (await anext(aiter(following))).revocations] == [True]
    following.cancel()


async def test_an_answer_that_was_lost_while_the_session_ended_is_no_reuse(accounts: Accounts) -> None:
    user = await accounts.services.user()
    child = await accounts.refresh(user.refresh_token)
    await accounts.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=channel.bearer(child.access_token))
    assert (await refused(accounts.refresh(user.refresh_token))).code == "UNAUTHENTICATED"
    assert await accounts.value("SELECT array_agg(security) FROM auth.revocations") == [False]


async def test_a_restart_forgets_nothing(accounts: Accounts) -> None:
    user, thief = await accounts.services.user(), await accounts.services.user()
    async with accounts.replica() as before:
        child = await before.refresh(user.refresh_token)
        stolen = await before.refresh(thief.refresh_token)
    async with accounts.replica() as after:
        # in time it is the same child, from a process that did not make it
        assert (await after.refresh(user.refresh_token)).refresh_token == child.refresh_token
        await accounts.later(thief.user_id, GRACE_S + 1)
        assert (await refused(after.refresh(thief.refresh_token))).code == "UNAUTHENTICATED"
    async with accounts.replica() as again:
        assert (await refused(again.refresh(stolen.refresh_token))).code == "UNAUTHENTICATED"
        refused_there = again.stub.ListSessions(auth_pb2.ListSessionsRequest(), metadata=channel.bearer(stolen.access_token))
        assert (await refused(refused_there)).code == "UNAUTHENTICATED"


class TestExpiry:
    """Sessions end by themselves, idle or old."""

    async def test_a_session_that_lay_idle_is_over(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        async with accounts.replica(session_idle_hours=1, session_hours=8) as short:
            tokens = await short.login(user.email, user.password)
            await accounts.later(user.user_id, 3500)
            tokens = await short.refresh(tokens.refresh_token)
            await accounts.later(user.user_id, 3500)
            tokens = await short.refresh(tokens.refresh_token)
            await accounts.later(user.user_id, 3700)
            assert (await refused(short.refresh(tokens.refresh_token))).code == "UNAUTHENTICATED"

    async def test_a_session_ends_however_much_it_is_used(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        async with accounts.replica(session_idle_hours=8, session_hours=2) as short:
            tokens = await short.login(user.email, user.password)
            for _ in range(3):
                await accounts.later(user.user_id, 2300)
                tokens = await short.refresh(tokens.refresh_token)
            # 300 s are left, and no access token lives longer than that
            assert 200 < tokens.expires_in.seconds <= 300
            await accounts.later(user.user_id, 400)
            assert (await refused(short.refresh(tokens.refresh_token))).code == "UNAUTHENTICATED"

    async def test_an_expired_session_is_no_device_any_more_and_nothing_was_withdrawn(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        await accounts.later(user.user_id, 9 * 3600)
        fresh = await accounts.login(user.email, user.password)
        listed = await accounts.stub.ListSessions(auth_pb2.ListSessionsRequest(), metadata=channel.bearer(fresh.access_token))
        assert len(listed.sessions) == 1
        assert await accounts.value("SELECT count(*) FROM auth.revocations") == 0

    async def test_the_command_line_stays_signed_in_for_longer(self, accounts: Accounts) -> None:
        user = await accounts.services.user()
        tokens = await accounts.login(user.email, user.password, "netra cli on a desk")
        await accounts.later(user.user_id, 29 * 86400)
        tokens = await accounts.refresh(tokens.refresh_token)
        await accounts.later(user.user_id, 2 * 86400)
        assert (await refused(accounts.refresh(tokens.refresh_token))).code == "UNAUTHENTICATED"
