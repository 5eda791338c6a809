"""The writer's one statement on a real PostgreSQL: what is odd in a value arrives as it is."""

from __future__ import annotations

import json
from datetime import UTC

import pytest

from netra import ids
from services.events import heads
from tests.integration.events.conftest import Place, Run, event, whole

_ODD = ["", "NULL", "null", '"', "\\", '\\"', "{", "}", ",", "{a,b}", " a ", "\n", "'", "é😀", "\\x00"]


async def test_odd_texts_arrive_as_they_are(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(*(event("null", tool_call_id=text) for text in _ODD), steps={f"s{text}": text.encode() for text in _ODD})
    async with place.admin() as admin:
        rows = await admin.fetch("SELECT tool_call_id, type, frame FROM events.events WHERE user_id = $1 ORDER BY cursor", run.user_id)
        steps = await admin.fetch("SELECT key, result FROM events.steps WHERE run_id = $1", run.run_id)
    assert [(row["tool_call_id"], row["type"]) for row in rows] == [(text, "null") for text in _ODD]
    assert {row["key"]: row["result"] for row in steps} == {f"s{text}": text.encode() for text in _ODD}


@pytest.mark.parametrize("text", _ODD)
async def test_an_odd_text_arrives_alone(place: Place, text: str) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event(tool_call_id=text))
    async with place.admin() as admin:
        assert await admin.value("SELECT tool_call_id FROM events.events WHERE user_id = $1", run.user_id) == text


async def test_the_time_of_a_row_is_that_of_its_frame(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event())
    (recorded,) = await whole(replica, run.user_id)
    async with place.admin() as admin:
        at = await admin.value("SELECT recorded_at FROM events.events WHERE user_id = $1", run.user_id)
    assert json.loads(recorded.frame)["timestamp"] == at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


async def test_a_run_that_was_removed_and_opened_again_is_not_the_one_that_was_known(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event())
    async with place.admin() as admin:
        await admin.execute("DELETE FROM events.heads WHERE run_id = $1", run.run_id)
    await replica.record.open(heads.new(run.context, ids.RunId(run.run_id), "1" * 32), 1)
    again = Run(replica, run.context)
    assert await again.append(event()) == 2
    last = (await whole(replica, run.user_id))[-1]
    assert json.loads(last.frame)["trace_id"] == "1" * 32
