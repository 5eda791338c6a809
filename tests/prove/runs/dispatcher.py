"""python -m tests.prove.runs.dispatcher: a dispatcher with the agents and tools of the proof, which can be held around its agents, too."""

from __future__ import annotations

import functools
import os
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from chassis import environment, lifecycle
from netra import ids
from services.dispatcher import engine, runs, store, store_system, wiring
from services.dispatcher.settings import DispatcherSettings
from tests.prove.runs import agents, outside, tools

FOLDER = "PROVE_FOLDER"
_HOLDABLE = {"finishing": agents.FINISHING, "ended": agents.ENDED, "suspended": agents.SUSPENDED}


class Holding:
    """Stops this process's runs where no agent is: before one begins, and where the end or the suspension of one is stored."""

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._inputs: dict[str, dict[str, Any]] = {}

    def install(self) -> None:
        """From now on, in this process. What is held has a name in the inputs of its run."""
        _replace(engine.ExecutionEngine, "run", self._beginning)
        for name, place in _HOLDABLE.items():
            _replace(store_system.SystemStore, name, functools.partial(self._before, place))
        _replace(store_system.SystemStore, "finishing", functools.partial(self._after, agents.FINISHED))
        _replace(store_system.SystemStore, "claim", self._unless_idle)
        _replace(store.Store, "add", self._waiting_if_idle)

    async def _held(self, run_id: str, place: str) -> None:
        inputs = self._inputs.get(run_id, {})
        if inputs.get("hold") == place:
            await outside.held(self._folder, inputs["gate"], inputs["mark"], place)

    def _beginning(self, run: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def held(of: engine.ExecutionEngine, running: engine.Running) -> None:
            order = running.claim.order
            self._inputs[order.run_id] = orjson.loads(order.inputs or b"{}")
            await self._held(order.run_id, agents.OPEN)
            try:
                await run(of, running)
            finally:
                self._inputs.pop(order.run_id, None)

        return held

    def _before(self, place: str, store: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def held(of: store_system.SystemStore, run_id: str, *rest: Any, **more: Any) -> Any:
            await self._held(run_id, place)
            return await store(of, run_id, *rest, **more)

        return held

    def _after(self, place: str, store: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def held(of: store_system.SystemStore, run_id: str, *rest: Any, **more: Any) -> Any:
            found = await store(of, run_id, *rest, **more)
            await self._held(run_id, place)
            return found

        return held

    @property
    def _is_idle(self) -> bool:
        return outside.is_open(f"{self._folder}/{outside.IDLE}{os.getpid()}")

    def _unless_idle(self, claim: Callable[..., Awaitable[runs.Claims]]) -> Callable[..., Awaitable[runs.Claims]]:
        async def claimed(of: store_system.SystemStore, *rest: Any, **more: Any) -> runs.Claims:
            return runs.Claims() if self._is_idle else await claim(of, *rest, **more)

        return claimed

    def _waiting_if_idle(self, add: Callable[..., Awaitable[runs.Added]]) -> Callable[..., Awaitable[runs.Added]]:
        async def added(of: store.Store, user_id: ids.UserId, run: runs.Order, **more: Any) -> runs.Added:
            # what would begin at once where it was accepted is another's
            return await add(of, user_id, run, **({**more, "owner": ""} if self._is_idle and run.kind == "agent" else more))

        return added


def _replace(kind: type, name: str, around: Callable[[Any], Any]) -> None:
    setattr(kind, name, around(getattr(kind, name)))


def main() -> None:
    """Serve."""
    Holding(environment.get_environment().get(FOLDER) or "").install()
    lifecycle.run("dispatcher", DispatcherSettings.load, functools.partial(wiring.build, agents=agents.ALL, tools=tools.ALL))


if __name__ == "__main__":
    main()
