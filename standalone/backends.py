"""Where PostgreSQL and Valkey come from: given, compose, this machine's, or embedded."""

import asyncio
import io
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from chassis import environment
from standalone import child, folder, postgres, prepare, valkey
from standalone.errors import BackendUnavailable

NAMES = ("auto", "env", "compose", "embedded", "system")
STORE_PORTS = {"postgres": 5432, "valkey": 6379}  # inside their containers


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
    """PostgreSQL and Valkey of docker-compose.yml, at their published ports, with the secrets in its volumes.

    Services in containers may use them at the same time, so passwords are taken over, never changed.
    """

    name = "compose"

    def __init__(self, secrets: Path) -> None:
        super().__init__("", "", secrets)
        self._started: list[str] = []

    async def start(self) -> None:
        if shutil.which("docker") is None:
            raise BackendUnavailable(
                "NETRA_BACKEND=compose, but docker is not on PATH",
                "install Docker with compose, or use NETRA_BACKEND=embedded",
            )
        running = (await self._compose("ps", "--services", "--status", "running")).decode().split()
        self._started = [store for store in STORE_PORTS if store not in running]
        if self._started:
            await self._compose("up", "-d", "--build", "--wait", *self._started)
        await self._take_over_secrets()
        postgres_password = (self._secrets / "postgres" / "password").read_text().strip()
        valkey_password = (self._secrets / "valkey" / "admin").read_text().strip()
        self.postgres_admin_url = f"postgresql://postgres:{postgres_password}@{await self._address('postgres')}/postgres"
        self.valkey_admin_url = f"redis://{valkey.ADMIN}:{valkey_password}@{await self._address('valkey')}/0"
        await super().start()

    async def stop(self) -> None:
        if self._started:
            await self._compose("stop", *self._started)

    async def _address(self, store: str) -> str:
        return (await self._compose("port", store, str(STORE_PORTS[store]))).decode().strip()

    async def _take_over_secrets(self) -> None:
        packed = await self._compose("run", "--rm", "--no-deps", "-T", "database", "tar", "-C", "/secrets", "-c", ".")
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            for entry in archive:
                if (file := archive.extractfile(entry)) is not None:
                    prepare.write_secret(self._secrets / entry.name, file.read().decode())

    async def _compose(self, *words: str) -> bytes:
        variables = environment.get_environment()
        name = variables.get("NETRA_STORES_PROJECT")  # where the stores belong to another project than the services
        project = {"COMPOSE_PROJECT_NAME": name} if name else {}
        process = await asyncio.create_subprocess_exec(
            "docker", "compose", *words,
            cwd=folder.ROOT,
            env=variables.subprocess_env(project),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        output, complaint = await process.communicate()
        if process.returncode != 0:
            raise BackendUnavailable(
                f"docker compose {words[0]} failed:\n{complaint.decode(errors='replace')[-2000:]}",
                "is the Docker engine running? or use NETRA_BACKEND=embedded",
            )
        return output


def wanted(name: str | None = None) -> str:
    """The backend asked for: by the caller, else by NETRA_BACKEND; `auto` is `env` where URLs are given, else `embedded`."""
    variables = environment.get_environment()
    asked = name or variables.get("NETRA_BACKEND") or "auto"
    if asked not in NAMES:
        raise BackendUnavailable(f"NETRA_BACKEND={asked} is unknown", f"choose one of {', '.join(NAMES)}")
    if asked == "auto":
        return "env" if all(_given_urls()) else "embedded"
    return asked


def _given_urls() -> list[str]:
    variables = environment.get_environment()
    return [variables.get(f"NETRA_{store}_ADMIN_URL") or "" for store in ("POSTGRES", "VALKEY")]


def choose(
    name: str,
    place: folder.Folder,
    ports: Mapping[str, int],
    settings: Mapping[str, str] | None = None,
) -> Backend:
    """The backend of a name that `wanted` returned."""
    if name == "env":
        return _given(_given_urls(), place.secrets)
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
