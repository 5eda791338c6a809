"""What a user is told of themselves: the limits that hold, and of all users nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from chassis import trust
from gateway import entitlements, me, statistics
from gateway.settings import GatewaySettings
from netra import ids
from netra.auth.v1 import auth_pb2
from netra.dispatcher.v1 import dispatcher_pb2

_NOTHING: Any = None


async def _me(limits: auth_pb2.TierLimits, *permissions: str) -> me.Me:
    known = trust.Trust()
    grant = auth_pb2.Grant(role="user", tier="free", permissions=permissions)
    await known.apply(auth_pb2.WatchTrustResponse(policy=auth_pb2.Policy(limits=[limits], grants=[grant])))

    async def caller(_: Any) -> Any:
        return SimpleNamespace(user_id=ids.UserId.new(), roles=("user",), tier="free", scope=None, token="t")

    async def permitted(*_: Any, **__: Any) -> auth_pb2.GetPermissionsResponse:
        return auth_pb2.GetPermissionsResponse()

    async def runs(*_: Any, **__: Any) -> dispatcher_pb2.ListRunsResponse:
        return dispatcher_pb2.ListRunsResponse()

    edge: Any = SimpleNamespace(
        callers=SimpleNamespace(of=caller), verifier=SimpleNamespace(trust=known), statistics=statistics.Statistics(),
        settings=GatewaySettings(max_frame_bytes=5000), entitled=entitlements.Entitlements(known, _NOTHING, _NOTHING, 1),
        open=SimpleNamespace(open_for=lambda user_id: 0),
    )  # fmt: skip
    services: Any = SimpleNamespace(auth=SimpleNamespace(GetPermissions=permitted), dispatcher=SimpleNamespace(ListRuns=runs))
    return me.Me(edge, services)


@pytest.mark.parametrize(("of_tier", "shown"), [(0, 5000), (4000, 4000), (6000, 5000)])
async def test_frames_are_as_large_as_the_socket_says(of_tier: int, shown: int) -> None:
    one = await _me(auth_pb2.TierLimits(tier="free", max_frame_bytes=of_tier))
    answer = json.loads(bytes((await one.me(_NOTHING)).body))
    assert answer["limits"]["max_frame_bytes"] == shown


@pytest.mark.parametrize(("permission", "shown"), [("runs:read", {"user"}), ("audit:read", {"user", "process"})])
async def test_what_all_send_is_for_who_may_read_the_record_of_access(permission: str, shown: set[str]) -> None:
    one = await _me(auth_pb2.TierLimits(tier="free"), permission)
    answer = json.loads(bytes((await one.statistics(_NOTHING)).body))
    assert set(answer) == shown
