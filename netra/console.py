"""What all commands of the command line share: where to go and as whom, what is shown, how it ends."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich.console import Console

from netra import credentials, errors, show
from netra.api import Api, Token

DEFAULT_URL = "http://127.0.0.1:8080"
_T = TypeVar("_T")
out, err = Console(), Console(stderr=True)
Url = Annotated[str, typer.Option("--url", envvar="NETRA_URL", help="The gateway; the one of this checkout, else 127.0.0.1:8080.")]
Credential = Annotated[str, typer.Option("--token", envvar="NETRA_TOKEN", help="An access token.", show_envvar=True)]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON value per line on stdout and nothing else.")]


def store() -> credentials.Store:
    """Where sign-ins are remembered."""
    return credentials.Store(Path(typer.get_app_dir("netra")))


def signed_in(url: str, token: str) -> tuple[str, Token]:
    """Where to go and as whom: what was given, else a stored sign-in, else the development user of this checkout."""
    local = credentials.standalone(Path.cwd())
    chosen = (url or (local.url if local is not None else DEFAULT_URL)).rstrip("/")
    if token:
        return chosen, token
    remembered = store()
    if remembered.has(chosen):
        return chosen, lambda: remembered.token(chosen)
    if local is not None and local.url.rstrip("/") == chosen:
        return chosen, credentials.development(local)
    raise errors.Unauthenticated("Nobody is signed in. Run `netra login`, or set NETRA_TOKEN.")


def complete(work: Callable[[], Awaitable[_T]]) -> _T:
    """Run to the end; what goes wrong becomes one line on stderr and exit code 1 (130 for Ctrl-C)."""

    async def awaited() -> _T:
        return await work()

    try:
        return asyncio.run(awaited())
    except errors.NetraError as error:
        show.failure(err, error.code, error.message)
        raise typer.Exit(1) from None
    except OSError as error:
        show.failure(err, "ERROR", str(error))
        raise typer.Exit(1) from None
    except Exception as error:
        show.failure(err, errors.Internal.code, f"netra cannot go on: {error!r}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def line(value: Any) -> None:
    """One JSON value on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")
    sys.stdout.flush()


def show_event(event: dict[str, Any], as_json: bool) -> None:
    """One event of the record."""
    if as_json:
        line(event)
    else:
        show.event(out, event)


def table(rows: Iterable[dict[str, Any]], columns: tuple[str, ...], as_json: bool) -> None:
    """Rows as a table, or as they are."""
    if not as_json:
        show.table(out, rows, columns)
        return
    for row in rows:
        line(row)


def asked(url: str, token: str, wanted: Callable[[Api], Awaitable[_T]]) -> _T:
    """What one gateway answers, in the name of whoever is signed in."""

    async def work() -> _T:
        where, who = signed_in(url, token)
        async with Api(where, who) as api:
            return await wanted(api)

    return complete(work)


def told(path: Path) -> None:
    """Where a file was written."""
    err.print(str(path), soft_wrap=True, markup=False, highlight=False)
