"""Starts the table in order, restarts what dies, stops in reverse."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from standalone import backends, child, folder, login, ports, prepare, processes
from standalone.keeper import Changed, Keeper
from standalone.progress import Progress


class Stack:
    """The running system as a context manager: ready on entry, gone on exit.

    async with Stack(folder, ports=...) as stack:
        stack.kill("events")
        await stack.ready("events")
    """

    def __init__(
        self,
        path: Path,
        ports: Mapping[str, int] | None = None,
        *,
        table: Sequence[processes.Process] = processes.TABLE,
        backend: str | None = None,
        environment: Mapping[str, str] | None = None,
        database: str = "netra",
        postgres_settings: Mapping[str, str] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self._wanted = backends.wanted(backend)
        # stores of compose have secrets of their own, which must not replace those of the embedded stores
        self.place = folder.Folder(Path(path).resolve(), "secrets-compose" if self._wanted == "compose" else "secrets")
        self.ports = dict(ports or processes.default_ports(tuple(table)))
        self._table = table
        self._environment = environment
        self._database = database
        self._postgres_settings = postgres_settings
        self._progress = progress or Progress(quiet=True)
        self._keepers: dict[str, Keeper] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._changed = Changed()
        self._prepared = asyncio.Event()
        self._exit = contextlib.AsyncExitStack()
        self.backend: backends.Backend
        self.setting: processes.Setting

    async def __aenter__(self) -> Self:
        try:
            await self._exit.enter_async_context(self._running())
        except BaseException:
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exit.aclose()

    @contextlib.asynccontextmanager
    async def _running(self) -> AsyncIterator[None]:
        with folder.held(self.place):
            self._set_up()
            await self.backend.start()
            self.setting = self._setting()
            try:
                async with self._owned() as group:
                    await self._start(group)
                    yield
            finally:
                await self.backend.stop()
                self.place.state_file.unlink(missing_ok=True)

    @contextlib.asynccontextmanager
    async def _owned(self) -> AsyncIterator[asyncio.TaskGroup]:
        """A task group whose body raises what it raises, not a group of it; stops all at the end."""
        group = asyncio.TaskGroup()
        await group.__aenter__()
        try:
            yield group
        finally:
            await self._stop()
            await group.__aexit__(None, None, None)

    def _set_up(self) -> None:
        """Everything on disk and in memory that needs no process."""
        if ended := folder.sweep(self.place):
            self._progress.step(f"ended what an earlier start left: {', '.join(ended)}")
        prepare.secrets(self.place.secrets)
        self.backend = backends.choose(self._wanted, self.place, self.ports, self._postgres_settings)

    def _setting(self) -> processes.Setting:
        return processes.Setting(
            self.place,
            self.ports,
            self.backend.postgres_admin_url,
            self.backend.valkey_admin_url,
            self._database,
            self._environment,
        )

    def _servers(self) -> list[child.Server]:
        """The stores of the backend, then the services of the table."""
        rows = [row for row in self._table if row.name not in processes.STORES]
        for row in rows:
            ports.require_free(row.name, self.ports[row.name])
        return [*self.backend.servers(), *(processes.Service(row, self.setting) for row in rows)]

    async def _start(self, group: asyncio.TaskGroup) -> None:
        servers = self._servers()
        started = time.monotonic()
        for server in servers:
            log = self.place.logs / f"{server.name}.log"
            self._keepers[server.name] = Keeper(server, log, self._changed)
        for keeper in self._keepers.values():
            self._tasks.append(group.create_task(self._keep(keeper), name=keeper.server.name))
        await self._all_ready([name for name in processes.STORES if name in self._keepers])
        self._progress.step(f"PostgreSQL and Valkey ({self.backend.name})", started)
        await self._database_step()
        started = time.monotonic()
        await self._all_ready(list(self._keepers))
        self._progress.step("services: " + ", ".join(self._keepers), started)
        self.place.write_state(self.state())
        self._tasks.append(group.create_task(self._record(), name="state"))

    async def _database_step(self) -> None:
        started = time.monotonic()
        await prepare.wait(self.backend.postgres_admin_url)
        applied = await prepare.database(self.backend.postgres_admin_url, self.place.secrets, self._database)
        self._prepared.set()
        done = f"{len(applied)} migrations applied" if applied else "migrations: nothing new"
        self._progress.step(f"database: {done}", started)

    async def _keep(self, keeper: Keeper) -> None:
        for name in keeper.server.waits_for:
            if name == processes.DATABASE:
                await self._prepared.wait()
            elif name in self._keepers:
                await self._keepers[name].ready.wait()
        await keeper.run()

    async def _all_ready(self, names: Sequence[str]) -> None:
        """Return when all are ready; raise the first failure of any."""
        while True:
            for keeper in self._keepers.values():
                if keeper.failure is not None:
                    raise keeper.failure
            if all(self._keepers[name].ready.is_set() for name in names):
                return
            await self._changed.wait()

    async def _record(self) -> None:
        """Keep state.json true while processes are restarted."""
        while True:
            await self._changed.wait()
            self.place.write_state(self.state())

    def state(self) -> dict[str, object]:
        """Who runs where, for `netra token`, `netra doctor` and tests; no secret is in it."""
        return {
            "launcher": os.getpid(),
            "backend": self.backend.name,
            "database": self._database,
            "folder": str(self.place.path),
            "secrets": str(self.place.secrets),
            "traces": str(self.place.traces),
            "ports": self.ports,
            "urls": {"gateway": self.setting.gateway_url} if "gateway" in self.ports else {},
            "gateway_url": self.setting.gateway_url if "gateway" in self.ports else "",
            "dev_email": processes.BOOTSTRAP_ADMIN,
            "dev_password_file": str(login.password_file(self.place, login.DEVELOPER)),
            "processes": {
                name: {"pid": keeper.pid, "restarts": keeper.restarts, "mark": keeper.mark} for name, keeper in self._keepers.items()
            },
        }

    async def _stop(self) -> None:
        """Gateway first, PostgreSQL last; the services in between together."""
        try:
            for names in self._stop_order(list(self._keepers)):
                async with asyncio.TaskGroup() as group:
                    for name in names:
                        group.create_task(self._keepers[name].stop())
        finally:
            for task in self._tasks:
                task.cancel()

    def _stop_order(self, names: list[str]) -> list[list[str]]:
        edge = [name for name in names if name == "gateway"]
        stores = [name for name in names if name in processes.STORES]
        middle = [name for name in names if name not in edge and name not in stores]
        return [edge, middle, *([name] for name in reversed(stores))]

    def pid(self, name: str) -> int:
        return self._keepers[name].pid

    def restarts(self, name: str) -> int:
        return self._keepers[name].restarts

    def kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        """Send a signal to a process (default kill -9); returns the pid it had."""
        return self._keepers[name].kill(number)

    async def ready(self, name: str, timeout: float = 30.0) -> None:
        """Return when the process is up (again); raise `TimeoutError` otherwise."""
        async with asyncio.timeout(timeout):
            await self._keepers[name].ready.wait()
