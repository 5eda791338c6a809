"""The SQL of a page of events: bounded in number and in bytes."""

from __future__ import annotations

# sizes are known without reading the frames, so a page costs what it sends
_PAGE = """
SELECT {columns} FROM (
    SELECT {columns}, sum(octet_length(frame)) OVER (ORDER BY {by}) - octet_length(frame) AS before
    FROM events.events WHERE {where} ORDER BY {by} LIMIT {limit}
) page WHERE before < {max_bytes} ORDER BY {by}
"""


def page(columns: str, by: str, where: str, *, limit: str, max_bytes: str) -> str:
    """Events in an order; the last one may go over `max_bytes`, so at least one is found, however big, if there is one."""
    return _PAGE.format(columns=columns, by=by, where=where, limit=limit, max_bytes=max_bytes)
