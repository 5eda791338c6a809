"""A logout leaves accepted runs alone; what ends for reasons of security takes them along; tools wait while auth is silent."""

from __future__ import annotations

import asyncio
from typing import Any

import orjson
import pytest

from netra import errors, ids
from netra.agent import Turn, agent
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.dispatcher.v1 import dispatcher_pb2
from netra.tool import tool
from services.dispatcher import runs, store, store_system
from tests.fixtures.accounts import refused
from tests.fixtures.policies import Administrator
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.conftest import Runs, types

CALLED: list[str] = []


class Held:
    """Agents that begin and wait to be let go, by the mark in their inputs."""

    def __init__(self) -> None:
        self.began: dict[str, asyncio.Event] = {}
        self.released: dict[str, asyncio.Event] = {}

    def mark(self) -> str:
        """A fresh mark."""
        mark = ids.uuid7()
        self.began[mark], self.released[mark] = asyncio.Event(), asyncio.Event()
        return mark


HELD = Held()


@agent("held")
async def held(turn: Turn) -> str:
    """Waits until the test lets it go."""
    mark = str(turn.inputs["mark"])
    HELD.began[mark].set()
    await HELD.released[mark].wait()
    return "done"


@tool(timeout_s=20)
async def touch(mark: str) -> str:
    """Says that it was called."""
    CALLED.append(mark)
    return "touched"


@agent("toucher")
async def toucher(turn: Turn) -> str:
    """Waits, then calls a tool."""
    mark = str(turn.inputs["mark"])
    HELD.began[mark].set()
    await HELD.released[mark].wait()
    return str(await turn.tool("touch", mark=mark))


@tool(permission="users:write")
async def govern() -> str:
    """Is for administrators."""
    return "governed"


@agent("governor")
async def governor(turn: Turn) -> str:
    """Waits, then calls a tool for administrators."""
    mark = str(turn.inputs["mark"])
    HELD.began[mark].set()
    await HELD.released[mark].wait()
    try:
        return str(await turn.tool("govern"))
    except errors.PermissionDenied as error:
        return error.details.get("permission") or error.details["tiers"]


MORE: dict[str, Any] = {"agents": [held, toucher, governor], "tools": [touch, govern]}


class Stops:
    """What ends sessions and users."""

    def __init__(self, services: Services, runs: Runs) -> None:
        self.services, self.runs = services, runs
        self.stub: auth_pb2_grpc.AuthServiceAsyncStub = auth_pb2_grpc.AuthServiceStub(services.channel("auth"))
        self.administrator = Administrator(services)

    async def login(self, user: User) -> User:
        """Another session of the user."""
        grant = auth_pb2.PasswordGrant(email=user.email, password=user.password)
        tokens = (await self.stub.IssueToken(auth_pb2.IssueTokenRequest(password=grant))).tokens
        return User(user.user_id, user.email, user.password, tokens.access_token, tokens.refresh_token)

    async def disable(self, user: User, *, then_enable: bool = True) -> None:
        """Stop the user; and let them in again, so that they can see what became of their runs."""
        admin = (await Administrator(self.services).signed_in()).bearer
        await self.stub.DisableUser(auth_pb2.DisableUserRequest(user_id=user.user_id), metadata=admin)
        if then_enable:
            await self.stub.EnableUser(auth_pb2.EnableUserRequest(user_id=user.user_id), metadata=admin)

    async def held(self, user: User, agent: str = "held", **more: Any) -> tuple[str, str]:
        """A run that has begun: its id and its mark."""
        mark = HELD.mark()
        run = await self.runs.start(user, agent, inputs={"mark": mark}, **more)
        await asyncio.wait_for(HELD.began[mark].wait(), 20)
        return run.run_id, mark

    async def behind(self, user: User, run_id: str, agent: str = "held") -> tuple[str, str]:
        """A run that waits for another one on its thread: its id and its mark."""
        found, mark = await self.runs.dispatcher.GetRun(dispatcher_pb2.GetRunRequest(run_id=run_id), metadata=user.bearer), HELD.mark()
        return (await self.runs.start(user, agent, inputs={"mark": mark}, thread_id=found.run.thread_id)).run_id, mark

    async def change(self, user: User, *roles: str, tier: str = "") -> None:
        """Give the user other rights."""
        request = auth_pb2.UpdateUserRequest(user_id=user.user_id, roles=roles, tier=tier)
        await self.stub.UpdateUser(request, metadata=self.administrator.bearer)

    async def new_password(self, user: User, old: str, new: str, *, cancel_runs: bool) -> int:
        """Change the user's password; how many other sessions ended."""
        request = auth_pb2.ChangePasswordRequest(current_password=old, new_password=new, cancel_runs=cancel_runs)
        return (await self.stub.ChangePassword(request, metadata=user.bearer)).sessions_ended

    async def ending(self, user: User, run_id: str) -> dict[str, Any]:
        """The last event of a run."""
        return (await asyncio.wait_for(self.runs.ended(user, run_id), 20))[-1]


@pytest.fixture
async def stops(services: Services) -> Stops:
    """All services."""
    await services.all(**MORE)
    return Stops(services, Runs(services))


async def test_a_logout_leaves_accepted_runs_alive(stops: Stops) -> None:
    user = await stops.services.user()
    run_id, mark = await stops.held(user)
    await stops.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)
    again = await stops.login(user)
    HELD.released[mark].set()
    assert (await stops.ending(again, run_id))["type"] == "agent_completed"


async def test_ending_all_sessions_leaves_accepted_runs_alive(stops: Stops) -> None:
    user = await stops.services.user()
    run_id, mark = await stops.held(user)
    await stops.stub.EndSessions(auth_pb2.EndSessionsRequest(all=True), metadata=user.bearer)
    again = await stops.login(user)
    HELD.released[mark].set()
    assert (await stops.ending(again, run_id))["type"] == "agent_completed"


async def test_disabling_a_user_cancels_what_runs_and_what_waits_and_says_why(stops: Stops) -> None:
    user, other = await stops.services.user(), await stops.services.user()
    running, _ = await stops.held(user)
    waiting, _ = await stops.behind(user, running)
    untouched, mark = await stops.held(other)
    await stops.disable(user)
    again = await stops.login(user)
    for run_id in (running, waiting):
        end = await stops.ending(again, run_id)
        assert (end["type"], end["data"]["by"]) == ("agent_cancelled", "security")
    HELD.released[mark].set()
    assert (await stops.ending(other, untouched))["type"] == "agent_completed"


async def test_runs_of_sessions_that_ended_long_ago_are_the_users_too(stops: Stops) -> None:
    user = await stops.services.user()
    running, _ = await stops.held(user)
    waiting, _ = await stops.behind(user, running)
    await stops.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)
    await stops.disable(user)
    again = await stops.login(user)
    for run_id in (running, waiting):
        end = await stops.ending(again, run_id)
        assert (end["type"], end["data"]["by"]) == ("agent_cancelled", "security")


async def test_what_begins_after_the_user_was_let_in_again_goes_on(stops: Stops) -> None:
    user = await stops.services.user()
    await stops.disable(user)
    again = await stops.login(user)
    run_id, mark = await stops.held(again)
    HELD.released[mark].set()
    assert (await stops.ending(again, run_id))["type"] == "agent_completed"


async def test_a_refresh_token_used_again_cancels_the_runs_of_its_session_only(stops: Stops) -> None:
    user = await stops.services.user()
    elsewhere = await stops.login(user)
    here_run, _ = await stops.held(user)
    there_run, mark = await stops.held(elsewhere)
    token = user.refresh_token
    for _ in range(2):  # the child is used as well, so that the first one is no lost answer
        request = auth_pb2.RefreshTokenRequest(refresh_token=token)
        token = (await stops.stub.RefreshToken(request)).tokens.refresh_token
    again = stops.stub.RefreshToken(auth_pb2.RefreshTokenRequest(refresh_token=user.refresh_token))
    assert (await refused(again)).code == "UNAUTHENTICATED"
    end = await stops.ending(elsewhere, here_run)
    assert (end["type"], end["data"]["by"]) == ("agent_cancelled", "security")
    HELD.released[mark].set()
    assert (await stops.ending(elsewhere, there_run))["type"] == "agent_completed"


@pytest.mark.parametrize(("cancel_runs", "ending"), [(True, "agent_cancelled"), (False, "agent_completed")])
async def test_a_change_of_the_password_cancels_runs_when_asked_to(stops: Stops, cancel_runs: bool, ending: str) -> None:
    user = await stops.services.user()
    elsewhere = await stops.login(user)
    there, mark = await stops.held(elsewhere)
    mine, my_mark = await stops.held(user)
    assert await stops.new_password(user, user.password, "another good password", cancel_runs=cancel_runs) == 1
    if not cancel_runs:
        HELD.released[mark].set()
    assert (await stops.ending(user, there))["type"] == ending
    # the session that asked for it goes on, and so do its runs
    HELD.released[my_mark].set()
    assert (await stops.ending(user, mine))["type"] == "agent_completed"


@pytest.mark.parametrize("thought_again", [True, False])
async def test_runs_of_somebody_who_has_left_are_cancelled_with_a_change_of_the_password(stops: Stops, thought_again: bool) -> None:
    user = await stops.services.user()
    thief = await stops.login(user)
    there, _ = await stops.held(thief)
    waiting, _ = await stops.behind(thief, there)
    mine, my_mark = await stops.held(user)
    password = user.password
    if thought_again:
        # nothing was to be cancelled, at first
        await stops.new_password(user, password, password := "another good password", cancel_runs=False)
    else:
        await stops.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=thief.bearer)
    assert await stops.new_password(user, password, "yet another good password", cancel_runs=True) == 0
    for run_id in (there, waiting):
        end = await stops.ending(user, run_id)
        assert (end["type"], end["data"]["by"]) == ("agent_cancelled", "security")
    HELD.released[my_mark].set()
    assert (await stops.ending(user, mine))["type"] == "agent_completed"


class TestRights:
    """A run does no more than its user may by now, and no more than they could when they started it."""

    @pytest.fixture
    async def stops(self, stops: Stops) -> Stops:
        """All services, and an administrator."""
        await stops.administrator.signed_in()
        return stops

    async def _result(self, stops: Stops, user: User, run_id: str, mark: str) -> Any:
        HELD.released[mark].set()
        end = await stops.ending(user, run_id)
        assert end["type"] == "agent_completed"
        return end["data"]["result"]

    async def test_an_administrator_who_is_none_any_more_has_no_run_that_is(self, stops: Stops) -> None:
        user = await stops.services.user(role="admin")
        running, first = await stops.held(user, "governor")
        waiting, second = await stops.behind(user, running, "governor")
        await stops.change(user, "user")
        again = await stops.login(user)
        assert await self._result(stops, again, running, first) == "users:write"
        assert await self._result(stops, again, waiting, second) == "users:write"

    async def test_a_lower_tier_counts_at_once(self, stops: Stops) -> None:
        user = await stops.services.user(role="admin")
        rule = auth_pb2.ToolRule(tool="govern", tiers=["internal"])
        await stops.administrator.change_everywhere(lambda policy: policy.tools.extend([rule]))
        running, mark = await stops.held(user, "governor")
        await stops.change(user, tier="free")
        assert await self._result(stops, await stops.login(user), running, mark) == "internal"

    async def test_rights_that_come_later_are_for_what_begins_later(self, stops: Stops) -> None:
        user = await stops.services.user()
        running, first = await stops.held(user, "governor")
        await stops.change(user, "admin", "user")
        again = await stops.login(user)
        # nobody is signed out by having more
        await stops.runs.dispatcher.ListRuns(dispatcher_pb2.ListRunsRequest(), metadata=user.bearer)
        await stops.stub.ListSessions(auth_pb2.ListSessionsRequest(), metadata=user.bearer)
        fresh, second = await stops.held(again, "governor")
        assert await self._result(stops, again, running, first) == "users:write"
        assert await self._result(stops, again, fresh, second) == "governed"

    @pytest.mark.parametrize("how", ["claimed", "begun at once"])
    async def test_a_change_while_the_run_is_on_its_way_to_a_process_comes_after_it(
        self, stops: Stops, monkeypatch: pytest.MonkeyPatch, how: str
    ) -> None:
        claim, narrow, renew = store_system.SystemStore.claim, store_system.SystemStore.narrow, store_system.SystemStore.renew
        claimed, changed, renewed, idle = asyncio.Event(), asyncio.Event(), asyncio.Condition(), asyncio.Event()
        add = store.Store.add

        async def slow(self: store_system.SystemStore, *arguments: Any, **more: Any) -> Any:
            if how == "begun at once" and not claimed.is_set():
                # what is idle, and is not just looking, begins what it accepts
                idle.set()
                return runs.Claims()
            found = await claim(self, *arguments, **more)
            if found:
                claimed.set()
                await asyncio.wait_for(changed.wait(), 20)
            return found

        async def added(self: store.Store, *arguments: Any, **more: Any) -> Any:
            if how == "claimed":
                return await add(self, *arguments, **{**more, "owner": ""})
            found = await add(self, *arguments, **more)
            assert found.leased_at
            claimed.set()
            await asyncio.wait_for(changed.wait(), 20)
            return found

        async def noted(self: store_system.SystemStore, *arguments: Any) -> None:
            await narrow(self, *arguments)
            changed.set()

        async def again(self: store_system.SystemStore, *arguments: Any) -> Any:
            found = await renew(self, *arguments)
            async with renewed:
                renewed.notify_all()
            return found

        async def begun() -> str:
            call = stops.runs.start(user, "governor", inputs={"mark": mark})
            return str((await call).run_id if how == "claimed" else (await refused(call)).code)

        for name, patched in (("claim", slow), ("narrow", noted), ("renew", again)):
            monkeypatch.setattr(store_system.SystemStore, name, patched)
        monkeypatch.setattr(store.Store, "add", added)
        user, mark = await stops.services.user(role="admin"), HELD.mark()
        if how == "begun at once":
            await asyncio.wait_for(idle.wait(), 20)
        async with asyncio.TaskGroup() as group:
            starting = group.create_task(begun())
            await asyncio.wait_for(claimed.wait(), 20)
            await stops.change(user, "user")
        signed_in = await stops.login(user)
        page = await stops.runs.dispatcher.ListRuns(dispatcher_pb2.ListRunsRequest(), metadata=signed_in.bearer)
        (run,) = page.runs
        # a call ends with the session it was made in, and another look goes on with the run
        assert starting.result() == (run.run_id if how == "claimed" else "UNAUTHENTICATED")
        await asyncio.wait_for(HELD.began[mark].wait(), 20)
        async with asyncio.timeout(20), renewed:
            # one look may have been under way
            await renewed.wait()
            await renewed.wait()
        assert await self._result(stops, signed_in, run.run_id, mark) == "users:write"

    async def test_what_is_given_back_is_there_again(self, stops: Stops) -> None:
        user = await stops.services.user(role="admin")
        running, first = await stops.held(user, "governor")
        waiting, second = await stops.behind(user, running, "governor")
        await stops.change(user, "user")
        await stops.change(user, "admin")
        again = await stops.login(user)
        assert await self._result(stops, again, running, first) == "governed"
        assert await self._result(stops, again, waiting, second) == "governed"


async def test_a_run_that_is_being_stored_meanwhile_is_cancelled_as_well(stops: Stops, monkeypatch: pytest.MonkeyPatch) -> None:
    user, add, revoke = await stops.services.user(), store.Store.add, store_system.SystemStore.revoke
    storing, looked = asyncio.Event(), asyncio.Event()

    async def late(self: store.Store, *arguments: Any, **more: Any) -> Any:
        storing.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            # the call is cut off, but what it sent to the database gets there
            await asyncio.wait_for(looked.wait(), 20)
            await add(self, *arguments, **more)
            raise

    async def noted(self: store_system.SystemStore, *arguments: Any) -> None:
        await revoke(self, *arguments)
        looked.set()

    monkeypatch.setattr(store.Store, "add", late)
    monkeypatch.setattr(store_system.SystemStore, "revoke", noted)
    async with asyncio.TaskGroup() as group:
        starting = group.create_task(refused(stops.runs.start(user, "held", inputs={"mark": HELD.mark()})))
        await asyncio.wait_for(storing.wait(), 20)
        await stops.disable(user)
    assert starting.result().code == "UNAUTHENTICATED"
    again = await stops.login(user)
    run_id = (await stops.runs.dispatcher.ListRuns(dispatcher_pb2.ListRunsRequest(), metadata=again.bearer)).runs[0].run_id
    end = await stops.ending(again, run_id)
    assert (end["type"], end["data"]["by"]) == ("agent_cancelled", "security")


async def test_runs_of_another_dispatcher_are_cancelled_too(stops: Stops) -> None:
    user = await stops.services.user()
    first = [await stops.held(user) for _ in range(3)]
    await stops.services.dispatcher(**MORE)
    await asyncio.wait_for(stops.services.trusts[-1].awaited(), 20)
    second = Stops(stops.services, Runs(stops.services))
    others = [await second.held(user) for _ in range(3)]
    await stops.disable(user)
    again = await stops.login(user)
    for run_id, _ in (*first, *others):
        assert (await stops.ending(again, run_id))["data"]["by"] == "security"


class TestSilence:
    """While auth was not heard of for too long, nobody knows who was stopped: tools wait."""

    @pytest.fixture
    async def careful(self, services: Services) -> Stops:
        """A dispatcher that is careful almost at once: auth speaks every five seconds, when nothing changes."""
        for start in (services.auth, services.context, services.events):
            await start()
        await services.dispatcher(**MORE, trust_stale_s=1.0)
        return Stops(services, Runs(services))

    async def _until_stale(self, stops: Stops) -> None:
        async with asyncio.timeout(10):
            while stops.services.trusts[-1].fresh:  # noqa: ASYNC110 - nobody tells of a silence
                await asyncio.sleep(0.005)

    async def _waiting(self, stops: Stops, user: User, run_id: str) -> None:
        """Returns when the tool call has been told and so waits."""
        await stops.runs.until(user, run_id, "tool_executing")

    async def test_a_tool_waits_until_auth_is_heard_of(self, careful: Stops) -> None:
        user, other = await careful.services.user(), await careful.services.user()
        run_id, mark = await careful.held(user, "toucher")
        await self._until_stale(careful)
        HELD.released[mark].set()
        await self._waiting(careful, user, run_id)
        assert mark not in CALLED
        # any word will do
        await careful.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=other.bearer)
        assert (await careful.ending(user, run_id))["type"] == "agent_completed"
        assert mark in CALLED

    async def test_a_tool_is_not_called_for_a_user_who_was_stopped_meanwhile(self, careful: Stops) -> None:
        user = await careful.services.user()
        run_id, mark = await careful.held(user, "toucher")
        await self._until_stale(careful)
        HELD.released[mark].set()
        await self._waiting(careful, user, run_id)
        await careful.disable(user)
        events = await careful.runs.ended(await careful.login(user), run_id)
        assert types(events)[-2:] == ["tool_completed", "agent_cancelled"]
        assert events[-2]["data"]["status"] == "cancelled"
        assert events[-1]["data"]["by"] == "security"
        assert mark not in CALLED


@tool(timeout_s=60)
async def endless(mark: str) -> str:
    """Waits until the test lets it go."""
    HELD.began[mark].set()
    await HELD.released[mark].wait()
    return "done"


@pytest.mark.parametrize("disabled", [True, False])
async def test_an_interactive_call_is_cut_off_and_its_run_ends_with_the_user_only(stops: Stops, disabled: bool) -> None:
    user, mark, request_id = await stops.services.user(), HELD.mark(), ids.uuid7()
    await stops.services.dispatcher(agents=[held], tools=[endless])
    await asyncio.wait_for(stops.services.trusts[-1].awaited(), 20)
    runs = Runs(stops.services)
    arguments = orjson.dumps({"mark": mark})
    request = dispatcher_pb2.ExecuteToolRequest(request_id=request_id, tool_name="endless", arguments=arguments)
    call = runs.dispatcher.ExecuteTool(request, metadata=user.bearer, wait_for_ready=True, timeout=30)
    async with asyncio.TaskGroup() as group:
        cut = group.create_task(refused(call))
        await asyncio.wait_for(HELD.began[mark].wait(), 20)
        if disabled:
            await stops.disable(user)
        else:
            await stops.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)
    assert cut.result().code == "UNAUTHENTICATED"
    again = await stops.login(user)
    if not disabled:
        HELD.released[mark].set()
    run_id = (await runs.dispatcher.ListRuns(dispatcher_pb2.ListRunsRequest(), metadata=again.bearer)).runs[0].run_id
    end = await stops.ending(again, run_id)
    assert (end["type"], end["data"]["status"]) == ("tool_completed", "cancelled" if disabled else "success")


async def test_a_refresh_token_used_again_after_the_logout_cancels_the_runs_that_went_on(stops: Stops) -> None:
    user = await stops.services.user()
    run_id, _ = await stops.held(user)
    token = user.refresh_token
    for _ in range(2):
        token = (await stops.stub.RefreshToken(auth_pb2.RefreshTokenRequest(refresh_token=token))).tokens.refresh_token
    await stops.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)
    stolen = stops.stub.RefreshToken(auth_pb2.RefreshTokenRequest(refresh_token=user.refresh_token))
    assert (await refused(stolen)).code == "UNAUTHENTICATED"
    end = await stops.ending(await stops.login(user), run_id)
    assert (end["type"], end["data"]["by"]) == ("agent_cancelled", "security")
