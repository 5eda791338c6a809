"""Files: what one may be called and be, and how many may move at once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from netra import errors, ids
from services.context import artifacts, slots


def draft(**more: Any) -> artifacts.Draft:
    told: dict[str, Any] = {
        "request_id": ids.RequestId("r"),
        "name": "a.csv",
        "media_type": "text/csv",
        "size": 0,
        "sha256": "",
        "run_id": None,
    }
    return artifacts.Draft(**(told | more))


@pytest.mark.parametrize(
    "name", ["a", "a.csv", "été 2.csv", "..a", "a..", " a", "x" * 255, "日本語.csv", "a\\b", 'a"b', "👩‍🔬.csv", "%2F", "C:"]
)  # fmt: skip
def test_names_that_are_taken(name: str) -> None:
    assert draft(name=name).name == name


@pytest.mark.parametrize(
    "name",
    ["", " ", ".", "..", "a/b", "/", "x" * 256, "a\0", "a\n", "a\x7f", "a\x85", "a\u2028", "exe.\u202etxt", "\u2066a"],
)  # fmt: skip
def test_names_that_are_not(name: str) -> None:
    with pytest.raises(errors.InvalidPayload) as refused:
        draft(name=name)
    assert refused.value.details["field"] == "name"


@pytest.mark.parametrize("kind", ["text/csv", "text/markdown", "text/x-log", "application/json", "application/x-ndjson", "image/png"])
def test_media_types_that_are_taken(kind: str) -> None:
    assert draft(media_type=kind).media_type == kind


@pytest.mark.parametrize(
    "kind", ["", "text/", "text/csv\n", "text/c v", "TEXT/CSV", "application/x-sh", "multipart/form-data", "image/jpeg", "text/" + "x" * 65]
)  # fmt: skip
def test_media_types_that_are_not(kind: str) -> None:
    with pytest.raises(errors.InvalidPayload, match="application/x-ndjson") as refused:
        draft(media_type=kind)
    assert refused.value.details["field"] == "media_type"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("", "application/octet-stream"),
        ("Text/CSV; charset=utf-8", "text/csv"),
        (" text/csv ", "text/csv"),
        (";x", "application/octet-stream"),
    ],
)
def test_parameters_of_a_media_type_are_left_out(text: str, kind: str) -> None:
    assert artifacts.media_type(text) == kind


@pytest.mark.parametrize(
    ("more", "field"),
    [({"size": -1}, "size"), ({"sha256": "x"}, "sha256"), ({"sha256": "A" * 64}, "sha256"), ({"sha256": "a" * 65}, "sha256")],
)
def test_what_cannot_be_is_refused_by_field(more: dict[str, Any], field: str) -> None:
    with pytest.raises(errors.InvalidPayload) as refused:
        draft(**more)
    assert refused.value.details["field"] == field


async def test_a_user_waits_for_a_slot_of_their_own_and_others_do_not() -> None:
    one, two, moving = ids.UserId.new(), ids.UserId.new(), slots.Slots(3, 2, patience_s=0.05)
    async with moving.one(one), moving.one(one):
        with pytest.raises(errors.RateLimited) as refused:
            async with moving.one(one):
                pass
        assert refused.value.retry_after_ms == 1000
        async with moving.one(two):
            with pytest.raises(errors.RateLimited):
                async with moving.one(two):
                    pass
    async with moving.one(one), moving.one(one), moving.one(two):
        pass


@pytest.mark.timeout(10)
async def test_who_waits_gets_the_slot_that_becomes_free() -> None:
    user, moving, order = ids.UserId.new(), slots.Slots(1, 1), list[int]()

    async def move(number: int) -> None:
        async with moving.one(user):
            order.append(number)
            await asyncio.sleep(0)

    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(move(number))
    assert sorted(order) == [0, 1, 2, 3, 4]


async def test_a_slot_is_given_back_by_who_is_cancelled() -> None:
    user, moving, began = ids.UserId.new(), slots.Slots(1, 1, patience_s=0.05), asyncio.Event()

    async def move() -> None:
        async with moving.one(user):
            began.set()
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(move())
        await began.wait()
        task.cancel()
    async with moving.one(user):
        pass
