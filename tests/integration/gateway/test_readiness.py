"""Asking whether the services serve leaves nothing behind, with certificates too."""

from __future__ import annotations

from pathlib import Path

from chassis import channel
from gateway import upstreams
from gateway.settings import GatewaySettings
from tests.fixtures.certificates import Authority
from tests.fixtures.storage import Services


async def test_probes_leave_nothing_behind_on_certified_channels(services: Services, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    services.own = {name: dict(authority.issue(name).settings()) for name in ("auth", "gateway")}
    await services.auth()
    connected = upstreams.connect(GatewaySettings(**services.settings("gateway")))
    try:
        auth = connected.channels["auth"]
        assert isinstance(auth, channel._Renewed)
        answers = [await connected.serving() for _ in range(20)]
        assert [answer["auth"] for answer in answers[-5:]] == [True] * 5
        assert set(answers[-1]) == {"auth", "context", "dispatcher", "events"}
        assert len(auth._methods) == 1
    finally:
        await connected.close()
