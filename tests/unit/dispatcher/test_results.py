"""Large results: kept elsewhere, told by reference, with how they begin."""

from __future__ import annotations

import hashlib

import orjson
import pytest

from netra import errors
from netra.tool import Artifact
from services.dispatcher.tools import results


async def _keep(name: str, media_type: str, content: bytes) -> Artifact:
    return Artifact("a-1", name, media_type, len(content), hashlib.sha256(content).hexdigest())


async def _recorded(value: object) -> results.Result:
    return await results.recorded(value, "count", "count.json", _keep, errors.ToolFailed)


@pytest.mark.parametrize(("length", "kept"), [(results.INLINE_BYTES - 2, False), (results.INLINE_BYTES - 1, True)])
async def test_a_result_is_told_whole_up_to_the_limit(length: int, kept: bool) -> None:
    found = await _recorded("x" * length)
    assert (found.artifact is not None, set(found.told())) == (kept, {"result_ref", "preview"} if kept else {"result"})


async def test_what_is_kept_is_the_json_of_the_whole_result() -> None:
    value = {"words": ["é"] * 200_000}
    found = await _recorded(value)
    text = orjson.dumps(value)
    assert found.value == value
    assert found.told()["result_ref"] == {
        "artifact_id": "a-1", "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest(), "media_type": "application/json",
    }  # fmt: skip


@pytest.mark.parametrize("before", range(4))
async def test_a_preview_is_cut_between_characters(before: int) -> None:
    found = await _recorded("x" * before + "𝄞" * 100_000)
    assert found.preview == '"' + "x" * before + "𝄞" * ((results.PREVIEW_BYTES - 1 - before) // 4)


async def test_more_than_anything_may_have_is_a_failure() -> None:
    with pytest.raises(errors.ToolFailed, match=f"at most {results.MAX_BYTES}"):
        await _recorded("x" * (results.MAX_BYTES - 1))


async def test_what_is_not_json_is_a_failure_of_whoever_returned_it() -> None:
    with pytest.raises(errors.AgentFailed, match="cannot be written as JSON"):
        await results.recorded({"a": object()}, "teller", "teller.json", _keep, errors.AgentFailed)
