"""python -m tests.wire: the suite against a gateway of its own, as a table; exit 1 when one case is off."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator

from rich.console import Console
from rich.table import Table

from tests.prove import place
from tests.wire import cases, check, handshakes

Row = tuple[str, str, str, str]


async def _rows() -> AsyncIterator[Row]:
    async with place.running() as found:
        port, token = found.system.ports["gateway"], found.user.token
        for asked in handshakes.handshakes(token):
            yield "handshake", asked.name, asked.status, await check.answered(port, token, asked)
        for case in cases.cases():
            yield case.group, case.name, check.expected(case), await check.seen(port, token, case)


async def _main() -> int:
    rows = [row async for row in _rows()]
    table = Table("Group", "Case", "Expected", "Seen", title="RFC 6455")
    off = [row for row in rows if not check.agrees(row[2], row[3])]
    for row in rows:
        table.add_row(*row, style="red" if row in off else None)
    Console().print(table)
    Console().print(f"{len(rows)} cases, {len(off)} off.")
    return 1 if off else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
