"""Where PostgreSQL and Valkey come from: given, compose, this machine's, or embedded."""

import asyncio
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from chassis import environment
from standalone import child, folder, postgres, prepare, valkey
from standalone.errors import BackendUnavailable

NAMES = ("auto", "env", "compose", "embedded", "system")
COMPOSE_PORTS = {"postgres": 5434, "valkey": 6381}


class Backend(Protocol):
    """The stores of one stack."""

    name: str

    @property
    def postgres_admin_url(self) -> str: ...
    @property
    def valkey_admin_url(self) -> str: ...
    def servers(self) -> Sequence[child.Server]:
        """What the supervisor has to run itself; empty for stores that live elsewhere."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...


class Embedded:
    """Own processes, from the wheels or (system) from what is installed on this machine."""

    def __init__(
        self,
        place: folder.Folder,
        ports: Mapping[str, int],
        *,
        system: bool = False,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.name = "system" if system else "embedded"
        home, secrets = place.path, place.secrets
        self._postgres = postgres.Postgres(
            home,
            ports["postgres"],
            secrets / "postgres" / "password",
            postgres.system_programs() if system else None,
            settings,
        )
        self._valkey = valkey.Valkey(home, ports["valkey"], secrets / "valkey", valkey.system_program() if system else None)

    @property
    def postgres_admin_url(self) -> str:
        return self._postgres.admin_url

    @property
    def valkey_admin_url(self) -> str:
        return self._valkey.admin_url

    def servers(self) -> Sequence[child.Server]:
        return (self._postgres, self._valkey)

    async def start(self) -> None:
        """Nothing beforehand: the supervisor starts the servers."""

    async def stop(self) -> None:
        """Nothing afterwards: the supervisor stopped them."""


class Given:
    """Stores that somebody else runs, named by their administrators' URLs."""

    name = "env"

    def __init__(self, postgres_admin_url: str, valkey_admin_url: str, secrets: Path) -> None:
        self.postgres_admin_url = postgres_admin_url
        self.valkey_admin_url = valkey_admin_url
        self._secrets = secrets

    def servers(self) -> Sequence[child.Server]:
        return ()

    async def start(self) -> None:
        rules = prepare.valkey_rules(self._secrets)
        try:
            await valkey.set_users(self.valkey_admin_url, rules)
        except (OSError, TimeoutError) as error:
            raise BackendUnavailable(
                f"Valkey does not answer: {error or type(error).__name__}",
                "check NETRA_VALKEY_ADMIN_URL, or use NETRA_BACKEND=embedded",
            ) from error

    async def stop(self) -> None:
        """They are not ours to stop."""


class Compose(Given):
    """PostgreSQL and Valkey of docker-compose.yml, at the published test ports."""

    name = "compose"

    def __init__(self, secrets: Path) -> None:
        password = (secrets / "postgres" / "password").read_text().strip()
        admin = (secrets / "valkey" / "admin").read_text().strip()
        self._secrets_root = secrets
        super().__init__(
            f"postgresql://postgres:{password}@127.0.0.1:{COMPOSE_PORTS['postgres']}/postgres",
            f"redis://{valkey.ADMIN}:{admin}@127.0.0.1:{COMPOSE_PORTS['valkey']}/0",
            secrets,
        )

    async def start(self) -> None:
        if shutil.which("docker") is None:
            raise BackendUnavailable(
                "NETRA_BACKEND=compose, but docker is not on PATH",
                "install Docker with compose, or use NETRA_BACKEND=embedded",
            )
        await self._compose("up", "-d", "--wait", "postgres", "valkey")
        await super().start()

    async def stop(self) -> None:
        await self._compose("stop", "postgres", "valkey")

    async def _compose(self, *words: str) -> None:
        process = await asyncio.create_subprocess_exec(
            "docker", "compose", *words,
            cwd=folder.ROOT,
            env=environment.get_environment().subprocess_env(
                {"NETRA_SECRETS_ROOT": str(self._secrets_root)}
            ),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        output, _ = await process.communicate()
        if process.returncode != 0:
            raise BackendUnavailable(
                f"docker compose {words[0]} failed:\n{output.decode(errors='replace')[-2000:]}",
                "is the Docker engine running? or use NETRA_BACKEND=embedded",
            )


def choose(
    place: folder.Folder,
    ports: Mapping[str, int],
    wanted: str | None = None,
    settings: Mapping[str, str] | None = None,
) -> Backend:
    """The backend NETRA_BACKEND names; only `auto` decides by itself: `env` if URLs are given."""
    variables = environment.get_environment()
    name = wanted or variables.get("NETRA_BACKEND") or "auto"
    urls = [variables.get(f"NETRA_{store}_ADMIN_URL") or "" for store in ("POSTGRES", "VALKEY")]
    if name not in NAMES:
        raise BackendUnavailable(f"NETRA_BACKEND={name} is unknown", f"choose one of {', '.join(NAMES)}")
    if name == "env" or (name == "auto" and all(urls)):
        return _given(urls, place.secrets)
    if name == "compose":
        return Compose(place.secrets)
    return Embedded(place, ports, system=name == "system", settings=settings)


def _given(urls: list[str], secrets: Path) -> Given:
    if not all(urls):
        raise BackendUnavailable(
            "NETRA_BACKEND=env needs NETRA_POSTGRES_ADMIN_URL and NETRA_VALKEY_ADMIN_URL",
            "set both, or use NETRA_BACKEND=embedded",
        )
    return Given(urls[0], urls[1], secrets)
