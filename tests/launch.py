"""python -m tests.launch [pytest options]: brings up what the tests need, says which backend it is, runs pytest on it."""

from __future__ import annotations

import signal
import subprocess
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import FrameType

from chassis import environment
from standalone import backends, folder, ports
from standalone.errors import BackendUnavailable, StandaloneError

# two checkouts on one machine do not meet, and a second start sweeps what a first one left
PROJECT = f"netra-test-{zlib.crc32(str(folder.ROOT).encode()):08x}"
STORE_PORTS = {"NETRA_TEST_POSTGRES_PORT": 5434, "NETRA_TEST_VALKEY_PORT": 6381}
SERVICE_PORTS = [f"NETRA_{name}_PORT" for name in ("AUTH", "CONTEXT", "DISPATCHER", "EVENTS", "GATEWAY")]


def engine() -> str:
    """The version of the Docker engine that answers, if one does and compose is there to talk to it."""
    try:
        subprocess.run(["docker", "compose", "version"], check=True, capture_output=True, timeout=10)
        words = ["docker", "version", "--format", "{{.Server.Version}}"]
        return subprocess.run(words, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def chosen(variables: environment.IsolatedEnvironment) -> tuple[str, str]:
    """The backend of the tests and why; only `auto` decides by itself."""
    asked = variables.get("NETRA_BACKEND") or "auto"
    if asked != "auto":
        return backends.wanted(asked), f"NETRA_BACKEND={asked}"
    if stack := variables.get("NETRA_STACK"):
        return "compose" if stack == "compose" else backends.wanted(), f"NETRA_STACK={stack}"
    if (found := backends.wanted()) != "embedded":
        return found, "administrators' URLs are given"
    if version := engine():
        return "compose", f"Docker engine {version} answers"
    return "embedded", "no Docker engine answers"


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code of pytest, or 69 when the backend does not come up."""
    signal.signal(signal.SIGTERM, _interrupted)
    variables = environment.get_environment()
    try:
        name, reason = chosen(variables)
        stack = "in containers" if name == "compose" else "processes of this machine"
        print(f"tests: backend {name} ({reason}); the whole system: {stack}", flush=True)
        if name == "compose":
            return _in_containers(arguments, variables)
        told = {
            "NETRA_BACKEND": name,
            "NETRA_STACK": "standalone",
            # a long lease, as in containers: on a busy machine PostgreSQL takes seconds to come back, and runs live through that
            "NETRA_LEASE_S": variables.get("NETRA_LEASE_S", "12") or "12",
            # compiled once, and not by every process again
            "PYTHONDONTWRITEBYTECODE": "",
        }
        return _pytest(arguments, variables.subprocess_env(told))
    except StandaloneError as error:
        print(f"tests: {error}", file=sys.stderr)
        return 69
    except KeyboardInterrupt:
        return 130


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _pytest(arguments: Sequence[str], variables: Mapping[str, str]) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], env=variables, check=False).returncode


def _in_containers(arguments: Sequence[str], given: environment.IsolatedEnvironment) -> int:
    if not engine():
        raise BackendUnavailable(
            "compose is asked for, but no Docker engine with compose answers", "start it, or NETRA_BACKEND=embedded make test"
        )
    system = Project(PROJECT, ports.free([*STORE_PORTS, *SERVICE_PORTS]))
    # stores of their own for services in process: tests of the system kill parts of it
    stores = Project(f"{PROJECT}-stores", _usual_ports(given), ("postgres", "valkey"))
    told = {"NETRA_BACKEND": "compose", "NETRA_STACK": "compose", "COMPOSE_PROJECT_NAME": system.name, "NETRA_STORES_PROJECT": stores.name}
    try:
        for project in (system, stores):
            project.up()
        code = _pytest(arguments, given.subprocess_env(told))
        if code:
            _keep_logs(system)
        return code
    finally:
        for project in (system, stores):
            project.down()


def _usual_ports(given: environment.IsolatedEnvironment) -> dict[str, int]:
    """Given ports, the usual ones where they are free, else free ones."""
    usual = {name: port for name, port in STORE_PORTS.items() if ports.is_free(port)}
    return {name: int(given.get(name) or usual.get(name, port)) for name, port in ports.free(STORE_PORTS).items()}


@dataclass(frozen=True, slots=True)
class Project:
    """Containers of docker-compose.yml under a name and on ports of their own; all services or some."""

    name: str
    ports: Mapping[str, int]
    services: tuple[str, ...] = ()

    def up(self) -> None:
        """Start afresh; returns when everything is healthy."""
        self.down()
        self.compose("up", "--detach", "--build", "--wait", *self.services)

    def down(self) -> None:
        """Remove containers and data."""
        self.compose("down", "--volumes")

    def compose(self, *words: str) -> str:
        """Run a command of docker compose; returns what it printed."""
        told = {"COMPOSE_PROJECT_NAME": self.name} | {name: str(port) for name, port in self.ports.items()}
        variables = environment.get_environment().subprocess_env(told)
        done = subprocess.run(["docker", "compose", *words], cwd=folder.ROOT, env=variables, check=False, capture_output=True, text=True)
        if done.returncode:
            remedy = "see what it says, or test without containers: NETRA_BACKEND=embedded make test"
            raise BackendUnavailable(f"docker compose {words[0]} failed:\n{done.stderr[-3000:]}", remedy)
        return done.stdout


def _keep_logs(project: Project) -> None:
    """The containers are about to go; what they said stays."""
    place = folder.default()
    place.make()
    file = place.logs / "tests-compose.log"
    file.write_text(project.compose("logs", "--no-color", "--timestamps"))
    print(f"tests: the logs of the containers are in {file}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
