"""Which tool holds up the event loop: told by name, and nothing else about the tool changes."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

from netra import errors
from services.dispatcher.tools.sandbox import blocking


async def computes(seconds: float) -> str:
    """Holds up the loop between two awaits."""
    await asyncio.sleep(0)
    time.sleep(seconds)  # noqa: ASYNC251 - what this is about
    await asyncio.sleep(0)
    return "done"


async def waits(seconds: float) -> str:
    """Lets the others go on."""
    await asyncio.sleep(seconds)
    return "done"


async def test_a_tool_that_holds_up_the_loop_is_told_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert await blocking.Noticed("counts", computes(0.06)) == "done"
    written = capsys.readouterr().out
    assert "tool=counts" in written
    assert re.search(r"seconds=\d", written)
    assert written.count("held up everything else") == 1


async def test_one_that_waits_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert await blocking.Noticed("patient", waits(0.06)) == "done"
    assert capsys.readouterr().out == ""


async def test_what_it_raises_is_raised_and_its_time_told(capsys: pytest.CaptureFixture[str]) -> None:
    async def fails() -> None:
        time.sleep(0.06)  # noqa: ASYNC251 - what this is about
        raise errors.NotFound("nothing")

    with pytest.raises(errors.NotFound, match="nothing"):
        await blocking.Noticed("fails", fails())
    assert "tool=fails" in capsys.readouterr().out


async def test_a_cancel_reaches_the_tool() -> None:
    seen: list[str] = []

    async def stopped() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            seen.append("cancelled")
            await asyncio.sleep(0)
            seen.append("cleaned up")
            raise

    async def called() -> None:
        await blocking.Noticed("stopped", stopped())

    async with asyncio.TaskGroup() as group:
        task = group.create_task(called())
        await asyncio.sleep(0)
        task.cancel()
    assert task.cancelled()
    assert seen == ["cancelled", "cleaned up"]


async def test_an_error_that_it_waits_for_reaches_it() -> None:
    async def waited() -> str:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_exception, errors.Busy("later"))
        try:
            await future
        except errors.Busy as error:
            return error.message
        return ""

    assert await blocking.Noticed("waited", waited()) == "later"
