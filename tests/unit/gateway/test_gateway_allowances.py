"""Frames are counted for a user, not for a socket, and may be as large as the tier allows."""

from __future__ import annotations

import time

from chassis import identity, trust
from gateway import entitlements
from netra import ids
from netra.auth.v1 import auth_pb2


async def _entitled(**limits: int) -> entitlements.Entitlements:
    known = trust.Trust()
    found = auth_pb2.TierLimits(tier="free")
    for name, value in limits.items():
        setattr(found, name, value)
    await known.apply(auth_pb2.WatchTrustResponse(policy=auth_pb2.Policy(limits=[found])))
    return entitlements.Entitlements(known, None, None, 1)  # type: ignore[arg-type]


def _who() -> identity.Principal:
    return identity.Principal(ids.UserId.new(), ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", time.time() + 600, "t")


async def test_the_sockets_of_a_user_share_what_a_minute_allows() -> None:
    entitled, mine, other = await _entitled(frames_per_minute=3), _who(), _who()
    same_user = identity.Principal(mine.user_id, mine.tenant_id, ids.SessionId.new(), ("user",), "free", time.time() + 600, "t2")
    assert [entitled.take_frame(one) for one in (mine, same_user, mine)] == [0, 0, 0]
    assert 0 < entitled.take_frame(same_user) <= 20_001
    assert entitled.take_frame(other) == 0


async def test_allowances_are_kept_for_so_many_users_only() -> None:
    entitled = await _entitled(frames_per_minute=3)
    for _ in range(entitlements._REMEMBERED + 100):
        entitled.take_frame(_who())
    assert len(entitled._allowances) == entitlements._REMEMBERED


async def test_a_tier_may_allow_less_than_the_gateway_but_not_more() -> None:
    who = _who()
    assert (await _entitled(max_frame_bytes=4096)).max_frame_bytes(who, 65536) == 4096
    assert (await _entitled(max_frame_bytes=1_000_000)).max_frame_bytes(who, 65536) == 65536
    assert (await _entitled()).max_frame_bytes(who, 65536) == 65536
