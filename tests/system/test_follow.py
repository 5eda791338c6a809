"""A shared thread is followed over the socket: whole and once per run, resumed by positions, beside the follower's own events."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from netra import client, errors, incoming
from tests.fixtures import sharing, sockets
from tests.fixtures.stack import System, gateway_url
from tests.fixtures.users import NewUser, User

_FOLLOW = "netra.events.v1.EventsService/FollowThread"


def _shown(frames: list[dict[str, Any]], stream_id: str) -> dict[str, list[dict[str, Any]]]:
    """The events of a stream, by run."""
    found: dict[str, list[dict[str, Any]]] = {}
    for frame in frames:
        if frame["type"] == "stream_data" and frame["stream_id"] == stream_id:
            for event in frame["data"]["events"]:
                found.setdefault(event["run_id"], []).append(json.loads(base64.b64decode(event["frame"])))
    return found


def _own(socket: sockets.Socket) -> list[dict[str, Any]]:
    """The events of the user whose socket it is."""
    return [frame for frame in socket.frames if "event_id" in frame]


def _without_cursor(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in event.items() if name != "cursor"} for event in events]


async def _followed(socket: sockets.Socket, **request: Any) -> str:
    ack = await socket.ask("STREAM", {"method": _FOLLOW, "request": request})
    assert ack["type"] == "ack", ack
    return str(ack["data"]["stream_id"])


async def _until(socket: sockets.Socket, stream_id: str, *run_ids: str) -> dict[str, list[dict[str, Any]]]:
    """What a stream shows, up to the ends of these runs."""
    while not all(
        run_id in (found := _shown(socket.frames, stream_id)) and found[run_id][-1]["type"] in sockets.ENDS for run_id in run_ids
    ):
        await socket.next(60)
    return found


async def test_a_shared_thread_is_followed_beside_ones_own_events_and_resumed(system: System, new_user: NewUser) -> None:
    owner, grantee = new_user(), new_user()
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{system.ports['context']}") as to,
        sockets.opened(system, owner) as theirs,
        sockets.opened(system, grantee) as mine,
    ):
        shared = sharing.Sharing(to)
        first = await theirs.run()
        thread_id = first["thread_id"]
        own = await theirs.ended(first["run_id"])
        await shared.grant(owner, thread_id, grantee)
        stream_id = await _followed(mine, grant_token=await shared.token(grantee, thread_id))
        # both at once
        second, third = await asyncio.gather(theirs.run(thread_id=thread_id), mine.run(thread_id=thread_id))
        shown = await _until(mine, stream_id, first["run_id"], second["run_id"], third["run_id"])
        assert shown[first["run_id"]] == _without_cursor(own)
        assert shown[second["run_id"]] == _without_cursor(await theirs.ended(second["run_id"]))
        assert shown[third["run_id"]] == _without_cursor(await mine.ended(third["run_id"]))
        # the follower's own events are the follower's, and nobody else's: their cursor counts nothing of the stream
        for socket, user in ((mine, grantee), (theirs, owner)):
            assert {event["user_id"] for event in _own(socket)} == {user.user_id}
            assert [event["cursor"] for event in _own(socket)] == list(range(1, len(_own(socket)) + 1))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{system.ports['context']}") as to, sockets.opened(system, grantee) as again:
        assert again.frames[0]["cursor"] == len(_own(mine))
        token = await sharing.Sharing(to).token(grantee, thread_id)
        positions = [{"run_id": second["run_id"], "seq": 2}]
        stream_id = await _followed(
            again, grant_token=token, positions=positions, after_run_id=max(run["run_id"] for run in (second, third))
        )
        rest = await _until(again, stream_id, second["run_id"])
        assert rest == {second["run_id"]: shown[second["run_id"]][2:]}
        refused = await again.ask("STREAM", {"method": _FOLLOW, "request": {"grant_token": token[:-4]}})
        end = await again.until(type="stream_end", stream_id=refused["data"]["stream_id"])
        assert end["code"] == "UNAUTHENTICATED"


async def test_the_client_follows_a_thread_until_it_is_no_longer_shared(system: System, new_user: NewUser) -> None:
    owner, grantee = new_user(), new_user()
    async with (
        client.connect(gateway_url(system), owner.token) as theirs,
        client.connect(gateway_url(system), grantee.token) as mine,
        asyncio.timeout(120),
    ):
        first = await theirs.start("text-analyst", user_request="Rivers carry boats.")
        own = [event async for event in theirs.events(first["run_id"], follow=True)]
        await theirs.api.share(first["thread_id"], grantee.email)
        assert [grant["grantee_id"] for grant in await theirs.api.grants(first["thread_id"])] == [grantee.user_id]
        assert [event async for event in mine.follow(first["thread_id"], live=False)] == _without_cursor(own)
        live = mine.follow(first["thread_id"])
        assert [await anext(live) for _ in own] == _without_cursor(own)
        second = await theirs.start("text-analyst", user_request="Boats carry people.", thread_id=first["thread_id"])
        seen = [await anext(live)]
        while seen[-1]["type"] not in sockets.ENDS:
            seen.append(await anext(live))
        assert seen == _without_cursor([event async for event in theirs.events(second["run_id"])])
        await theirs.api.unshare(first["thread_id"], grantee.user_id)
        try:
            assert [event async for event in mine.follow(first["thread_id"], live=False)] == []
        except errors.NotFound:
            pass
        else:
            raise AssertionError("a thread that is not shared was followed")


async def test_who_reads_a_run_slowly_has_all_of_it_once_and_in_order(
    system: System, new_user: NewUser, monkeypatch: pytest.MonkeyPatch
) -> None:
    # so little room that most of what comes is left to the record
    monkeypatch.setattr(incoming, "_FRAMES", 2)
    async with client.connect(gateway_url(system), new_user().token) as mine, asyncio.timeout(120):
        run = mine.run("text-analyst", user_request="Rivers carry boats. Boats carry people.")
        seen = [await anext(run)]
        run_id = seen[0]["run_id"]
        whole = [event async for event in mine.events(run_id, follow=True)]
        while True:
            if mine.cursor == whole[-1]["cursor"]:
                break
            await asyncio.sleep(0.02)
        assert len(whole) > 2 + len(seen)
        seen += [event async for event in run]
        assert seen == whole
        # and a run that is read as it comes goes on beside
        assert [event["seq"] async for event in mine.run("text-analyst", user_request="Again.")][-1] > 2


class _Line:
    """The command line of one user."""

    def __init__(self, system: System, user: User, home: Path) -> None:
        self._variables = {"NETRA_URL": gateway_url(system), "NETRA_TOKEN": user.token, "PATH": "/usr/bin:/bin", "HOME": str(home)}

    async def __call__(self, *words: str) -> list[dict[str, Any]]:
        """What a command prints; the message on stderr as `error` when it fails."""
        return await asyncio.to_thread(self._call, *words)

    def _call(self, *words: str) -> list[dict[str, Any]]:
        called = [sys.executable, "-m", "netra.cli", *words]
        done = subprocess.run(called, env=self._variables, capture_output=True, text=True, timeout=90, check=False)
        return [json.loads(line) for line in done.stdout.splitlines()] if done.returncode == 0 else [{"error": done.stderr}]


async def _ran(system: System, user: User) -> list[dict[str, Any]]:
    """The events of a run."""
    async with sockets.opened(system, user) as socket:
        return await socket.ended((await socket.run())["run_id"])


async def test_threads_are_shared_and_followed_on_the_command_line(system: System, new_user: NewUser, tmp_path: Path) -> None:
    owner, grantee = new_user(), new_user()
    theirs, mine = _Line(system, owner, tmp_path), _Line(system, grantee, tmp_path)
    events = await _ran(system, owner)
    thread_id = events[-1]["thread_id"]
    (grant,) = await theirs("share", thread_id, grantee.email, "--write", "--json")
    assert (grant["grantee_id"], grant["access"]) == (grantee.user_id, "write")
    shared, followed = await asyncio.gather(mine("threads", "--shared", "--json"), mine("follow", thread_id, "--once", "--json"))
    assert [(each["thread_id"], each["owner_id"], each["access"]) for each in shared] == [(thread_id, owner.user_id, "write")]
    assert followed == _without_cursor(events)
    (withdrawn,) = await theirs("unshare", thread_id, grantee.user_id, "--json")
    assert withdrawn["withdrawn_at"] is not None
    assert "NOT_FOUND" in (await mine("follow", thread_id, "--once", "--json"))[0]["error"]


async def test_what_is_kept_is_taken_along_and_erased_on_the_command_line(system: System, new_user: NewUser, tmp_path: Path) -> None:
    owner = new_user()
    line, events = _Line(system, owner, tmp_path), await _ran(system, owner)
    assert await line("export", str(tmp_path / "all.ndjson")) == []
    lines = [json.loads(line) for line in (tmp_path / "all.ndjson").read_text().splitlines()]
    assert [line["event"] for line in lines if line["kind"] == "event"] == events
    assert lines[-1] == {"kind": "end", "lines": len(lines) - 1}
    (erased,) = await line("erase", events[-1]["thread_id"], "--yes", "--json")
    assert (erased["events"], erased["runs"]) == (len(events), 1)
    left = await line("events", events[-1]["run_id"], "--json")
    assert [(event["cursor"], event["data"]) for event in left] == [(event["cursor"], {"erased": True}) for event in events]
