"""Calls under way end with their session, and not with that of anybody else."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from chassis import calls, identity, trust
from netra import errors, ids
from netra.auth.v1 import auth_pb2


def _principal() -> identity.Principal:
    return identity.Principal(
        ids.UserId.new(), ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", time.time() + 60, "", time.time()
    )


async def _end(known: trust.Trust, who: identity.Principal) -> None:
    revocation = auth_pb2.Revocation(session_id=who.session_id)
    revocation.revoked_at.GetCurrentTime()
    await known.apply(auth_pb2.WatchTrustResponse(revocations=[revocation]))


async def _call(under_way: calls.Calls, who: identity.Principal | None, work: Any) -> str:
    try:
        with under_way.under_way(who):
            await work
    except errors.NetraError as error:
        return error.code
    return "OK"


async def test_a_call_is_cut_off_when_its_session_ends() -> None:
    known, who = trust.Trust(), _principal()
    under_way = calls.Calls(known)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        call = group.create_task(_call(under_way, who, asyncio.Event().wait()))
        await asyncio.sleep(0)
        await _end(known, who)
    assert call.result() == "UNAUTHENTICATED"
    # the task can go on: it was not told to stop
    assert not call.cancelled()


async def test_calls_of_others_and_of_services_go_on() -> None:
    known, who, go = trust.Trust(), _principal(), asyncio.Event()
    under_way = calls.Calls(known)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        others = [group.create_task(_call(under_way, each, go.wait())) for each in (_principal(), None)]
        await asyncio.sleep(0)
        await _end(known, who)
        await asyncio.sleep(0)
        go.set()
    assert [call.result() for call in others] == ["OK", "OK"]


async def test_the_call_that_ends_the_session_is_answered() -> None:
    known, who = trust.Trust(), _principal()
    under_way = calls.Calls(known)
    assert await _call(under_way, who, _end(known, who)) == "OK"


async def test_a_call_that_its_caller_gave_up_is_cancelled_as_ever() -> None:
    under_way = calls.Calls(trust.Trust())
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        call = group.create_task(_call(under_way, _principal(), asyncio.Event().wait()))
        await asyncio.sleep(0)
        call.cancel()
    assert call.cancelled()


async def test_a_stream_is_looked_at_before_each_message() -> None:
    known, who = trust.Trust(), _principal()
    under_way = calls.Calls(known)
    under_way.check(who)
    under_way.check(None)
    await _end(known, who)
    with pytest.raises(errors.Unauthenticated):
        under_way.check(who)
