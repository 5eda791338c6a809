"""What takes long goes on only while its caller's session does."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest

from chassis import identity
from netra import errors, ids
from services.events import fanout, follow, log, reach, servicer, wiring


class _Exports:
    """Pages without end."""

    async def pages(self, user_id: str) -> Any:
        while True:
            yield log.Page([], 0, log.Position())


async def _reader(wanted: str) -> str:
    return "the caller"


async def _generation() -> str:
    return "g"


@pytest.mark.parametrize("how", ["revoked", "expired"])
async def test_an_export_ends_with_the_session_of_who_asked(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    revoked: set[str] = set()
    trust: Any = SimpleNamespace(revoked=lambda who: who.user_id in revoked)
    who = identity.Principal(ids.UserId.new(), ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", time.time() + 60, "t")
    identity.bind(identity.Caller(who))
    within, unused = reach.Reach(None, trust, None), None  # type: ignore[arg-type]
    monkeypatch.setattr(within, "reader", _reader)
    whole: Any = servicer.Whole(_Exports(), None, within)  # type: ignore[arg-type]
    live: Any = SimpleNamespace(known_generation=_generation)
    serving = servicer.EventsServicer(unused, unused, unused, unused, live, unused, whole, unused, unused)  # type: ignore[arg-type]
    answers: Any = serving.ExportEvents(SimpleNamespace(user_id=""), unused)  # type: ignore[arg-type]
    assert (await anext(answers)).epoch == "g"
    if how == "revoked":
        revoked.add(who.user_id)
    else:
        monkeypatch.setattr(time, "time", lambda: who.expires_at + identity.LEEWAY_S)
    with pytest.raises(errors.Unauthenticated):
        await anext(answers)


def test_pages_and_catch_ups_leave_connections_for_runs_that_begin() -> None:
    assert wiring._PAGES_AT_ONCE + fanout.CATCH_UPS + follow.AT_ONCE + follow.PAGES_AT_ONCE + 2 <= wiring._POOL
