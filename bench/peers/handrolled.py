"""What a team writes first: Starlette (what FastAPI is made of), one WebSocket, asyncpg. Every event is committed, then sent.

It has what a demonstration needs and nothing else: the token is checked when the socket opens, the run and its user are in a row, the
events are numbered and kept. There is no claim, no lease, no replay, no cancel, no limit, no permission, no schema, no trace; a run that
was under way when its process died is lost. One process, uvicorn's fastest parts, the driver's own pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import asyncpg
import jwt
import orjson
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench.harness import child

SECRET = "a secret of this peer's alone, of 32 bytes and more"  # noqa: S105 - of a measurement
SCHEMA = """
CREATE TABLE runs (
    run_id uuid PRIMARY KEY, user_id uuid NOT NULL, thread_id uuid NOT NULL, agent text NOT NULL, request text NOT NULL,
    state text NOT NULL, created_at timestamptz NOT NULL DEFAULT now(), ended_at timestamptz);
CREATE INDEX ON runs (user_id, created_at);
CREATE TABLE events (
    run_id uuid NOT NULL REFERENCES runs, seq integer NOT NULL, type text NOT NULL, data jsonb NOT NULL,
    at timestamptz NOT NULL DEFAULT now(), PRIMARY KEY (run_id, seq));
"""
_EVENT = "INSERT INTO events (run_id, seq, type, data) VALUES ($1, $2, $3, $4)"
# the row of a run comes with its first event, its end with the last one: no commit is there that is not an event's
_FIRST = f"""
WITH run AS (INSERT INTO runs (run_id, user_id, thread_id, agent, request, state) VALUES ($1, $5, $6, $7, $8, 'running') RETURNING run_id)
{_EVENT.replace("VALUES ($1, $2, $3, $4)", "SELECT run_id, $2, $3, $4 FROM run")}
"""  # noqa: S608 - of constants
_LAST = f"WITH over AS (UPDATE runs SET state = 'completed', ended_at = now() WHERE run_id = $1) {_EVENT}"  # noqa: S608 - of constants


async def look(text: str) -> str:
    """The tool that the other side calls."""
    return text


class Run:
    """One run of one user, told on their socket."""

    def __init__(self, pool: Any, socket: WebSocket, user_id: str, frame: dict[str, Any]) -> None:
        self._pool, self._socket, self._user_id = pool, socket, user_id
        self._request_id, self._payload = frame["id"], frame["payload"]
        self._run_id, self._thread_id, self._seq = str(uuid.uuid4()), str(uuid.uuid4()), 0

    async def _tell(self, kind: str, data: dict[str, Any], query: str = _EVENT, *more: object) -> None:
        self._seq += 1
        await self._pool.execute(query, self._run_id, self._seq, kind, orjson.dumps(data).decode(), *more)
        frame = {
            "type": kind, "seq": self._seq, "event_id": str(uuid.uuid4()), "user_id": self._user_id, "thread_id": self._thread_id,
            "run_id": self._run_id, "request_id": self._request_id, "timestamp": datetime.now(UTC).isoformat(), "data": data,
        }  # fmt: skip
        await self._socket.send_text(orjson.dumps(frame).decode())

    async def _tool(self, call: Callable[[str], Awaitable[str]], text: str) -> str:
        call_id, began = str(uuid.uuid4()), time.perf_counter()
        await self._tell("tool_executing", {"tool_name": call.__name__, "tool_call_id": call_id, "parameters": {"text": text}})
        result = await call(text)
        took = round((time.perf_counter() - began) * 1000, 3)
        done = {"tool_name": call.__name__, "tool_call_id": call_id, "status": "success", "result": result, "execution_time_ms": took}
        await self._tell("tool_completed", done)
        return result

    async def execute(self) -> None:
        """From its first event to its last."""
        request, agent = self._payload["user_request"], self._payload["agent"]
        first = {"agent_name": agent, "status": "started", "message": f"{agent} begins."}
        await self._tell("agent_started", first, _FIRST, self._user_id, self._thread_id, agent, request)
        ack = {"type": "ack", "id": self._request_id, "data": {"run_id": self._run_id, "thread_id": self._thread_id}}
        await self._socket.send_text(orjson.dumps(ack).decode())
        await self._tell("message_created", {"message_id": str(uuid.uuid4()), "role": "user", "content": request})
        await self._tell("agent_thinking", {"reasoning": "First how much it was, then where it went.", "step_number": 1})
        answers = [await self._tool(look, request), await self._tool(look, request)]
        message = {"message_id": str(uuid.uuid4()), "role": "assistant", "content": "Both have answered."}
        await self._tell("message_created", message)
        await self._tell(
            "agent_completed", {"status": "completed", "result": {"message": "Both have answered.", "answers": answers}}, _LAST
        )


async def serve(socket: WebSocket) -> None:
    """One user's socket: each START_AGENT is a task."""
    offered = socket.scope["subprotocols"]
    try:
        user_id = jwt.decode(offered[1].removeprefix("bearer."), SECRET, algorithms=["HS256"])["sub"]
    except (IndexError, jwt.InvalidTokenError):
        await socket.close(4401)
        return
    await socket.accept(subprotocol=offered[0])
    async with asyncio.TaskGroup() as runs:
        with contextlib.suppress(WebSocketDisconnect):
            while True:
                frame = orjson.loads(await socket.receive_text())
                runs.create_task(Run(socket.app.state.pool, socket, user_id, frame).execute())


def tokens(many: int) -> list[str]:
    """Of so many users."""
    return [jwt.encode({"sub": str(uuid.uuid4()), "exp": int(time.time()) + 3600}, SECRET, algorithm="HS256") for _ in range(many)]


@contextlib.asynccontextmanager
async def _pool(app: Starlette, dsn: str) -> AsyncIterator[None]:
    async with asyncpg.create_pool(dsn, min_size=4, max_size=32) as pool:
        await pool.execute(SCHEMA)
        app.state.pool = pool
        yield


async def main(dsn: str) -> None:
    """Serve until the parent is gone; the port is told to it."""
    app = Starlette(routes=[WebSocketRoute("/ws", serve)], lifespan=lambda app: _pool(app, dsn))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", access_log=False, ws="websockets-sansio"))
    async with asyncio.TaskGroup() as group:
        group.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(0.01)
        await child.answer({"port": server.servers[0].sockets[0].getsockname()[1]})
        server.should_exit = True


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
