"""Refusals on their way to the record of access: counted, bounded, never lost without a word."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from chassis import audit, identity
from netra import errors, ids
from netra.auth.v1 import auth_pb2

DENIED = errors.PermissionDenied(permission="runs:write")


class Auth:
    """Takes entries, unless it is away or does not like them."""

    def __init__(self) -> None:
        self.taken: list[auth_pb2.AuditEntry] = []
        self.error: errors.NetraError | None = None
        self.bad: set[str] = set()
        self.asked = 0

    async def send(self, entries: Sequence[auth_pb2.AuditEntry]) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error
        if self.bad & {entry.detail for entry in entries}:
            raise errors.InvalidPayload(field="entries")
        self.taken += entries

    @property
    def details(self) -> list[str]:
        """What was told."""
        return [entry.detail for entry in self.taken]


def principal(actor: str = "") -> identity.Principal:
    """Some user."""
    return identity.Principal(ids.UserId.new(), ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", 0.0, "t", actor=actor)


async def test_the_same_refusal_again_and_again_is_one_entry_with_a_number() -> None:
    auth = Auth()
    refusals = audit.Refusals(auth.send)
    mine, other = identity.Caller(principal=principal()), identity.Caller(principal=principal())
    for caller in (mine, mine, other, mine):
        refusals.note("Runs/Start", DENIED, caller)
    refusals.note("Runs/Stop", DENIED, mine)
    await refusals.flush()
    assert auth.details == [
        "Runs/Start: permission_denied, runs:write; 3 times", "Runs/Start: permission_denied, runs:write",
        "Runs/Stop: permission_denied, runs:write",
    ]  # fmt: skip
    assert mine.principal is not None
    told = auth.taken[0]
    assert (told.actor, told.user_id, told.tenant_id, told.action, told.outcome) == (
        f"user:{mine.user_id}", mine.user_id, mine.principal.tenant_id, "deny", "refused",
    )  # fmt: skip
    await refusals.flush()
    assert len(auth.taken) == 3


@pytest.mark.parametrize(
    ("error", "with_credential", "told"),
    [
        (errors.PermissionDenied(), True, True), (errors.PermissionDenied(), False, True), (errors.Unauthenticated(), True, True),
        (errors.Unauthenticated(), False, False), (errors.NotFound(), True, False), (errors.RateLimited(), True, False),
    ],
)  # fmt: skip
async def test_only_refusals_of_somebody_are_told(error: errors.NetraError, with_credential: bool, told: bool) -> None:
    auth = Auth()
    refusals = audit.Refusals(auth.send)
    refusals.note("Runs/Start", error, identity.Caller(), with_credential=with_credential)
    await refusals.flush()
    assert bool(auth.taken) is told


@pytest.mark.parametrize("away", [errors.Unavailable(), errors.DeadlineExceeded(), errors.RateLimited()])
async def test_what_cannot_be_told_now_is_told_later(away: errors.NetraError) -> None:
    auth = Auth()
    refusals, auth.error = audit.Refusals(auth.send), away
    for name in ("one", "two"):
        refusals.note(name, DENIED, identity.Caller())
        await refusals.flush()
    auth.error = None
    await refusals.flush()
    assert auth.details == [f"{name}: permission_denied, runs:write" for name in ("one", "two")]


async def test_what_is_lost_is_counted_and_told() -> None:
    auth = Auth()
    refusals = audit.Refusals(auth.send)
    for number in range(1_250):
        refusals.note(f"Runs/{number}", DENIED, identity.Caller())
    await refusals.flush()
    assert len(auth.taken) == 1_001
    assert (auth.taken[0].outcome, auth.details[0]) == ("lost", "250 entries are not in the record")


async def test_no_more_wait_than_there_is_room_for() -> None:
    auth = Auth()
    refusals, auth.error = audit.Refusals(auth.send), errors.Unavailable()
    for number in range(11_000):
        refusals.note(f"Runs/{number}", DENIED, identity.Caller())
        if number % 900 == 0:
            await refusals.flush()
    auth.error = None
    await refusals.flush()
    await refusals.flush()
    assert len(auth.taken) == 10_001
    assert auth.taken[-1].outcome == "lost"


async def test_however_long_auth_is_away_the_number_of_what_is_lost_is_right() -> None:
    auth = Auth()
    refusals, auth.error = audit.Refusals(auth.send), errors.Unavailable()
    for number in range(15_000):
        refusals.note(f"Runs/{number}", DENIED, identity.Caller())
        if number % 500 == 0:
            await refusals.flush()
    auth.error = None
    await refusals.flush()
    await refusals.flush()
    told = [entry for entry in auth.taken if entry.outcome == "refused"]
    lost = [int(entry.detail.partition(" ")[0]) for entry in auth.taken if entry.outcome == "lost"]
    # one of them had a place among the others, from when the first was lost
    assert (len(told), auth.taken[9_999].outcome, len(lost)) == (9_999, "lost", 2)
    assert len(told) + sum(lost) == 15_000


async def test_what_auth_will_never_take_does_not_stand_in_the_way() -> None:
    auth = Auth()
    refusals, auth.error = audit.Refusals(auth.send), errors.InvalidPayload()
    refusals.note("one", DENIED, identity.Caller())
    await refusals.flush()
    auth.error = None
    refusals.note("two", DENIED, identity.Caller())
    await refusals.flush()
    assert auth.details == ["1 entries are not in the record", "two: permission_denied, runs:write"]


async def test_one_that_auth_does_not_take_does_not_take_the_others_along() -> None:
    auth = Auth()
    refusals = audit.Refusals(auth.send)
    for number in range(700):
        refusals.note(f"Runs/{number}", errors.PermissionDenied(), identity.Caller())
    every = [f"Runs/{number}: permission_denied" for number in range(700)]
    auth.bad = {every[0], every[123], every[699]}
    await refusals.flush()
    assert auth.details == [detail for detail in every if detail not in auth.bad]
    # not one by one: whoever can make one bad entry must not turn one call into hundreds
    assert auth.asked < 100
    await refusals.flush()
    assert auth.details[-1] == "3 entries are not in the record"


@pytest.mark.parametrize("hostile", ["\0", "a\nb", "\x1b[2J", "\ud800", "x" * 5_000])
async def test_whatever_is_refused_its_entry_is_one_that_can_be_kept(hostile: str) -> None:
    auth = Auth()
    refusals = audit.Refusals(auth.send)
    refusals.note("Auth/IssueToken", errors.PermissionDenied(permission=hostile), identity.Caller())
    await refusals.flush()
    (detail,) = auth.details
    assert detail.startswith("Auth/IssueToken: permission_denied, ")
    assert detail.isprintable()
    assert len(detail) <= 1_000


async def test_tokens_that_are_issued_are_told_with_how_and_how_often() -> None:
    auth = Auth()
    refusals = audit.Refusals(auth.send)
    user_id = ids.UserId.new()
    for _ in range(3):
        refusals.issued("service:events", "client credentials")
    refusals.issued(f"user:{user_id}", "refresh", user_id=user_id)
    await refusals.flush()
    assert [(entry.actor, entry.user_id, entry.action, entry.outcome, entry.detail) for entry in auth.taken] == [
        ("service:events", "", "issue_token", "ok", "client credentials; 3 times"),
        (f"user:{user_id}", user_id, "issue_token", "ok", "refresh"),
    ]


def test_who_acts_is_named_as_the_record_names_them() -> None:
    user, acted = principal(), principal("gateway")
    assert audit.actor(identity.Caller()) == "anonymous"
    assert audit.actor(identity.Caller(service="events")) == "service:events"
    assert audit.actor(identity.Caller(principal=user)) == f"user:{user.user_id}"
    assert audit.actor(identity.Caller(principal=acted)) == f"service:gateway for user:{acted.user_id}"
