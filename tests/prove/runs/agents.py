"""The agents of the proof: five ways through steps and tools, with places at which a run of them can be held; and some for other ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from netra import errors
from netra.agent import AgentSpec, Turn, agent
from tests.prove.runs import outside, tools

_LONG_S = 600.0
# in the engine, around the agent
OPEN, FINISHING, FINISHED, ENDED, SUSPENDED = "~open", "~finishing", "~finished", "~ended", "~suspended"
# while a person is waited for: nobody owns the run
ASKED = "asked"


class Course:
    """How an agent goes through its steps: each has a key outside, and each can be the one at which the run is held."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.mark, self._folder = str(turn.inputs["mark"]), str(turn.inputs["folder"])
        self._hold, self._gate = str(turn.inputs.get("hold", "")), str(turn.inputs.get("gate", ""))
        self.sum = 0

    async def at(self, place: str) -> None:
        """A place between two steps."""
        if place == self._hold:
            await outside.held(self._folder, self._gate, self.mark, place, self._turn.alive)

    async def think(self, step: str) -> None:
        """Consider something."""
        await self._turn.think(f"{self.mark} considers {step}.")
        await self.at(step)

    async def call(self, tool: str, step: str) -> int:
        """Call a tool; its value, which counts."""
        before, within = (self._hold == f"{step}:{when}" for when in ("before", "in"))
        more = {"when": "before" if before else "in"} if tool == "ship" else {}
        gate = self._gate if before or within else ""
        found = int((await self._turn.tool(tool, folder=self._folder, key=f"{self.mark}.{step}", gate=gate, **more))["value"])
        self.sum += found
        await self.at(step)
        return found

    def end(self) -> dict[str, Any]:
        """What the run comes to."""
        return {"message": f"{self.mark} is done.", "sum": self.sum}


@agent("sequence", deadline_s=_LONG_S)
async def sequence(turn: Turn) -> object:
    """One step after the other."""
    way = Course(turn)
    await way.at("begun")
    await way.think("one")
    await way.call("look", "first")
    await way.think("two")
    await way.call("put", "second")
    await way.call("book", "third")
    await way.think("three")
    await way.call("ship", "fourth")
    return way.end()


@agent("parallel", deadline_s=_LONG_S)
async def parallel(turn: Turn) -> object:
    """Several steps at the same time."""
    way = Course(turn)

    async def strand() -> None:
        await way.think("beside")
        await way.call("book", "right")

    await way.at("begun")
    await way.think("one")
    await turn.gather(way.call("look", "left"), way.call("put", "middle"), strand())
    await way.think("two")
    return way.end()


@agent("part", deadline_s=_LONG_S)
async def part(turn: Turn) -> object:
    """A part of the work of another."""
    way = Course(turn)
    await way.think("a part")
    return await way.call("book", "parted")


@agent("branch", deadline_s=_LONG_S)
async def branch(turn: Turn) -> object:
    """One of two ways, as a tool says; then a child."""
    way = Course(turn)
    await way.at("begun")
    if await way.call("look", "choice") % 2:
        await way.think("the odd way")
        await way.call("put", "odd")
    else:
        await way.call("ship", "even")
    way.sum += int(await turn.child("part"))
    await way.at("joined")
    return way.end()


@agent("recovery", deadline_s=_LONG_S)
async def recovery(turn: Turn) -> object:
    """What fails is replaced, and a person has the last word."""
    way = Course(turn)
    await way.at("begun")
    try:
        await turn.tool("refuse", key=f"{way.mark}.broken")
    except errors.NetraError:
        await way.at("broken")
        await way.call("put", "instead")
    try:
        await way.call("pay", "dear")
    except errors.OwnerLost:
        # whether it was paid nobody knows, and a person did not want it done again
        await way.call("book", "cheap")
    decision = await turn.approve(f"{way.mark} may end?")
    await way.think("the decision")
    return {**way.end(), "approved": decision.approved}


@agent("feedback", deadline_s=_LONG_S)
async def feedback(turn: Turn) -> object:
    """Draft, look, and again until it is good; then what a person says of it."""
    way = Course(turn)
    await way.at("begun")
    for attempt in range(1, 4):
        await way.think(f"draft {attempt}")
        await way.call("put", f"draft-{attempt}")
        if await way.call("look", f"check-{attempt}") < 400:
            break
    said = await turn.wait_for_message()
    await way.think("what was said")
    return {**way.end(), "said": said.text}


FIVE: tuple[AgentSpec, ...] = (sequence, parallel, branch, recovery, feedback)
_ODD, _EVEN = ("the odd way", "odd:in", "odd"), ("even:before", "even:in", "even")
_ALWAYS = (OPEN, "begun", FINISHING, FINISHED, ENDED)
# in the order of the code; all ways of an agent
PLACES: dict[str, tuple[str, ...]] = {
    "sequence": (
        *_ALWAYS, "one", "first:in", "first", "two", "second:in", "second", "third:in", "third", "three", "fourth:before", "fourth:in",
        "fourth",
    ),
    "parallel": (*_ALWAYS, "one", "left:in", "left", "middle:in", "middle", "beside", "right:in", "right", "two"),
    "branch": (*_ALWAYS, "choice:in", "choice", *_ODD, *_EVEN, "a part", "parted:in", "parted", "joined"),
    "recovery": (*_ALWAYS, "broken", "instead:in", "instead", "dear:in", "dear", SUSPENDED, ASKED, "the decision"),
    "feedback": (
        *_ALWAYS, "draft 1", "draft-1:in", "draft-1", "check-1:in", "check-1", "draft 2", "draft-2:in", "draft-2", "check-2", SUSPENDED,
        ASKED, "what was said",
    ),
}  # fmt: skip


def suits(name: str, place: str, mark: str) -> bool:
    """Whether a run of the agent with this mark comes to the place: some ways are not everybody's."""
    if name == "branch" and place in (*_ODD, *_EVEN):
        return bool(tools.value(f"{mark}.choice") % 2) == (place in _ODD)
    if name == "feedback" and place in ("draft 2", "draft-2:in", "draft-2", "check-2"):
        return tools.value(f"{mark}.check-1") >= 400
    return True


def expected(name: str, mark: str) -> list[dict[str, Any]]:
    """What a run may come to."""

    def of(*steps: str) -> int:
        return sum(tools.value(f"{mark}.{step}") for step in steps)

    end = {"message": f"{mark} is done."}
    if name == "sequence":
        return [{**end, "sum": of("first", "second", "third", "fourth")}]
    if name == "parallel":
        return [{**end, "sum": of("left", "middle", "right")}]
    if name == "branch":
        return [{**end, "sum": of("choice", "odd" if of("choice") % 2 else "even", "parted")}]
    if name == "recovery":
        return [{**end, "sum": of("instead", paid), "approved": True} for paid in ("dear", "cheap")]
    rounds = next((at for at in (1, 2, 3) if of(f"check-{at}") < 400), 3)
    return [{**end, "sum": sum(of(f"draft-{at}", f"check-{at}") for at in range(1, rounds + 1)), "said": f"{mark} is good."}]


@agent("slot", deadline_s=_LONG_S)
async def slot(turn: Turn) -> object:
    """Takes a slot for a while, and tells no more than it must."""
    # not a step: nothing is to be recorded between the beginning and the end
    await asyncio.sleep(float(turn.inputs["pace_s"]))
    return {"message": "done"}


@agent("asleep", deadline_s=_LONG_S)
async def asleep(turn: Turn) -> object:
    """Goes on until it is cancelled, in one of several ways."""
    folder, mark = str(turn.inputs["folder"]), str(turn.inputs["mark"])
    ways: dict[str, Callable[[], Awaitable[object]]] = {
        "sleep": lambda: turn.sleep(600),
        "tool": lambda: turn.tool("linger", folder=folder, mark=mark),
        "process": lambda: turn.tool("toil", folder=folder, mark=mark),
        "child": lambda: turn.child("asleep", way="tool"),
        "gather": lambda: turn.gather(turn.tool("linger", folder=folder, mark=mark), turn.tool("toil", folder=folder, mark=mark)),
        "approval": lambda: turn.approve("For ever?"),
    }
    await ways[str(turn.inputs["way"])]()
    return {"message": "not cancelled"}


WAYS_TO_WAIT = ("sleep", "tool", "process", "child", "gather", "approval")
ALL: tuple[AgentSpec, ...] = (*FIVE, part, slot, asleep)
