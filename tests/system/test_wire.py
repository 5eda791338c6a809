"""The gateway speaks RFC 6455 to the letter, also to those who do not."""

from __future__ import annotations

import pytest

from tests.fixtures.stack import System
from tests.fixtures.users import NewUser
from tests.wire import cases, check, handshakes


@pytest.mark.parametrize("group", sorted({case.group for case in cases.cases()}))
async def test_frames(system: System, new_user: NewUser, group: str) -> None:
    token, port = new_user().token, system.ports["gateway"]
    found = {case.name: (check.expected(case), await check.seen(port, token, case)) for case in cases.cases() if case.group == group}
    assert {name: pair for name, pair in found.items() if not check.agrees(*pair)} == {}


async def test_handshakes(system: System, new_user: NewUser) -> None:
    token, port = new_user().token, system.ports["gateway"]
    found = {asked.name: (asked.status, await check.answered(port, token, asked)) for asked in handshakes.handshakes(token)}
    assert {name: pair for name, pair in found.items() if pair[0] != pair[1]} == {}
