"""`netra`: login, run, events, cancel, runs, why, artifacts, tools, agents, audit; `threads_cli`, `waits_cli`. A client of the gateway."""

from __future__ import annotations

import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

try:
    import httpx  # noqa: F401
    import rich  # noqa: F401
    import typer
    import websockets  # noqa: F401
except ModuleNotFoundError as missing:
    sys.exit(f"netra: {missing.name} is not installed; the command line needs the extra: pip install 'netra[cli]'")

from netra import client, console, credentials, errors, show, threads_cli, trail, transfers, waits_cli
from netra.account import account, summary
from netra.api import Api
from netra.console import AsJson, Credential, Url

app = typer.Typer(help="Run agents and watch them live.", no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)
artifacts = typer.Typer(help="Your files: list, upload, download, delete.", no_args_is_help=True)
app.add_typer(artifacts, name="artifacts")
audit = typer.Typer(help="The record of access: list, verify. For administrators.", no_args_is_help=True)
app.add_typer(audit, name="audit")
threads_cli.add_to(app)
waits_cli.add_to(app)


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
    chosen = (url or (local.url if local is not None else console.DEFAULT_URL)).rstrip("/")

    async def work() -> None:
        # a command line's session lives for weeks, not for a working day
        async with Api(chosen, device="netra cli") as api:
            console.store().keep(chosen, await api.login(email, password))

    console.complete(work)
    console.err.print(f"Signed in at {chosen}.")


@app.command()
def run(
    agent: Annotated[str, typer.Argument(help="The agent; `netra agents` lists them. Without one the gateway's default decides.")] = "",
    request: Annotated[str, typer.Option("--request", "-r", help="What you ask; - reads it from stdin.")] = "",
    inputs: Annotated[list[str] | None, typer.Option("--input", "-i", help="name=value; the value is JSON if it reads as JSON.")] = None,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, readable=True, help="A file to attach; into the thread, with --thread.")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(file_okay=False, help="A folder for the chart and the report; replaces earlier ones.")
    ] = None,
    deadline: Annotated[float | None, typer.Option(help="Seconds that the run may take; the agent's own limit otherwise.")] = None,
    thread: Annotated[str, typer.Option(help="The thread to go on with.")] = "",
    on_busy: Annotated[
        str, typer.Option(help="When a run goes on there: enqueue, reject, interrupt, or rollback, which hides its messages too.")
    ] = "",
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """Start a run and show its events until it has ended; the exit code is 0 only when it completed."""
    asked, given = _asked(agent, request, file), _inputs(inputs or [])
    if file is not None and "artifact_id" in given:
        raise typer.BadParameter("--file sets the input artifact_id: give one of them")
    chosen = {"deadline_s": deadline, "on_busy": on_busy or None}
    options = {name: value for name, value in chosen.items() if value is not None}

    async def work() -> dict[str, Any]:
        where, who = console.signed_in(url, token)
        last: dict[str, Any] = {"type": ""}
        async with client.connect(where, who) as connected:
            if file is not None:
                given["artifact_id"] = await transfers.upload(connected.api, file, console.err, thread)
            async for event in connected.run(agent, user_request=asked, inputs=given, thread_id=thread, **options):
                console.show_event(event, as_json)
                last = event
            if last["type"] == "agent_completed" and (save is not None or not as_json):
                await _conclude(connected.api, last["data"], save, as_json)
        return last

    last = console.complete(work)
    if last["type"] != "agent_completed":
        if not as_json and last["type"]:
            console.err.print(f"What happened: netra why {last['run_id']}", soft_wrap=True, highlight=False)
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
    saved = await transfers.save(api, show.files_of(result), save, console.err) if save is not None else {}
    if not as_json and show.is_report(result):
        show.report(console.out, result, saved)
    else:
        for path in saved.values():
            console.told(path)


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
        where, who = console.signed_in(url, token)
        async with Api(where, who) as api:
            async for event in api.events(run_id, after, follow=follow):
                console.show_event(event, as_json)

    console.complete(work)


@app.command()
def cancel(run_id: Annotated[str, typer.Argument(metavar="RUN")], as_json: AsJson = False, url: Url = "", token: Credential = "") -> None:
    """Ask a run to stop."""

    async def work() -> str:
        where, who = console.signed_in(url, token)
        async with Api(where, who) as api:
            return await api.cancel_run(run_id)

    state = console.complete(work)
    if as_json:
        console.line({"run_id": run_id, "state": state})
    else:
        console.out.print(state)


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
    rows = console.asked(url, token, lambda api: api.runs(limit, **filters))
    console.table(rows, ("run_id", "agent", "state", "created_at"), as_json)


@app.command()
def tools(
    text: Annotated[str, typer.Option(help="Only tools that mention this.")] = "",
    tag: Annotated[str, typer.Option(help="Only tools with this tag.")] = "",
    category: Annotated[str, typer.Option(help="Only tools of this category.")] = "",
    permission: Annotated[str, typer.Option(help="Only tools that take this permission.")] = "",
    tier: Annotated[str, typer.Option(help="Only tools that come with this tier of users.")] = "",
    enforcement: Annotated[str, typer.Option(help="Only tools contained by this: trusted, script, python, command, remote.")] = "",
    parameter: Annotated[str, typer.Option(help="Only tools that take an argument of this name.")] = "",
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """List the tools you may call."""
    asked = {
        "text": text, "tag": tag, "category": category, "permission": permission, "tier": tier, "enforcement": enforcement,
        "parameter": parameter,
    }  # fmt: skip
    filters = {name: value for name, value in asked.items() if value}
    rows = console.asked(url, token, lambda api: api.tools(**filters))
    columns = ("name", "version", "description", *(("deprecated",) if any(row.get("deprecated") for row in rows) else ()))
    console.table(rows, columns, as_json)


@app.command()
def agents(as_json: AsJson = False, url: Url = "", token: Credential = "") -> None:
    """List the agents you may start."""
    console.table(console.asked(url, token, lambda api: api.agents()), ("name", "version", "description"), as_json)


@app.command()
def why(run_id: Annotated[str, typer.Argument(metavar="RUN")], as_json: AsJson = False, url: Url = "", token: Credential = "") -> None:
    """Tell what a run did with its time and why it ended as it did."""

    async def work() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        where, who = console.signed_in(url, token)
        async with Api(where, who) as api:
            try:
                return await api.get_run(run_id), [event async for event in api.events(run_id)]
            except errors.NotFound:
                raise errors.NotFound(f"You have no run {run_id}. `netra runs` lists yours.") from None

    found = account(*console.complete(work))
    if as_json:
        console.line(summary(found))
    else:
        show.why(console.out, found)


@artifacts.command("list")
def list_artifacts(
    limit: Annotated[int, typer.Option(min=1, max=200)] = 50, as_json: AsJson = False, url: Url = "", token: Credential = ""
) -> None:
    """List your files, newest first."""
    rows = console.asked(url, token, lambda api: api.artifacts(limit))
    console.table(rows, ("artifact_id", "name", "bytes", "media_type", "created_at"), as_json)


@artifacts.command("upload")
def upload_artifact(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True)],
    thread: Annotated[str, typer.Option(help="Put it into this thread: whoever sees the thread sees the file.")] = "",
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """Keep a file; its id is the input `artifact_id` of a run."""
    artifact_id = console.asked(url, token, lambda api: transfers.upload(api, file, console.err, thread))
    console.line({"artifact_id": artifact_id}) if as_json else console.out.print(artifact_id, soft_wrap=True, highlight=False)


@artifacts.command("download")
def download_artifact(
    artifact_id: Annotated[str, typer.Argument(metavar="ARTIFACT")],
    to: Annotated[Path | None, typer.Option(help="The file to write; its own name in this folder otherwise.", dir_okay=False)] = None,
    url: Url = "",
    token: Credential = "",
) -> None:
    """Download a file of yours."""

    async def work() -> Path:
        where, who = console.signed_in(url, token)
        async with Api(where, who) as api:
            return await transfers.fetch(api, artifact_id, to, console.err)

    console.told(console.complete(work))


@artifacts.command("delete")
def delete_artifact(artifact_id: Annotated[str, typer.Argument(metavar="ARTIFACT")], url: Url = "", token: Credential = "") -> None:
    """Delete a file of yours."""

    async def work() -> None:
        where, who = console.signed_in(url, token)
        async with Api(where, who) as api:
            await api.delete_artifact(artifact_id)

    console.complete(work)
    console.err.print(f"{artifact_id} is deleted.", highlight=False)


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
    console.table(
        console.asked(url, token, lambda api: trail.entries(api, limit, filters)),
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
        where, who = console.signed_in(url, token)
        async with Api(where, who) as api:
            return await trail.verify(api, after, lambda verdict: console.err.print(f"{verdict.position} ...", highlight=False))

    found = console.complete(work)
    if as_json:
        console.line({"verified": found.verified, "broken_at": found.broken_at, "position": found.position, "head": found.head.hex()})
    elif found.broken_at:
        show.failure(console.err, "BROKEN", f"Entry {found.broken_at} does not fit what is before it.")
    else:
        console.out.print(f"All {found.verified} entries fit. Keep this elsewhere, for --from:", highlight=False)
        console.out.print(f"{found.position}:{found.head.hex()}", soft_wrap=True, highlight=False)
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
