"""`netra`: login, run, events, cancel, runs, why, artifacts, tools, agents, audit. A client of the gateway, nothing more."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, TypeVar

try:
    import httpx  # noqa: F401
    import typer
    import websockets  # noqa: F401
    from rich.console import Console
except ModuleNotFoundError as missing:
    sys.exit(f"netra: {missing.name} is not installed; the command line needs the extra: pip install 'netra[cli]'")

from netra import client, credentials, errors, show, trail, transfers
from netra.account import account, summary
from netra.api import Api, Token

_DEFAULT_URL = "http://127.0.0.1:8080"
_T = TypeVar("_T")

app = typer.Typer(help="Run agents and watch them live.", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
artifacts = typer.Typer(help="Your files: list, download, delete.", no_args_is_help=True)
app.add_typer(artifacts, name="artifacts")
audit = typer.Typer(help="The record of access: list, verify. For administrators.", no_args_is_help=True)
app.add_typer(audit, name="audit")
_out, _err = Console(), Console(stderr=True)
Url = Annotated[str, typer.Option("--url", envvar="NETRA_URL", help="The gateway; the one of this checkout, else 127.0.0.1:8080.")]
Credential = Annotated[str, typer.Option("--token", envvar="NETRA_TOKEN", help="An access token.", show_envvar=True)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON value per line on stdout and nothing else.")]


def _store() -> credentials.Store:
    return credentials.Store(Path(typer.get_app_dir("netra")))


def _signed_in(url: str, token: str) -> tuple[str, Token]:
    """Where to go and as whom: what was given, else a stored sign-in, else the development user of this checkout."""
    local = credentials.standalone(Path.cwd())
    chosen = (url or (local.url if local is not None else _DEFAULT_URL)).rstrip("/")
    if token:
        return chosen, token
    store = _store()
    if store.has(chosen):
        return chosen, lambda: store.token(chosen)
    if local is not None and local.url.rstrip("/") == chosen:
        return chosen, credentials.development(local)
    raise errors.Unauthenticated("Nobody is signed in. Run `netra login`, or set NETRA_TOKEN.")


def _complete(work: Callable[[], Awaitable[_T]]) -> _T:
    """Run to the end; what goes wrong becomes one line on stderr and exit code 1 (130 for Ctrl-C)."""

    async def awaited() -> _T:
        return await work()

    try:
        return asyncio.run(awaited())
    except errors.NetraError as error:
        show.failure(_err, error.code, error.message)
        raise typer.Exit(1) from None
    except OSError as error:
        show.failure(_err, "ERROR", str(error))
        raise typer.Exit(1) from None
    except Exception as error:
        show.failure(_err, errors.Internal.code, f"netra cannot go on: {error!r}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _line(value: Any) -> None:
    sys.stdout.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def _show(event: dict[str, Any], as_json: bool) -> None:
    if as_json:
        _line(event)
    else:
        show.event(_out, event)


def _table(rows: Iterable[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    if not as_json:
        show.table(_out, rows, columns)
        return
    for row in rows:
        _line(row)


def _inputs(pairs: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not name or not equals:
            raise typer.BadParameter(f"{pair!r} is not name=value")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


@app.command()
def login(
    email: Annotated[str, typer.Option(prompt=True)],
    password: Annotated[str, typer.Option(prompt=True, hide_input=True)],
    url: Url = "",
) -> None:
    """Sign in and remember it, readable by you alone."""
    local = credentials.standalone(Path.cwd())
    chosen = (url or (local.url if local is not None else _DEFAULT_URL)).rstrip("/")

    async def work() -> None:
        # a command line's session lives for weeks, not for a working day
        async with Api(chosen, device="netra cli") as api:
            _store().keep(chosen, await api.login(email, password))

    _complete(work)
    _err.print(f"Signed in at {chosen}.")


@app.command()
def run(
    agent: Annotated[str, typer.Argument(help="The agent; `netra agents` lists them. Without one the gateway's default decides.")] = "",
    request: Annotated[str, typer.Option("--request", "-r", help="What you ask; - reads it from stdin.")] = "",
    inputs: Annotated[list[str] | None, typer.Option("--input", "-i", help="name=value; the value is JSON if it reads as JSON.")] = None,
    file: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, readable=True, help="A file to attach.")] = None,
    save: Annotated[
        Path | None, typer.Option(file_okay=False, help="A folder for the chart and the report; replaces earlier ones.")
    ] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds that the run may take; the agent's own limit otherwise.")] = None,
    thread: Annotated[str, typer.Option(help="The thread to go on with.")] = "",
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """Start a run and show its events until it has ended; the exit code is 0 only when it completed."""
    asked, given = _asked(agent, request, file), _inputs(inputs or [])
    if file is not None and "artifact_id" in given:
        raise typer.BadParameter("--file sets the input artifact_id: give one of them")
    options = {} if deadline is None else {"deadline_s": deadline}

    async def work() -> dict[str, Any]:
        where, who = _signed_in(url, token)
        last: dict[str, Any] = {"type": ""}
        async with client.connect(where, who) as connected:
            if file is not None:
                given["artifact_id"] = await transfers.upload(connected.api, file, _err)
            async for event in connected.run(agent, user_request=asked, inputs=given, thread_id=thread, **options):
                _show(event, as_json)
                last = event
            if last["type"] == "agent_completed" and (save is not None or not as_json):
                await _conclude(connected.api, last["data"], save, as_json)
        return last

    last = _complete(work)
    if last["type"] != "agent_completed":
        if not as_json and last["type"]:
            _err.print(f"What happened: netra why {last['run_id']}", soft_wrap=True, highlight=False)
        raise typer.Exit(1)


def _asked(agent: str, request: str, file: Path | None) -> str:
    if request:
        return sys.stdin.read() if request == "-" else request
    if file is not None:
        return f"Look at {file.name}."
    if agent:
        return f"Run {agent}."
    raise typer.BadParameter("name an agent, or say with --request what you ask")


async def _conclude(api: Api, data: dict[str, Any], save: Path | None, as_json: bool) -> None:
    """Save the files of the result and show a report as tables."""
    result = await transfers.result(api, data)
    saved = await transfers.save(api, show.files_of(result), save, _err) if save is not None else {}
    if not as_json and show.is_report(result):
        show.report(_out, result, saved)
    else:
        for path in saved.values():
            _told(path)


def _told(path: Path) -> None:
    _err.print(str(path), soft_wrap=True, markup=False, highlight=False)


@app.command()
def events(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    after: Annotated[int, typer.Option(min=0, help="A cursor: show what follows it.")] = 0,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Until the run has ended.")] = False,
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """Show the record of a run."""

    async def work() -> None:
        where, who = _signed_in(url, token)
        async with Api(where, who) as api:
            async for event in api.events(run_id, after, follow=follow):
                _show(event, as_json)

    _complete(work)


@app.command()
def cancel(run_id: Annotated[str, typer.Argument(metavar="RUN")], as_json: AsJson = False, url: Url = "", token: Credential = "") -> None:
    """Ask a run to stop."""

    async def work() -> str:
        where, who = _signed_in(url, token)
        async with Api(where, who) as api:
            return await api.cancel_run(run_id)

    state = _complete(work)
    if as_json:
        _line({"run_id": run_id, "state": state})
    else:
        _out.print(state)


def _listed(url: str, token: str, wanted: Callable[[Api], Awaitable[list[dict[str, Any]]]]) -> list[dict[str, Any]]:
    async def work() -> list[dict[str, Any]]:
        where, who = _signed_in(url, token)
        async with Api(where, who) as api:
            return await wanted(api)

    return _complete(work)


@app.command()
def runs(
    state: Annotated[str, typer.Option(help="Only runs in this state.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=200)] = 50,
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """List your runs, newest first."""
    filters = {"state": state} if state else {}
    rows = _listed(url, token, lambda api: api.runs(limit, **filters))
    _table(rows, ("run_id", "agent", "state", "created_at"), as_json)


@app.command()
def tools(
    text: Annotated[str, typer.Option(help="Only tools that mention this.")] = "",
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """List the tools you may call."""
    filters = {"text": text} if text else {}
    _table(_listed(url, token, lambda api: api.tools(**filters)), ("name", "version", "description"), as_json)


@app.command()
def agents(as_json: AsJson = False, url: Url = "", token: Credential = "") -> None:
    """List the agents you may start."""
    _table(_listed(url, token, lambda api: api.agents()), ("name", "version", "description"), as_json)


@app.command()
def why(run_id: Annotated[str, typer.Argument(metavar="RUN")], as_json: AsJson = False, url: Url = "", token: Credential = "") -> None:
    """Tell what a run did with its time and why it ended as it did."""

    async def work() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        where, who = _signed_in(url, token)
        async with Api(where, who) as api:
            try:
                return await api.get_run(run_id), [event async for event in api.events(run_id)]
            except errors.NotFound:
                raise errors.NotFound(f"You have no run {run_id}. `netra runs` lists yours.") from None

    found = account(*_complete(work))
    if as_json:
        _line(summary(found))
    else:
        show.why(_out, found)


@artifacts.command("list")
def list_artifacts(
    limit: Annotated[int, typer.Option(min=1, max=200)] = 50, as_json: AsJson = False, url: Url = "", token: Credential = ""
) -> None:
    """List your files, newest first."""
    rows = _listed(url, token, lambda api: api.artifacts(limit))
    _table(rows, ("artifact_id", "name", "bytes", "media_type", "created_at"), as_json)


@artifacts.command("download")
def download_artifact(
    artifact_id: Annotated[str, typer.Argument(metavar="ARTIFACT")],
    to: Annotated[Path | None, typer.Option(help="The file to write; its own name in this folder otherwise.", dir_okay=False)] = None,
    url: Url = "",
    token: Credential = "",
) -> None:
    """Download a file of yours."""

    async def work() -> Path:
        where, who = _signed_in(url, token)
        async with Api(where, who) as api:
            return await transfers.fetch(api, artifact_id, to, _err)

    _told(_complete(work))


@artifacts.command("delete")
def delete_artifact(artifact_id: Annotated[str, typer.Argument(metavar="ARTIFACT")], url: Url = "", token: Credential = "") -> None:
    """Delete a file of yours."""

    async def work() -> None:
        where, who = _signed_in(url, token)
        async with Api(where, who) as api:
            await api.delete_artifact(artifact_id)

    _complete(work)
    _err.print(f"{artifact_id} is deleted.", highlight=False)


@audit.command("list")
def list_audit(
    user: Annotated[str, typer.Option(help="Only entries about this user id.")] = "",
    action: Annotated[str, typer.Option(help="Only this action.")] = "",
    outcome: Annotated[str, typer.Option(help="Only this outcome, such as refused.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=200)] = 50,
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """List who did what and who was refused in your tenant, newest first. Needs `audit:read`."""
    filters = {"user_id": user, "action": action, "outcome": outcome}
    _table(
        _listed(url, token, lambda api: trail.entries(api, limit, filters)),
        ("position", "time", "action", "outcome", "user_id", "actor", "detail"),
        as_json,
    )


@audit.command("verify")
def verify_audit(
    kept: Annotated[str, typer.Option("--from", help="POSITION:HASH of an earlier verification: what follows must be chained to it.")] = "",
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """Compute the chain of hashes again; the exit code is 0 only when every entry fits. Needs `audit:export`."""
    after = _link(kept)

    async def work() -> trail.Verdict:
        where, who = _signed_in(url, token)
        async with Api(where, who) as api:
            return await trail.verify(api, after, lambda verdict: _err.print(f"{verdict.position} ...", highlight=False))

    found = _complete(work)
    if as_json:
        _line({"verified": found.verified, "broken_at": found.broken_at, "position": found.position, "head": found.head.hex()})
    elif found.broken_at:
        show.failure(_err, "BROKEN", f"Entry {found.broken_at} does not fit what is before it.")
    else:
        _out.print(f"All {found.verified} entries fit. Keep this elsewhere, for --from:", highlight=False)
        _out.print(f"{found.position}:{found.head.hex()}", soft_wrap=True, highlight=False)
    if found.broken_at:
        raise typer.Exit(1)


def _link(kept: str) -> tuple[int, bytes]:
    position, _, digest = kept.partition(":")
    try:
        return (int(position), bytes.fromhex(digest)) if kept else (0, b"")
    except ValueError:
        raise typer.BadParameter(f"{kept!r} is not POSITION:HASH as an earlier `netra audit verify` printed it") from None


def _mount() -> None:
    """Commands that need the checkout come through the entry-point group; in a wheel alone they are absent."""
    own = {command.callback.__name__ for command in app.registered_commands if command.callback is not None} | {"artifacts", "audit"}
    words = set(sys.argv[1:])
    for entry in sorted(metadata.entry_points(group="netra.commands"), key=lambda entry: entry.name):
        if entry.name not in words and words & own:
            continue  # loading them takes a second
        try:
            app.command(entry.name)(entry.load())
        except ModuleNotFoundError as error:
            # only when the checkout itself is not there
            if (error.name or "").partition(".")[0] != entry.module.partition(".")[0]:
                raise


def main() -> None:
    """The command line."""
    _mount()
    app()


if __name__ == "__main__":
    main()
