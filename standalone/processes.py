"""The table of processes: name, command, port, what each waits for; also read by the tests."""

import dataclasses
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

from chassis import environment
from standalone import child, folder, health
from standalone.errors import StandaloneError

LOOPBACK = "127.0.0.1"
BOOTSTRAP_ADMIN = "dev@netra.example"

Health = Literal["postgres", "valkey", "grpc", "http"]


@dataclass(frozen=True, slots=True)
class Process:
    """One row of the table; the stores have no command here, their backend knows it."""

    name: str
    command: tuple[str, ...]
    port: int
    waits_for: tuple[str, ...]
    health: Health
    # what it is a replica of: whose secrets and port setting it has. Empty: it is the only one
    replica_of: str = ""

    @property
    def service(self) -> str:
        return self.replica_of or self.name

    @property
    def port_setting(self) -> str:
        """What tells the process its port; the launcher is told the port of a replica by its own name."""
        return f"NETRA_{self.service.upper()}_PORT"


def _module(name: str) -> tuple[str, ...]:
    return (sys.executable, "-m", name)


STORES = ("postgres", "valkey")
DATABASE = "database"  # the step between the stores and the services: roles and migrations
SERVICES = ("auth", "context", "dispatcher", "events")

TABLE = (
    Process("postgres", (), 7005, (), "postgres"),
    Process("valkey", (), 7006, (), "valkey"),
    Process("auth", _module("services.auth"), 7001, (DATABASE, "valkey"), "grpc"),
    Process("context", _module("services.context"), 7002, (DATABASE, "valkey"), "grpc"),
    Process("dispatcher", _module("services.dispatcher"), 7003, (DATABASE, "valkey"), "grpc"),
    Process("events", _module("services.events"), 7004, (DATABASE, "valkey"), "grpc"),
    Process("gateway", _module("gateway"), 8080, ("valkey",), "http"),
)


MOST_DISPATCHERS = 9


def replica(row: Process, number: int) -> Process:
    """The numbered replica of a process, from 2 on: its secrets and settings are the same, its name and port its own."""
    return dataclasses.replace(row, name=f"{row.name}{number}", port=row.port + 100 * (number - 1), replica_of=row.name)


def wanted(table: tuple[Process, ...] = TABLE) -> tuple[Process, ...]:
    """The table with as many dispatchers as NETRA_DISPATCHERS says, over one database. Raises `StandaloneError` for what is no number."""
    told = environment.get_environment().get("NETRA_DISPATCHERS") or "1"
    if told not in map(str, range(1, MOST_DISPATCHERS + 1)):
        raise StandaloneError(f"NETRA_DISPATCHERS={told} is no number of dispatchers", f"choose one from 1 to {MOST_DISPATCHERS}")
    row = next(row for row in table if row.name == "dispatcher")
    return (*table, *(replica(row, number) for number in range(2, int(told) + 1)))


def default_ports(table: tuple[Process, ...] = TABLE) -> dict[str, int]:
    """The port of each process: `NETRA_<NAME>_PORT`, else the one in the table."""
    variables = environment.get_environment()
    return {row.name: int(variables.get(f"NETRA_{row.name.upper()}_PORT") or row.port) for row in table}


@dataclass(frozen=True, slots=True)
class Setting:
    """What the environment of every process of one stack is made from."""

    place: folder.Folder
    ports: Mapping[str, int]
    postgres_admin_url: str
    valkey_admin_url: str
    database: str = "netra"
    extra: Mapping[str, str] | None = None

    @property
    def gateway_url(self) -> str:
        return f"http://{LOOPBACK}:{self.ports['gateway']}"

    @property
    def postgres_url(self) -> str:
        return without_user(self.postgres_admin_url, self.database)

    @property
    def valkey_url(self) -> str:
        return without_user(self.valkey_admin_url)


def without_user(url: str, path: str | None = None) -> str:
    """The URL without its user and password, and with another path if one is given."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host, path=parts.path if path is None else f"/{path}"))


def environment_of(row: Process, setting: Setting) -> dict[str, str]:
    """Everything one process is told, on top of what the launcher itself was given."""
    place = setting.place
    told = {row.port_setting: str(setting.ports[row.name])}
    for name in SERVICES:
        replicas = [port for process, port in setting.ports.items() if process.rstrip("0123456789") == name]
        if replicas:
            told[f"NETRA_{name.upper()}_TARGET"] = ",".join(f"{LOOPBACK}:{port}" for port in replicas)
    told |= {
        "NETRA_HOST": LOOPBACK,
        "NETRA_ENV": "dev",
        "NETRA_POSTGRES_URL": setting.postgres_url,
        "NETRA_VALKEY_URL": setting.valkey_url,
        "NETRA_SECRETS_DIR": str(place.secrets / row.service),
        "NETRA_STATE_DIR": str(place.path / "state" / row.name),
        "NETRA_TRACE_DIR": str(place.traces),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "",  # compiled once, a second start is seconds faster
    }
    if row.service == "auth":
        told["NETRA_BOOTSTRAP_ADMIN"] = BOOTSTRAP_ADMIN
    return _with_defaults(told | dict(setting.extra or {}))


def _with_defaults(told: dict[str, str]) -> dict[str, str]:
    """Admin URLs stay with the launcher; the caller's NETRA_ENV wins over ours."""
    variables = environment.get_environment()
    told["NETRA_ENV"] = variables.get("NETRA_ENV") or told["NETRA_ENV"]
    given = variables.subprocess_env(told)
    for name in ("NETRA_POSTGRES_ADMIN_URL", "NETRA_VALKEY_ADMIN_URL"):
        given.pop(name, None)
    return given


class Service:
    """One row as something the supervisor can run."""

    def __init__(self, row: Process, setting: Setting) -> None:
        self._row = row
        self._setting = setting
        self.name = row.name
        self.port = setting.ports[row.name]
        self.waits_for = row.waits_for

    async def prepare(self) -> None:
        state = self._setting.place.path / "state" / self.name
        state.mkdir(mode=0o700, parents=True, exist_ok=True)

    def launch(self) -> child.Launch:
        return child.Launch(
            command=self._row.command,
            environment=environment_of(self._row, self._setting),
            folder=folder.ROOT,
            mark=self._row.command[-1],
        )

    async def healthy(self) -> bool:
        if self._row.health == "http":
            return await health.http_ready(LOOPBACK, self.port)
        return await health.grpc_serving(LOOPBACK, self.port)
