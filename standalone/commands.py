"""What `netra` can do on the machine the stack runs on: `netra token`, `netra doctor` and `netra trace`."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from standalone import doctor as examination
from standalone import folder, login
from standalone.errors import StandaloneError
from standalone.progress import complain


def token(user: str = login.DEVELOPER, role: str = "user", tier: str = "internal") -> None:
    """Print one access token of a development user, made first if need be, and nothing else."""
    try:
        sys.stdout.write(asyncio.run(login.access_token(folder.default(), user, role, tier)) + "\n")
    except StandaloneError as error:
        complain(str(error))
        raise SystemExit(1) from None


def doctor() -> None:
    """Look at this machine and at the running stack; each problem is told with its remedy."""
    problems = 0
    for finding in examination.examine(folder.default()):
        problems += bool(finding.remedy)
        sys.stdout.write(f"{'problem' if finding.remedy else 'ok     '}  {finding.text}\n")
        if finding.remedy:
            sys.stdout.write(f"         remedy: {finding.remedy}\n")
    if problems:
        raise SystemExit(1)


def trace(
    name: Annotated[str, typer.Argument(metavar="CORRELATION_ID", help="A run id or a trace id will do, too.")],
    place: Annotated[Path | None, typer.Option("--dir", help="The folder with the traces; this checkout's otherwise.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One span per line on stdout and nothing else.")] = False,
) -> None:
    """Draw what a request did in all processes, over time."""
    from rich.console import Console

    from standalone import traces

    try:
        found = traces.find(place or folder.default().traces, name)
    except StandaloneError as error:
        complain(str(error))
        raise SystemExit(1) from None
    for each in found:
        if as_json:
            sys.stdout.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in traces.rows(each))
        else:
            traces.draw(Console(), each)
