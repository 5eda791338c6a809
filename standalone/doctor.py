"""What is wrong on this machine, each problem with its remedy."""

import shutil
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from chassis import environment
from standalone import backends, folder, identity, leash, ports, postgres, processes, valkey
from standalone.errors import StandaloneError

PYTHONS = ((3, 11), (3, 14))
DISK_NEEDED = 1024**3


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; a remedy makes it a problem."""

    text: str
    remedy: str = ""


def examine(place: folder.Folder) -> Iterator[Finding]:
    """Everything worth looking at, in the order in which a start would meet it."""
    yield _python()
    yield _disk(place)
    yield from _backend(place)
    yield _data(place)
    yield from _secrets(place)
    yield from _processes(place)


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    if PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        return Finding(f"Python {version}")
    return Finding(f"Python {version} is not supported", "PYTHON=python3.12 scripts/bootstrap.sh")


def _disk(place: folder.Folder) -> Finding:
    existing = next(path for path in (place.path, *place.path.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    text = f"{free / 1024**3:.1f} GiB free on the disk of {place.path}"
    return Finding(text, "" if free > DISK_NEEDED else "free at least 1 GiB")


def _backend(place: folder.Folder) -> Iterator[Finding]:
    name = environment.get_environment().get("NETRA_BACKEND") or "auto"
    if name not in backends.NAMES:
        yield Finding(f"NETRA_BACKEND={name} is unknown", f"choose one of {', '.join(backends.NAMES)}")
    try:
        yield Finding(f"backend {name}: PostgreSQL programs in {postgres.embedded_programs()}")
        yield Finding(f"Valkey program {valkey.embedded_program()}")
    except StandaloneError as error:
        yield Finding(str(error.args[0]), error.remedy)
    how = {leash.KEEP: "as you", leash.NAMESPACE: "as nobody in a user namespace", leash.DROP: "as nobody"}
    yield Finding(f"the stores run {how[identity.of_stores()]}")


def _data(place: folder.Folder) -> Finding:
    version = postgres.version_of(place.path / "postgres" / "data")
    if not version:
        return Finding("no data yet: the first start makes it")
    if version != "18" and place.state().get("backend") != "system":
        return Finding(f"the data was made by PostgreSQL {version}, the embedded one is 18", "dump it with the old version, or: make reset")
    return Finding(f"data of PostgreSQL {version}")


def _secrets(place: folder.Folder) -> Iterator[Finding]:
    if not place.secrets.is_dir():
        yield Finding("no secrets yet: the first start makes them")
        return
    files = [path for path in place.secrets.rglob("*") if path.is_file()]
    open_files = [path for path in files if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)]
    for path in open_files:
        yield Finding(f"{path} can be read by others", f"chmod 600 {path}")
    if not open_files:
        yield Finding(f"{len(files)} secrets, readable by their owner alone")


def _processes(place: folder.Folder) -> Iterator[Finding]:
    holder = place.holder()
    if holder is None:
        yield Finding("not running")
        for name, port in processes.default_ports(processes.wanted()).items():
            if not ports.is_free(port):
                yield Finding(
                    f"port {port} of {name} is held by {ports.holder(port)}",
                    f"end that process, or set NETRA_{name.upper()}_PORT",
                )
        return
    state = place.state()
    yield Finding(f"running: launcher pid {holder}, backend {state.get('backend', 'unknown')}")
    for name, entry in state.get("processes", {}).items():
        yield _process(place, name, entry, state.get("ports", {}).get(name, 0))


def _process(place: folder.Folder, name: str, entry: dict[str, object], port: int) -> Finding:
    text = f"{name}: pid {entry.get('pid')}, port {port}, restarted {entry.get('restarts')} times"
    listening = not ports.is_free(port)
    return Finding(text, "" if listening else f"it does not listen: see {place.logs / name}.log")
