"""A part of `make prove-isolation` inside the suite; and that it can fail: what is made up, or missing, is found."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest

from netra import ids
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2
from tests.fixtures.stack import System
from tests.fixtures.users import User
from tests.prove.isolation import answers, leaves, people, probes, proof, settle, world
from tests.prove.isolation.judge import Findings, Judge

# of each kind of thing and each way in, one
SLICE = (
    "dispatcher.GetRun", "context.GetContext", "context.ListMessages", "context.GetArtifact", "context.ListArtifacts", "events.Subscribe",
    "events.ListEvents", "auth.ListSessions", "GET /v1/runs/{run_id}", "DELETE /v1/artifacts/{artifact_id}", "CANCEL",
    "POST /rpc/netra.dispatcher.v1.DispatcherService/CancelRun", "STREAM events.Subscribe",
)  # fmt: skip


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
    await proof.asked(probes.Prober(there, judge, random.Random(7), values=2), chosen)
    assert proof.verdict(found, missing, figures, {})["ok"], proof.verdict(found, missing, figures, {})
    assert (found.controls, found.probes > 100) == (2 * len(SLICE), True)

    forged = Findings(forged={"leak", "difference", "control"})
    judge = Judge(forged, [there["A"], there["B"]])
    some = {name: known[name] for name in ("dispatcher.GetRun",)}
    await proof.controls(there, judge, some)
    await proof.asked(probes.Prober(there, judge, random.Random(7), values=1), some)
    assert (len(forged.leaks), len(forged.differences), len(forged.controls_failed), forged.forged) == (1, 1, 1, set())
    assert not proof.verdict(forged, [], figures, {})["ok"]

    without, missing, figures = await proof.coverage(there, frozenset({"missing"}))
    assert "rpcs: context.GetThread" in missing
    assert figures["rpcs"][0] == figures["rpcs"][1] - 1
    assert not proof.verdict(Findings(), missing, figures, {})["ok"]

    way, example = without["dispatcher.GetRun"]
    await probes.control(there, judge, way, dataclasses.replace(example, make=_unknown), "a run that is not there", there["A"])
    await probes.control(there, judge, way, dataclasses.replace(example, shows=("email",)), "a run without what it must show", there["A"])
    assert [one.partition(" as ")[0] for one in forged.controls_failed[1:]] == [
        "a run that is not there",
        "a run without what it must show",
    ]


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


def test_something_is_written_in_every_place() -> None:
    places = list(leaves.of_message(events_pb2.FollowThreadRequest.DESCRIPTOR))
    assert places == [("grant_token",), ("positions", "run_id"), ("after_run_id",)]
    (found,) = leaves.written([events_pb2.FollowThreadRequest()], ("positions", "run_id"), "here")
    assert found == events_pb2.FollowThreadRequest(positions=[events_pb2.RunPosition(run_id="here")])
    (inside,) = leaves.written([dispatcher_pb2.StartRunRequest(inputs=b'{"a":1}')], ("inputs", "{}"), "here")
    assert isinstance(inside, dispatcher_pb2.StartRunRequest)
    assert json.loads(inside.inputs) == dict.fromkeys(("user_id", "tenant_id", "thread_id", "run_id", "owner_id"), "here") | {"a": 1}
