"""The commands about threads: list, share, follow; and about everything that is kept of a user: take it along, erase it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from netra import client, console
from netra.api import Api
from netra.console import AsJson, Credential, Url

Thread = Annotated[str, typer.Argument(metavar="THREAD")]
Sure = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def threads(
    shared: Annotated[bool, typer.Option("--shared", help="Those that others share with you.")] = False,
    deleted: Annotated[bool, typer.Option("--deleted", help="Those that you deleted and can restore.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 50,
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """List your threads, newest first."""
    if shared and deleted:
        raise typer.BadParameter("--shared or --deleted, not both")
    selection = "shared" if shared else "deleted" if deleted else "own"
    rows = console.asked(url, token, lambda api: api.threads(selection, limit))
    console.table(rows, ("thread_id", "access", "messages", "updated_at", *(["owner_id"] if shared else [])), as_json)


def share(
    thread_id: Thread,
    who: Annotated[str, typer.Argument(metavar="[WHO]", help="E-mail address or id; without it, whom the thread is shared with.")] = "",
    write: Annotated[bool, typer.Option("--write", help="They may go on with it, not only read it.")] = False,
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """Let another user of your tenant into a thread of yours: its messages, runs, events and files."""

    async def work(api: Api) -> list[dict[str, Any]]:
        return [await api.share(thread_id, who, "write" if write else "read")] if who else await api.grants(thread_id)

    console.table(console.asked(url, token, work), ("grantee_id", "access", "created_at"), as_json)


def unshare(
    thread_id: Thread,
    who: Annotated[str, typer.Argument(metavar="WHO", help="The id; `netra share THREAD` lists them.")],
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """Let a user into a thread of yours no longer."""
    grant = console.asked(url, token, lambda api: api.unshare(thread_id, who))
    console.table([grant], ("grantee_id", "access", "withdrawn_at"), as_json)


def follow(
    thread_id: Thread,
    once: Annotated[bool, typer.Option("--once", help="Only what is recorded by now.")] = False,
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """Show the events of all runs of a thread, of yours or shared with you, until Ctrl-C."""

    async def work() -> None:
        where, who = console.signed_in(url, token)
        async with client.connect(where, who) as connected:
            async for event in connected.follow(thread_id, live=not once):
                if as_json or "data" in event:
                    console.show_event(event, as_json)
                else:
                    console.err.print(f"Events up to {event['seq']} of run {event['run_id']} are kept no longer.", highlight=False)

    console.complete(work)


def export(
    to: Annotated[Path, typer.Argument(metavar="FILE", dir_okay=False, help="One JSON object per line; an earlier file stays.")],
    url: Url = "",
    token: Credential = "",
) -> None:
    """Take along everything that is kept of you."""
    if to.exists():
        raise typer.BadParameter(f"{to} is here already")

    async def work(api: Api) -> int:
        # a part is not taken for the whole: the name is given at the end
        part, kept = to.with_name(f"{to.name}.part"), 0
        try:
            with part.open("w", encoding="utf-8") as file:
                async for line in api.export():
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    kept += 1
            part.rename(to)
        finally:
            part.unlink(missing_ok=True)
        return kept

    lines = console.asked(url, token, work)
    console.err.print(f"{lines} lines.", highlight=False)
    console.told(to)


def erase(
    thread_id: Annotated[str, typer.Argument(metavar="[THREAD]", help="Only this thread; otherwise everything but your account.")] = "",
    sure: Sure = False,
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """Remove for good what is kept of you, or of a thread of yours."""
    what = f"the content of thread {thread_id}" if thread_id else "everything that is kept of you"
    if not sure:
        typer.confirm(f"Erase {what}? It cannot be undone.", abort=True, err=True)
    found = console.asked(url, token, lambda api: api.erase_thread(thread_id) if thread_id else api.erase_everything())
    console.table([found], tuple(found), as_json)


def add_to(app: typer.Typer) -> None:
    """Make them commands."""
    for command in (threads, share, unshare, follow, export, erase):
        app.command()(command)
