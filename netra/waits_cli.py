"""The commands of the command line for runs that wait: `send`, `approvals`, `approve`."""

from __future__ import annotations

from typing import Annotated

import typer

from netra import console
from netra.console import AsJson, Credential, Url

Shared = Annotated[str, typer.Option("--thread", help="The thread, when the run is somebody else's.")]


def send(
    run_id: Annotated[str, typer.Argument(metavar="RUN")],
    text: Annotated[str, typer.Argument(metavar="TEXT")],
    thread: Shared = "",
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """Say something to a run that goes on: what it asks for when it waits."""
    found = console.asked(url, token, lambda api: api.send(run_id, text, thread_id=thread))
    if as_json:
        console.line(found)
    else:
        console.out.print(found["state"])


def approvals(
    state: Annotated[str, typer.Option(help="pending, approved, rejected or expired; all with an empty one.")] = "pending",
    run_id: Annotated[str, typer.Option("--run", help="Only what this run asked for.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=200)] = 50,
    thread: Shared = "",
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """List what your runs ask for, newest first."""
    filters = {name: value for name, value in (("state", state), ("run_id", run_id)) if value}
    rows = console.asked(url, token, lambda api: api.approvals(limit, thread_id=thread, **filters))
    console.table(rows, ("approval_id", "state", "message", "tool_name", "run_id", "expires_at"), as_json)


def approve(
    approval_id: Annotated[str, typer.Argument(metavar="ID", help="`netra approvals` lists them.")],
    reject: Annotated[bool, typer.Option("--reject", help="Refuse it instead.")] = False,
    comment: Annotated[str, typer.Option(help="Why; the agent is told.")] = "",
    thread: Shared = "",
    as_json: AsJson = False,
    url: Url = "",
    token: Credential = "",
) -> None:
    """Approve what a run asks for, or refuse it."""
    decision = "reject" if reject else "approve"
    found = console.asked(url, token, lambda api: api.resolve(approval_id, decision, comment, thread_id=thread))
    if as_json:
        console.line(found)
    else:
        console.out.print(found["state"])


def add_to(app: typer.Typer) -> None:
    """Make them commands."""
    for command in (send, approvals, approve):
        app.command()(command)
