"""The process that reads a log and computes its figures: one request as JSON on standard input, one answer on standard output."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import duckdb

from netra import errors
from services.dispatcher.tools.spend import duck, normal

Answer = Mapping[str, Any]


def answer(request: Mapping[str, Any], folder: Path) -> Answer:
    """The result of one request, or its error: what `tools.sandbox.process` takes for an answer."""
    try:
        return {"result": _result(request, folder)}
    except errors.NetraError as error:
        return _problem(error)
    except duckdb.OutOfMemoryException:
        traceback.print_exc()
        return _problem(errors.ToolFailed("This log needs more memory to be analysed than a tool gets. Split it by time."))
    except duckdb.IOException:
        traceback.print_exc()
        return _problem(errors.ToolFailed("This log could not be read or written; the disk for temporary files may be full."))


def _result(request: Mapping[str, Any], folder: Path) -> Any:
    if request["tool"] == "usage_load":
        given = {name: request[name] for name in ("model", "named", "zone")}
        return normal.load(folder, folder / request["file"], request["name"], **given)
    compute = _computation(request["tool"])
    if not (folder / normal.USAGE).exists():
        raise errors.FailedPrecondition("There is no usage log yet in this run; call usage_load first.")
    with duck.opened(folder) as connection:
        return compute(connection, f"read_parquet({duck.text(str(folder / normal.USAGE))})")


def _computation(tool: str) -> Callable[[duckdb.DuckDBPyConnection, str], Any]:
    # the price list is large: a process that needs none does not load it
    if tool == "usage_profile":
        from services.dispatcher.tools.spend import profile

        return profile.usage_profile
    if tool == "cost_breakdown":
        from services.dispatcher.tools.spend import cost

        return cost.cost_breakdown
    from services.dispatcher.tools.spend import opportunities

    return opportunities.spend_opportunities


def _problem(error: errors.NetraError) -> Answer:
    return {"error": {"code": error.code, "message": error.message, "details": error.details}}


def main() -> None:
    """Answer the request on standard input. What anything else prints goes to standard error."""
    out = os.dup(1)
    os.dup2(2, 1)
    found = answer(json.load(sys.stdin), Path.cwd())
    with open(out, "w", encoding="utf-8") as stream:
        json.dump(found, stream)


if __name__ == "__main__":
    main()
