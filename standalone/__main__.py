"""python -m standalone run|demo|reset|doctor: all of Netra on this machine."""

import argparse
import asyncio
import contextlib
import os
import signal
import sys
import time
from pathlib import Path

from standalone import commands, folder, login, processes, proof, sample, supervise
from standalone.errors import StandaloneError
from standalone.progress import Progress, complain

EXIT_PROBLEM, EXIT_INTERRUPTED = 1, 130
STOP_PATIENCE = 60.0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m standalone",
        description="All of Netra on this machine. NETRA_BACKEND=auto|env|compose|embedded|system chooses the stores; "
        "NETRA_<NAME>_PORT moves a process to another port.",
    )
    parser.add_argument("--folder", type=Path, default=folder.default().path, help="where everything is kept (default: .netra)")
    steps = parser.add_subparsers(dest="step", required=True)
    steps.add_parser("run", help="start everything, analyse the bundled log as proof, serve until Ctrl-C")
    steps.add_parser("demo", help="the same, and exit after the proof")
    reset = steps.add_parser("reset", help="stop what runs and delete the folder with all its data")
    reset.add_argument("--force", action="store_true", help="do not ask")
    steps.add_parser("doctor", help="look for problems, each told with its remedy")
    return parser.parse_args()


async def _serve(path: Path, *, demo: bool) -> int:
    progress = Progress()
    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        loop.add_signal_handler(number, lambda: task and task.cancel())
    code = EXIT_INTERRUPTED
    with contextlib.suppress(asyncio.CancelledError):
        async with supervise.Stack(path, table=processes.wanted(), progress=progress) as stack:
            await _prove(stack, progress)
            code = 0
            if not demo:
                progress.line("serving; Ctrl-C stops everything")
                await asyncio.get_running_loop().create_future()
    progress.line("stopped")
    return code


async def _prove(stack: supervise.Stack, progress: Progress) -> None:
    progress.step(f"ready at {stack.setting.gateway_url}; one analysis as proof:")
    started = time.monotonic()
    run = await proof.proof(stack.place, progress)
    progress.step(f"run {run} is complete", started)
    for line in _welcome(stack):
        progress.line(line)


def _welcome(stack: supervise.Stack) -> list[str]:
    url = stack.setting.gateway_url
    return [
        "",
        f"  gateway   {url}   WebSocket {url.replace('http', 'ws', 1)}/ws",
        "  services  " + "  ".join(f"{name} {processes.LOOPBACK}:{stack.ports[name]}" for name in processes.SERVICES),
        f"  stores    {processes.without_user(stack.setting.postgres_url)}  {stack.setting.valkey_url}",
        f"  traces    {stack.place.traces}   logs {stack.place.logs}",
        "",
        f"  login     {processes.BOOTSTRAP_ADMIN}, password in {login.password_file(stack.place, login.DEVELOPER)}",
        "            or a token: .venv/bin/netra token",
        f"  next      .venv/bin/netra run --file {sample.FILE.relative_to(folder.ROOT)} --request 'What could we save?'",
        "            or a log of your own: --file usage.csv, and --input model=gpt-4o if it names no model",
        "",
    ]


def _reset(place: folder.Folder, *, force: bool) -> int:
    """Stop the launcher that holds the folder, then delete it."""
    if not place.path.exists():
        sys.stdout.write(f"{place.path} does not exist\n")
        return 0
    if not force and not _agreed(place):
        return EXIT_PROBLEM
    pid = place.holder()
    if pid:
        os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_PATIENCE
        while place.holder() is not None:
            if time.monotonic() > deadline:
                raise StandaloneError(f"pid {pid} does not stop", f"kill -9 {pid}")
            time.sleep(0.1)
    with folder.held(place):
        folder.sweep(place)
        place.remove()
    sys.stdout.write(f"{place.path} is deleted\n")
    return 0


def _agreed(place: folder.Folder) -> bool:
    if not sys.stdin.isatty():
        complain(f"refusing to delete {place.path} without a question\n  remedy: make reset FORCE=1")
        return False
    return input(f"Delete {place.path} with all data and secrets? [y/N] ").strip().lower() == "y"


def main() -> int:
    arguments = _arguments()
    try:
        if arguments.step == "doctor":
            commands.doctor()
            return 0
        if arguments.step == "reset":
            return _reset(folder.Folder(arguments.folder.resolve()), force=arguments.force)
        return asyncio.run(_serve(arguments.folder, demo=arguments.step == "demo"))
    except StandaloneError as error:
        complain(str(error))
        return EXIT_PROBLEM


if __name__ == "__main__":
    sys.exit(main())
