"""A part of `make prove-isolation` inside the suite; and that it can fail: what is made up, or missing, is found."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from netra import ids
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2
from tests.fixtures.stack import System
from tests.fixtures.users import User
from tests.prove.isolation import answers, asking, leaves, listening, people, probes, proof, pulse, settle, tables, world
from tests.prove.isolation.judge import Findings, Judge

# of each kind of thing and each way in, one
SLICE = (
    "dispatcher.GetRun", "context.GetContext", "context.ListMessages", "context.GetArtifact", "context.ListArtifacts", "events.Subscribe",
    "events.ListEvents", "auth.ListSessions", "GET /v1/runs/{run_id}", "DELETE /v1/artifacts/{artifact_id}", "CANCEL",
    "POST /rpc/netra.dispatcher.v1.DispatcherService/CancelRun", "STREAM events.Subscribe", "SUBSCRIBE#run",
    "GET /v1/runs/{run_id}/events#stream", "dispatcher.GetApproval", "dispatcher.SendMessage", "APPROVE",
)  # fmt: skip
# what this part of the proof must have done at least: few values, no faults, no measuring of times
SLICED = proof.Wanted(faults=0, pairs=0)
SLICE_FLOOR = proof.Floor(probes=100, pairs=0, faults=0, held=5)


@pytest.fixture
async def there(system: System) -> AsyncIterator[world.World]:
    """The running system with A and B, who have what they have."""
    async with world.around(system) as found:
        await settle.everybody(found, "A", "B")
        yield found


async def test_nothing_of_one_user_reaches_another_and_what_is_made_up_is_found(there: world.World) -> None:
    known, missing, figures = await proof.coverage(there)
    assert missing == []
    assert all(covered == of for covered, of in figures.values())
    assert figures["rpcs"][0] >= 70
    chosen = {name: known[name] for name in SLICE}
    found = Findings()
    judge = Judge(found, [there["A"], there["B"]])
    await proof.controls(there, judge, chosen)
    live = pulse.Pulse(there, there["A"], judge)
    await live.open()
    async with live.beating():
        await proof.asked(probes.Prober(there, judge, random.Random(7), values=2), chosen)
    judge.shallow(chosen)
    report = proof.verdict(found, missing, figures, {}, SLICED, SLICE_FLOOR)
    assert report["ok"], json.dumps(report)
    assert found.controls == 2 * len(SLICE)
    assert not proof.verdict(found, missing, figures, {}, SLICED)["ok"]  # of all there is to ask, it is no proof

    forged = Findings(forged={"leak", "difference", "control"})
    judge = Judge(forged, [there["A"], there["B"]])
    some = {name: known[name] for name in ("dispatcher.GetRun",)}
    await proof.controls(there, judge, some)
    await proof.asked(probes.Prober(there, judge, random.Random(7), values=1), some)
    assert (len(forged.leaks), len(forged.differences), len(forged.controls_failed), forged.forged) == (1, 1, 1, set())
    assert not _verdict(forged, [], figures)["ok"]

    without, missing, figures = await proof.coverage(there, frozenset({"missing"}))
    assert "rpcs: context.GetThread" in missing
    assert figures["rpcs"][0] == figures["rpcs"][1] - 1
    assert not _verdict(Findings(), missing, figures)["ok"]
    assert _verdict(Findings(), [], figures)["ok"]

    way, example = without["dispatcher.GetRun"]
    await probes.control(there, judge, way, dataclasses.replace(example, make=_unknown), "a run that is not there", there["A"])
    await probes.control(there, judge, way, dataclasses.replace(example, shows=("email",)), "a run without what it must show", there["A"])
    assert [one.partition(" as ")[0] for one in forged.controls_failed[1:]] == [
        "a run that is not there",
        "a run without what it must show",
    ]


class _Slow(asking.Rpc):
    """A service that is asked of one run says nothing `times` times, for so long that nobody listens any more."""

    def __init__(self, of: world.World, run_id: str, times: int) -> None:
        super().__init__(of)
        self.run_id, self.times = run_id, times

    async def ask(self, asked: asking.Asked, *more: Any, **others: Any) -> answers.Answer:
        if asked.body[0].run_id == self.run_id and self.times:
            self.times -= 1
            return answers.Answer(answers.OK, silent=True)
        return await super().ask(asked, *more, **others)


@pytest.mark.parametrize(("times", "differs"), [(1, False), (1_000, True)])
async def test_who_is_only_slow_is_asked_again(there: world.World, times: int, differs: bool) -> None:
    known, _, _ = await proof.coverage(there)
    (_, example), found = known["events.Subscribe"], Findings()
    judge = Judge(found, [there["A"], there["B"]])
    way = _Slow(there, there["A"].things["thread_id"], times)
    # in every place everything that there is: also what is not a run
    await proof.asked(probes.Prober(there, judge, random.Random(7)), {"events.Subscribe": (way, example)})
    assert [": thread_id in run_id: " in one for one in found.differences] == [True] * differs
    assert found.leaks == []


def _verdict(found: Findings, missing: list[str], figures: dict[str, list[int]]) -> dict[str, Any]:
    """Without any floor: whatever is found or missing decides."""
    return proof.verdict(found, missing, figures, {}, SLICED, proof.Floor(probes=0, pairs=0, faults=0, held=0))


async def _unknown(_: world.World, __: people.Party) -> Any:
    return dispatcher_pb2.GetRunRequest(run_id=ids.uuid7())


def _party(name: str) -> people.Party:
    user = User(ids.uuid7(), f"{name}@netra.example", "", "", "")
    things = people.Things({"user_id": user.user_id, "tenant_id": ids.uuid7(), "run_id": ids.uuid7()}, {ids.uuid7()})
    return people.Party(user, "", name, people.canary(name), things)


def _event(owner: people.Party) -> events_pb2.ListEventsResponse:
    frame = json.dumps({"event_id": ids.uuid7(), "run_id": owner.things["run_id"], "data": {}}).encode()
    return events_pb2.ListEventsResponse(events=[events_pb2.Event(frame=frame)])


def _leaks(owner: people.Party) -> dict[str, answers.Answer]:
    hidden = next(iter(owner.things.hidden)).encode()
    whole = base64.b64encode(json.dumps({"user_id": owner.user_id, "name": "n" * 40}).encode()).decode()
    run = dispatcher_pb2.GetRunResponse(run=dispatcher_pb2.Run(run_id=owner.things["run_id"]))
    return {
        "what they wrote": answers.Answer("NOT_FOUND", "", f"There is no {owner.canary}.".encode()),
        "what they wrote, as base64": answers.Answer("OK", "", base64.b64encode(f"..{owner.canary}".encode())),
        "an id that nobody sent": answers.Answer("OK", "", b"x" + hidden),
        "an id where it says what it is of": answers.Answer("OK", "", b"", [run]),
        "an id in JSON in bytes": answers.Answer("OK", "", b"", [_event(owner)]),
        "an id in JSON in base64": answers.frame({"type": "stream_data", "data": {"frame": whole}}),
    }


@pytest.mark.parametrize("what", list(_leaks(_party("A"))))
def test_a_leak_is_found_in_whatever_form(what: str) -> None:
    owner, other = _party("A"), _party("B")
    judge = Judge(Findings(), [owner, other])
    judge.look("x", other, (), _leaks(owner)[what])
    judge.look("x", owner, (), _leaks(owner)[what])  # what is one's own is no leak
    assert len(judge.findings.leaks) == 1, judge.findings.leaks


def test_what_somebody_sent_may_come_back_where_it_says_nothing() -> None:
    owner, other = _party("A"), _party("B")
    judge = Judge(Findings(), [owner, other])
    run_id = owner.things["run_id"]
    judge.look("x", other, (), answers.frame({"type": "error", "code": "NOT_FOUND", "message": f"no {run_id}", "details": {"x": run_id}}))
    assert judge.findings.ok


@pytest.mark.parametrize(
    ("foreign", "unknown", "alike"),
    [
        (answers.Answer("NOT_FOUND", "There is no run a."), answers.Answer("NOT_FOUND", "There is no run b."), True),
        (answers.Answer("PERMISSION_DENIED", "It is another's."), answers.Answer("NOT_FOUND", "It is another's."), False),
        (answers.Answer("NOT_FOUND", "It is another's."), answers.Answer("NOT_FOUND", "There is none."), False),
        (answers.Answer("OK", "", b"", [], [{"runs": [1]}]), answers.Answer("OK", "", b"", [], [{"runs": []}]), False),
        (answers.Answer("UNAVAILABLE"), answers.Answer("NOT_FOUND"), True),
    ],
)
def test_answers_that_tell_foreign_from_unknown_are_found(foreign: answers.Answer, unknown: answers.Answer, alike: bool) -> None:
    judge = Judge(Findings(), [])
    judge.compare("x", "a", foreign, "b", unknown)
    assert judge.findings.ok is alike


async def test_a_stream_that_is_silent_is_listened_to_until_its_owner_has_heard_something() -> None:
    said, heard, owner = asyncio.Queue[str](), list[str](), asyncio.Event()

    async def read() -> listening.Heard:
        heard.append(await said.get())
        said.task_done()
        return listening.Heard.MORE

    async def held() -> None:
        # the owner hears it last: whoever was let in has heard it by then
        said.put_nowait("the owner's")
        await said.join()
        owner.set()

    assert await listening.listen(read, 0, 0)
    assert heard == []
    assert not await listening.listen(read, 0, 0, held)
    assert (heard, owner.is_set()) == (["the owner's"], True)


async def test_a_stream_that_ends_or_is_refused_meanwhile_is_not_waited_for() -> None:
    async def ends() -> listening.Heard:
        return listening.Heard.ENDED

    async def refused() -> listening.Heard:
        raise OSError("refused")

    assert not await listening.listen(ends, 60, 60, asyncio.Event().wait)
    with pytest.raises(OSError, match="refused"):
        await listening.listen(refused, 60, 60, asyncio.Event().wait)


async def test_that_there_is_a_stream_says_nothing_of_how_long_it_may_take() -> None:
    said = iter((listening.Heard.NOTHING, listening.Heard.MORE))
    asked = list[listening.Heard]()

    async def read() -> listening.Heard:
        if (found := next(said, None)) is None:
            await asyncio.Event().wait()
        asked.append(found or listening.Heard.ENDED)
        return asked[-1]

    # with the second patience after the first part, nothing of what comes next would be taken
    await listening.listen(read, 0.2, 0)
    assert asked == [listening.Heard.NOTHING, listening.Heard.MORE]


@pytest.mark.parametrize(
    ("done", "short"),
    [
        ({}, []),
        ({"probes": 2_999}, ["probes"]),
        ({"held": 0}, ["held"]),
        ({"pairs": 0}, ["pairs"]),
        ({"share": 0.5}, ["share"]),
        ({"faults": 3}, ["faults"]),
        ({"faults": 0, "struck": 0}, ["faults"]),
    ],
)
def test_too_little_is_no_proof(done: dict[str, Any], short: list[str]) -> None:
    done = {"probes": 3_000, "held": 1, "pairs": 1, "share": 1.0, "faults": 2, "struck": 2, **done}
    found = Findings(probes=done["probes"], held=done["held"])
    wanted = proof.Wanted(pairs=done["pairs"], share=done["share"], faults=done["faults"])
    report = proof.verdict(found, [], {}, {"faults": {"kill": done["struck"]}}, wanted)
    assert ([one.partition(":")[0] for one in report["short"]], report["ok"]) == (short, not short)


@pytest.mark.parametrize(
    ("codes", "named", "shallow"),
    [
        (["INVALID_PAYLOAD", "UNAUTHENTICATED", "RATE_LIMITED", "UNAVAILABLE"], False, True),
        (["INVALID_PAYLOAD", "NOT_FOUND"], False, False),
        (["INVALID_PAYLOAD", "OK"], True, False),
        (["INVALID_PAYLOAD"], True, True),
        ([], False, True),
    ],
)
def test_an_example_of_which_every_probe_is_refused_for_its_form_is_wrong(codes: list[str], named: bool, shallow: bool) -> None:
    judge = Judge(Findings(), [])
    for code in codes:
        judge.weigh("x", answers.Answer(code), named=named)
    judge.shallow(["x"])
    assert bool(judge.findings.wrong) is shallow


def test_to_be_asked_to_wait_shows_nothing_when_it_is_quiet() -> None:
    judge = Judge(Findings(), [])
    judge.look("x", _party("B"), (), answers.Answer("RATE_LIMITED"), quiet=False)
    assert judge.findings.ok
    judge.look("x", _party("B"), (), answers.Answer("RATE_LIMITED"))
    assert not judge.findings.ok


def test_of_the_record_only_what_was_said_may_be_new() -> None:
    before = {"events.events": {"a"}, "events.heads": {"b", "c"}, "context.threads": {"d"}}
    after = {"events.events": {"a", "e", "f"}, "events.heads": {"b", "g"}, "context.threads": {"d"}}
    assert pulse.changed(before, after, 2) == []
    for name, rows in (("events.events", {"e", "f", "h"}), ("events.heads", {"g", "h"}), ("context.threads", {"h"})):
        assert len(pulse.changed(before, {**after, name: rows}, 2)) == 1, name


def test_something_is_written_in_every_place() -> None:
    places = list(leaves.of_message(events_pb2.FollowThreadRequest.DESCRIPTOR))
    assert places == [("grant_token",), ("positions", "run_id"), ("after_run_id",)]
    (found,) = leaves.written([events_pb2.FollowThreadRequest()], ("positions", "run_id"), "here")
    assert found == events_pb2.FollowThreadRequest(positions=[events_pb2.RunPosition(run_id="here")])
    (inside,) = leaves.written([dispatcher_pb2.StartRunRequest(inputs=b'{"a":1}')], ("inputs", "{}"), "here")
    assert isinstance(inside, dispatcher_pb2.StartRunRequest)
    assert json.loads(inside.inputs) == dict.fromkeys(("user_id", "tenant_id", "thread_id", "run_id", "owner_id"), "here") | {"a": 1}


async def test_what_somebody_has_is_looked_at_when_nothing_of_theirs_goes_on(there: world.World) -> None:
    owner = there["A"]
    # it goes on, and nothing of it changes, for longer than somebody would wait for a change
    run = await there.started(owner, inputs=b'{"pace_s":4.9}')
    found = await tables.still(there, owner.user_id)
    shown = await there.runs.GetRun(dispatcher_pb2.GetRunRequest(run_id=run.run_id), metadata=owner.bearer)
    assert shown.run.state == dispatcher_pb2.RUN_STATE_COMPLETED
    assert found == await tables.digests(there, owner.user_id)


async def test_who_is_refused_for_good_does_not_knock_again(there: world.World) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await there.signed_in(there["A"].email, "not the password")
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
