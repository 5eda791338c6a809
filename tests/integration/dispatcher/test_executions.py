"""What executes in a process that stops is given away: nobody counts it as ended, and it goes on where there is a place for it."""

from __future__ import annotations

from services.dispatcher import executions, wiring
from services.dispatcher.settings import DispatcherSettings
from tests.fixtures import agents as crew_
from tests.fixtures.agents import GATES, Crew, Process, came, of
from tests.fixtures.storage import Services


async def test_an_execution_that_a_process_gives_away_goes_on_in_another(services: Services) -> None:
    await services.auth()
    await services.context()
    await services.events()
    settings = DispatcherSettings(**services.settings("dispatcher"))
    async with wiring.build(settings, agents=crew_.AGENTS, tools=crew_.TOOLS) as first:
        services.ports["dispatcher"], services.started["dispatcher"] = first.port, first
        await first.trust.awaited()
        crew, user = Crew(services), await services.user()
        run_id, mark = await crew.held(user)
        before = crew.process.instance(user, run_id)
        await services.dispatcher(agents=crew_.AGENTS, tools=crew_.TOOLS)
    other = Crew(services)
    # the other one calls the tool again, as nothing had come of it
    await came(mark)
    (left,) = await Process(first).executed(user)
    assert (left.outcome, left.execution_id, left.transitions[-1][0]) == (executions.LEFT, before.execution_id, "active")
    assert first.agents.get_registry_health().instances == 0
    assert other.process.instance(user, run_id).current == "active"
    GATES[mark].set()
    events = await other.ended(user, run_id)
    assert events[-1]["type"] == "agent_completed"
    assert len(of(events, "agent_started")) == len(of(events, "tool_executing")) == len(of(events, "tool_completed")) == 1
    (ended,) = await other.process.executed(user)
    assert (ended.outcome, ended.run_id) == ("completed", run_id)
