"""The hot reads of the services, as their roles, behind their walls: what they look at does not grow with what there is."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import orjson
import pytest

from chassis import postgres
from netra import errors, ids
from services.auth import store as auth_store
from services.auth import store_system as auth_system
from services.context import (
    artifacts,
    changes,
    contexts,
    store_artifacts,
    store_contexts,
    store_privacy,
    store_sharing,
    store_threads,
    threads,
)  # fmt: skip
from services.dispatcher import runs
from services.dispatcher import store as dispatcher_store
from services.dispatcher import store_erasure as dispatcher_erasure
from services.dispatcher import store_old_system as dispatcher_old
from services.dispatcher import store_system as dispatcher_system
from services.dispatcher import store_tools as dispatcher_tools
from services.dispatcher import store_waits as dispatcher_waits
from services.events import follow, progress
from services.events import store as events_store
from services.events import store_threads as events_threads
from standalone import prepare
from tests.fixtures import plans
from tests.fixtures.stack import Standalone

_DIGITS = "'0190{kind:04d}-0000-7000-8000-' || lpad(to_hex({n}), 12, '0')"
# of 40,000 of everything 500 are one user's; the rest is spread over others
_ALL = 40_000
_HEAVY, _GRANTEE = 1, 999_999
_OWNER = "CASE WHEN n % 80 = 0 THEN 1 ELSE 2 + n % 997 END"
# a page of 20, and little beside it
_FEW = 120


def _sql(kind: int, n: str) -> str:
    return f"({_DIGITS.format(kind=kind, n=n)})::uuid"


def _id(kind: int, n: int) -> str:
    return f"0190{kind:04d}-0000-7000-8000-{n:012x}"


def _user(n: str = _OWNER) -> str:
    return _sql(1, n)


_TENANT = _sql(9, "1")
_CONTEXT_ROWS = f"""
INSERT INTO context.threads (thread_id, user_id, tenant_id, messages) SELECT {_sql(2, "n")}, {_user()}, {_TENANT}, 1
FROM generate_series(1, {_ALL}) AS n;
UPDATE context.threads SET deleted_at = now() WHERE thread_id IN (SELECT {_sql(2, "n * 160")} FROM generate_series(1, {_ALL} / 160) AS n);
INSERT INTO context.messages (thread_id, position, message_id, user_id, owner_id, request_id, role, content, run_id)
SELECT {_sql(2, "80")}, n, {_sql(3, "n")}, {_user("1")}, {_user("1")}, 'm' || n, 'user', 'text', {_sql(5, "n")}
FROM generate_series(1, 5000) AS n;
INSERT INTO context.messages (thread_id, position, message_id, user_id, owner_id, request_id, role, content, run_id)
SELECT {_sql(2, "n")}, 1, {_sql(3, "n + 5000")}, {_user()}, {_user()}, 'm' || n, 'user', 'text', {_sql(5, "n")}
FROM generate_series(5, 15000) AS n WHERE n % 80 <> 0;
INSERT INTO context.contexts (context_id, user_id, owner_id, tenant_id, session_id, thread_id, run_id, request_id, roles, tier,
    created_at, depth, correlation_id, agent_context, audit_metadata, asked, closed_at)
SELECT {_sql(4, "n")}, {_user()}, {_user()}, {_TENANT}, {_sql(6, "n")}, {_sql(2, "n")}, {_sql(5, "n")}, 'c' || n, ARRAY['user'], 'free',
    now(), 0,
    md5(n::text), '{{}}', '{{}}', '', CASE WHEN n % 10 <> 0 THEN now() END FROM generate_series(1, {_ALL}) AS n;
INSERT INTO context.audit (user_id, context_id, actor, action, correlation_id, detail)
SELECT {_user()}, {_sql(4, "n")}, 'x', 'open', 'c', '{{}}' FROM generate_series(1, {_ALL}) AS n;
INSERT INTO context.artifacts (artifact_id, user_id, request_id, state, name, media_type, reserved, size, sha256, thread_id, owner_id)
SELECT {_sql(7, "n")}, {_user()}, 'a' || n, 'complete', 'n', 'text/plain', 1, 1, sha256('x'),
    CASE WHEN n % 160 = 0 THEN {_sql(2, "80")} END, CASE WHEN n % 160 = 0 THEN {_user("1")} END FROM generate_series(1, {_ALL}) AS n;
INSERT INTO context.artifact_chunks (artifact_id, position, user_id, data)
SELECT {_sql(7, "n")}, 0, {_user()}, 'x' FROM generate_series(1, {_ALL}) AS n;
INSERT INTO context.grants (thread_id, owner_id, tenant_id, grantee_id, access, hidden)
SELECT {_sql(2, "n * 80")}, {_user("1")}, {_TENANT}, {_user(str(_GRANTEE))}, 'read', n % 2 = 0 FROM generate_series(1, 100) AS n;
INSERT INTO context.grants (thread_id, owner_id, tenant_id, grantee_id, access)
SELECT {_sql(2, "80")}, {_user("1")}, {_TENANT}, {_user("n + 50000")}, 'read' FROM generate_series(1, 1000) AS n;
INSERT INTO context.grants (thread_id, owner_id, tenant_id, grantee_id, access, hidden)
SELECT {_sql(2, "n")}, {_user("1")}, {_TENANT}, {_user("2 + n % 997")}, 'write', n % 160 = 0 FROM generate_series(80, {_ALL}) AS n
WHERE n % 80 = 0;
ANALYZE context.threads, context.messages, context.contexts, context.audit, context.artifacts, context.artifact_chunks, context.grants;
"""  # noqa: S608 - of constants
_DISPATCHER_ROWS = f"""
INSERT INTO dispatcher.runs (run_id, user_id, thread_id, request_id, digest, kind, agent, request, inputs, deadline_s, context,
    context_token, correlation_id, traceparent, state, tier, created_at)
SELECT {_sql(5, "n")}, {_user()}, CASE WHEN n % 160 = 0 THEN {_sql(2, "80")} ELSE {_sql(2, "n")} END, 'r' || n, '', 'agent', 'echo',
    'x', '', 60, '',
    't', 'corr', '', CASE WHEN n > {_ALL} - 40 THEN 'queued' ELSE 'completed' END, 'free', now() - make_interval(secs => {_ALL} - n)
FROM generate_series(1, {_ALL}) AS n;
INSERT INTO dispatcher.tools (name, version, digest, document, state, revision, registered_by, changed_by)
SELECT 'tool.' || n, '1.0.0', repeat('a', 64), 'x', CASE WHEN n % 4 = 0 THEN 'replaced' ELSE 'active' END, n, 'x', 'x'
FROM generate_series(1, {_ALL}) AS n;
ANALYZE dispatcher.runs, dispatcher.tools;
"""  # noqa: S608 - of constants
# of 10,000 runs that wait half are one user's, on ten threads; so many are suspended, and so many execute whose lease has not run out
_QUEUED_ROWS = f"""
UPDATE dispatcher.runs SET state = 'queued', agent_version = '1.0.0',
    user_id = CASE WHEN run_id < {_sql(5, "5001")} THEN {_user("1")} ELSE user_id END,
    thread_id = CASE WHEN run_id < {_sql(5, "5001")} THEN ({_DIGITS.format(kind=2, n="90000 + get_byte(uuid_send(run_id), 15) % 10")})::uuid
        ELSE thread_id END
WHERE run_id < {_sql(5, "10001")};
UPDATE dispatcher.runs SET state = 'suspended', agent_version = '1.0.0', waits_for = 'message', wakes_at = now() + interval '1 day'
WHERE run_id BETWEEN {_sql(5, "10001")} AND {_sql(5, "12000")};
UPDATE dispatcher.runs SET state = 'running', agent_version = '1.0.0', lease_owner = 'x', lease_until = now() + interval '1 hour'
WHERE run_id BETWEEN {_sql(5, "12001")} AND {_sql(5, "12200")};
INSERT INTO dispatcher.messages (run_id, number, message_id, user_id, owner_id, thread_id, request_id, content)
SELECT {_sql(5, "10000 + n / 20")}, n % 20 + 1, {_sql(3, "n")}, {_user()}, {_user()}, {_sql(2, "n")}, 'm' || n, 'x'
FROM generate_series(20, {_ALL}) AS n;
INSERT INTO dispatcher.approvals (approval_id, run_id, user_id, thread_id, step_key, message, tool_name, parameters, quorum, created_at,
    expires_at)
SELECT {_sql(4, "n")}, {_sql(5, "10000 + n / 20")}, {_user()}, CASE WHEN n % 160 = 0 THEN {_sql(2, "80")} ELSE {_sql(2, "n")} END, '1', 'x',
    '', '{{}}', 1, now() - make_interval(secs => {_ALL} - n), now() + interval '1 day'
FROM generate_series(1, {_ALL}) AS n;
INSERT INTO dispatcher.approval_votes (approval_id, user_id, owner_id, thread_id, decision, comment)
SELECT {_sql(4, "n")}, {_user("1")}, {_user()}, {_sql(2, "n")}, 'approve', '' FROM generate_series(1, {_ALL}) AS n;
INSERT INTO dispatcher.agents_seen VALUES ('echo', '1.0.0', now());
ANALYZE dispatcher.runs, dispatcher.messages, dispatcher.approvals, dispatcher.approval_votes;
"""  # noqa: S608 - of constants
_EVENTS_ROWS = f"""
INSERT INTO events.cursors (user_id, last, last_at) SELECT {_user("n")}, 10000, now() FROM generate_series(1, 1000) AS n;
INSERT INTO events.heads (run_id, user_id, thread_id, request_id, correlation_id, trace_id, retention, next_seq, created_at,
    last_at, last_cursor)
SELECT {_sql(5, "n")}, {_user()}, CASE WHEN n % 400 = 0 THEN {_sql(2, "80")} ELSE {_sql(2, "n")} END, 'r' || n, 'c', '', 'free', 6000,
    now() - interval '1 hour', now(), 1 FROM generate_series(1, {_ALL}) AS n;
INSERT INTO events.events (retention, recorded_at, user_id, cursor, run_id, seq, thread_id, event_id, type, frame)
SELECT 'free', now() - interval '30 minutes', {_user("1")}, n, {_sql(5, "1 + (n - 1) / 5000 * 399")}, (n - 1) % 5000 + 1, {_sql(2, "80")},
    {_sql(8, "n")}, 'agent_thinking', 'x' FROM generate_series(1, 10000) AS n;
INSERT INTO events.events (retention, recorded_at, user_id, cursor, run_id, seq, thread_id, event_id, type, frame)
SELECT 'free', now() - interval '30 minutes', {_user("2 + n % 997")}, n, {_sql(5, "n + 300")}, 1, {_sql(2, "n")}, {_sql(8, "n + 10000")},
    'agent_thinking', 'x' FROM generate_series(1, 10000) AS n;
INSERT INTO events.days (user_id, day, retention, first_cursor)
SELECT user_id, (recorded_at AT TIME ZONE 'UTC')::date, retention, min(cursor) FROM events.events GROUP BY 1, 2, 3;
ANALYZE events.cursors, events.heads, events.events, events.days;
"""  # noqa: S608 - of constants
_AUTH_ROWS = f"""
INSERT INTO auth.users (user_id, tenant_id, email, roles, tier, password_hash)
SELECT {_user("n")}, {_TENANT}, 'u' || n || '@netra.example', ARRAY['user'], 'free', 'x' FROM generate_series(1, {_ALL}) AS n;
INSERT INTO auth.sessions (session_id, user_id, expires_at, idle_until)
SELECT {_sql(6, "n")}, {_user("1 + n % 5000")}, now() + interval '1 day', now() + interval '1 hour' FROM generate_series(1, {_ALL}) AS n;
INSERT INTO auth.refresh_tokens (token_digest, session_id, user_id, expires_at)
SELECT sha256(n::text::bytea), {_sql(6, "n")}, {_user("1 + n % 5000")}, now() + interval '1 day' FROM generate_series(1, {_ALL}) AS n;
ANALYZE auth.users, auth.sessions, auth.refresh_tokens;
"""  # noqa: S608 - of constants
_ME, _YOU = ids.UserId(_id(1, _HEAVY)), ids.UserId(_id(1, _GRANTEE))
_THREAD, _MIDDLE = ids.ThreadId(_id(2, 80)), ids.ThreadId(_id(2, _ALL // 2))
_GRANTED = ids.ThreadId(_id(2, 4000))
_RUN = ids.RunId(_id(5, _ALL // 2))
# days that nobody prepared are in the rest of their class
_BY_CURSOR, _BY_RUN = {"events_free_rest_user_id_cursor_idx"}, {"events_free_rest_user_id_run_id_seq_idx"}
# what is asked, the indexes one of which is meant to answer it, and how many rows may be looked at
Read = tuple[Callable[[], Awaitable[Any]], set[str], int]


@contextlib.asynccontextmanager
async def _as(stores: Standalone, database: str, service: str, kind: str = "", **options: str) -> AsyncIterator[plans.Listening]:
    """The one connection of a service's role, listened to."""
    password = (stores.secrets / service / f"postgres{kind}").read_text().strip()
    address = prepare.dsn(stores.postgres_admin_url, f"netra_{service}{kind}", password, database)
    opened = await postgres.open_pool(address, "plans", size=1, options=options)
    try:
        yield plans.Listening(opened)
    finally:
        await opened.close()


async def _filled(stores: Standalone, database: str, rows: str) -> None:
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
        await admin.execute(rows)


async def _slow(database: plans.Listening, reads: dict[str, Read], modes: tuple[str, ...] = plans.MODES) -> dict[str, object]:
    """What looks at more than it may, or does not use what is meant for it, by name of the read and kind of plan."""
    slow: dict[str, object] = {}
    for name, (ask, indexes, most) in reads.items():
        database.heard.clear()
        await ask()
        heard = list(database.heard)
        assert heard, name
        for mode in modes:
            found = [await plans.explained(database.inner, one, mode) for one in heard]
            used, looked = set[str]().union(*(one.indexes for one in found)), sum(one.most for one in found)
            print(f"{name:34} {mode:18} rows {looked:6} {', '.join(sorted(used))}")
            if looked > most or not indexes & used:
                slow[f"{name} ({mode})"] = {"rows": [one.rows for one in found], "used": sorted(used), "meant": sorted(indexes)}
    return slow


async def _going_on(database: postgres.DatabaseManager, thread_id: ids.ThreadId | None) -> None:
    """What an erasure looks for while it holds the threads."""
    change = changes.Change(_ME, ids.RequestId("erase-1"), "erase", thread_id)
    async with database.transaction(_ME) as transaction:
        with contextlib.suppress(errors.FailedPrecondition):
            await store_privacy.refuse_going_on(transaction, change)


async def test_the_hot_reads_of_context(stores: Standalone, database: str) -> None:
    await _filled(stores, database, _CONTEXT_ROWS)
    async with _as(stores, database, "context", **postgres.BY_KEY) as pool:
        opened, talk = store_contexts.ContextStore(pool), store_threads.ThreadStore(pool)
        files, shared = store_artifacts.ArtifactStore(pool), store_sharing.SharingStore(pool)
        context_id, any_ = ids.ContextId(_id(4, _ALL // 2)), contexts.Filter()
        artifact_id, me = ids.ArtifactId(_id(7, _ALL // 2)), artifacts.Actor(_ME, "free")
        reads: dict[str, Read] = {
            "context by id": (lambda: opened.by_id(_ME, context_id), {"contexts_pkey", "contexts_of_user"}, 5),
            "context by request": (lambda: opened.by_request(_ME, ids.RequestId(f"c{_ALL // 2}")), {"contexts_request"}, 5),
            "contexts, first page": (lambda: opened.page(_ME, any_, None, 20), {"contexts_of_user"}, _FEW),
            "contexts, later page": (lambda: opened.page(_ME, any_, context_id, 20), {"contexts_of_user"}, _FEW),
            "contexts of a thread": (lambda: opened.page(_ME, contexts.Filter(thread_id=_MIDDLE), None, 20), {"contexts_of_thread"}, _FEW),
            "contexts of a run": (lambda: opened.page(_ME, contexts.Filter(run_id=_RUN), None, 20), {"contexts_of_run"}, _FEW),
            "audit trail, later page": (lambda: opened.trail(_ME, contexts.About(), _ALL // 2, 20), {"audit_of_user"}, _FEW),
            "threads, first page": (lambda: talk.threads(_ME, threads.OWN, None, 20), {"threads_of_user"}, _FEW),
            "threads, later page": (lambda: talk.threads(_ME, threads.OWN, _MIDDLE, 20), {"threads_of_user"}, _FEW),
            "threads deleted": (lambda: talk.threads(_ME, threads.DELETED, _MIDDLE, 20), {"threads_deleted_of_user"}, _FEW),
            # granted ones are looked up in the list of what was granted to the reader
            "threads shared, first page": (lambda: talk.threads(_YOU, threads.SHARED, None, 20), {"grants_received"}, 600),
            "threads shared, later page": (lambda: talk.threads(_YOU, threads.SHARED, _GRANTED, 20), {"grants_received"}, 600),
            "messages, first page": (lambda: talk.messages(threads.Reader(_ME), _THREAD, 0, 20), {"messages_pkey"}, _FEW),
            "messages, later page": (lambda: talk.messages(threads.Reader(_ME), _THREAD, 4000, 20), {"messages_pkey"}, _FEW),
            "messages shared": (lambda: talk.messages(threads.Reader(_YOU), _THREAD, 4000, 20), {"messages_pkey", "grants_received"}, 600),
            "artifact by id": (lambda: files.by_id(me, artifact_id), {"artifacts_pkey", "artifacts_of_user"}, 10),
            "artifact by request": (lambda: files.by_request(me, ids.RequestId(f"a{_ALL // 2}")), {"artifacts_request"}, 5),
            "artifact chunk": (lambda: files.chunk(me, artifact_id, 0), {"artifact_chunks_pkey"}, 10),
            "artifacts, first page": (lambda: files.before(_ME, None, None, 20), {"artifacts_of_user"}, _FEW),
            "artifacts, later page": (lambda: files.before(_ME, None, artifact_id, 20), {"artifacts_of_user"}, _FEW),
            "artifacts of a thread": (lambda: files.before(_ME, _THREAD, artifact_id, 20), {"artifacts_of_thread"}, _FEW),
            "what a user keeps": (lambda: files.usage(_ME), {"usage_pkey"}, 1),
            "what goes on in a thread": (lambda: _going_on(pool, _THREAD), {"contexts_open_of_owner"}, 5),
            "what goes on in all threads": (lambda: _going_on(pool, None), {"contexts_open_of_owner"}, _FEW),
            "grants of a thread": (lambda: shared.grants(_ME, _THREAD, None, 20, withdrawn=True), {"grants_given"}, 60),
        }  # fmt: skip
        # the role asks for such plans always: for the values at hand, granted threads are sometimes looked for among all of their owner
        assert await _slow(pool, reads, plans.MODES[1:]) == {}


async def test_the_hot_reads_of_the_dispatcher(stores: Standalone, database: str) -> None:
    await _filled(stores, database, _DISPATCHER_ROWS)
    async with _as(stores, database, "dispatcher", **postgres.BY_KEY) as pool:
        mine = dispatcher_store.Store(pool)

        def page(before: str = "", **more: Any) -> Callable[[], Awaitable[Any]]:
            given: dict[str, Any] = {"thread_id": "", "state": "", **more}
            return lambda: mine.page(_ME, before=before, size=20, **given)

        reads: dict[str, Read] = {
            "run by id": (lambda: mine.get(_ME, _RUN), {"runs_pkey", "runs_by_user"}, 5),
            "run by request": (lambda: mine.by_request(_ME, f"r{_ALL // 2}"), {"runs_user_id_request_id_key"}, 5),
            "runs, first page": (page(), {"runs_by_user"}, _FEW),
            "runs, later page": (page(_RUN), {"runs_by_user"}, _FEW),
            "runs of a thread": (page(_RUN, thread_id=_THREAD), {"runs_by_thread"}, _FEW),
            "runs of a granted thread": (page(_RUN, thread_id=_THREAD, granted=_THREAD), {"runs_by_thread"}, _FEW),
        }
        assert await _slow(pool, reads) == {}
    async with _as(stores, database, "dispatcher", "_system") as pool:
        everyone = dispatcher_system.SystemStore(pool)
        tools = dispatcher_tools.ToolStore(pool)
        claim: dict[str, Read] = {
            "claim": (lambda: everyone.claim("me", 10.0, [("echo", "1.0.0")], 1, {"free": 1000}), {"runs_ready"}, 1200),
            "tools, as ever": (lambda: tools.since(_ALL, 200), {"tools_changed"}, 5),
            "tools, at the start": (lambda: tools.since(_ALL // 2, 20), {"tools_changed"}, _FEW),
        }
        assert await _slow(pool, claim) == {}


async def test_what_is_asked_of_a_long_queue(stores: Standalone, database: str) -> None:
    await _filled(stores, database, _DISPATCHER_ROWS + _QUEUED_ROWS)
    pairs, caps, run_id = [("echo", "1.0.0")], {"free": 1000}, ids.RunId(_id(5, 10_500))
    async with _as(stores, database, "dispatcher", "_system", jit="off", **postgres.BY_KEY) as pool:
        everyone, waits = dispatcher_system.SystemStore(pool), dispatcher_waits.SystemWaits(pool)
        old = dispatcher_old.OldRuns(pool)
        reads: dict[str, Read] = {
            # of twenty users and one: the noisy one among them, whose first run is found at once, and all that executes
            "claim of one": (lambda: everyone.claim("me", 10.0, pairs, 1, caps), {"runs_ready"}, 1200),
            "claim of one, later": (lambda: everyone.claim("me", 10.0, pairs, 1, caps, after_user=_ME), {"runs_ready"}, 1200),
            "claim of what nobody has": (lambda: everyone.claim("me", 10.0, pairs, 1, caps, missing_s=60.0), {"runs_versions"}, 1200),
            "claim of what waited too long": (lambda: everyone.claim("me", 10.0, pairs, 1, caps, queued_s=60.0), {"runs_ready"}, 3000),
            "mail of a run": (lambda: waits.mail(run_id, 10), {"messages_pkey"}, 20),
            "approval of a run": (lambda: waits.approval(run_id, _id(4, 10_000)), {"approvals_pkey"}, 5),
            "old tokens": (lambda: everyone.old_tokens(100), {"runs_tokens"}, _FEW),
            "runs that are old": (lambda: old.drop("free", 30, 20), {"runs_ended"}, _FEW),
            "what is left of erased runs": (lambda: old.drop_erased(20), {"runs_erased"}, _FEW),
        }
        # the role asks for such plans always
        assert await _slow(pool, reads, plans.MODES[1:]) == {}
    async with _as(stores, database, "dispatcher", **postgres.BY_KEY) as pool:
        mine = dispatcher_store.Store(pool)

        def page(after: str = "", **more: str) -> Callable[[], Awaitable[Any]]:
            given = {"run_id": "", "state": "", **more}
            return lambda: mine.approvals(_ME, after=after, size=20, **given)

        whole = dispatcher_erasure.ErasureStore(pool)

        def lines(kind: str) -> Callable[[], Awaitable[Any]]:
            return lambda: whole.lines(_ME, kind, ())

        own: dict[str, Read] = {
            "messages to be told": (lambda: whole.messages(_ME, [run_id], ()), {"messages_pkey"}, _FEW),
            "messages to others to be told": (lines("run_message"), {"messages_user_id_request_id_key"}, 700),
            "approvals to be told": (lines("approval"), {"approvals_of_user"}, 700),
            "votes to be told": (lines("vote"), {"approval_votes_pkey"}, 1200),
            "votes on others' to be told": (lines("vote elsewhere"), {"approval_votes_of_user", "approval_votes_pkey"}, _FEW),
            "whom a message goes to": (lambda: mine.addressee(_ME, "new", _THREAD), {"runs_of_thread"}, 50),
            "message by request": (lambda: mine.mail_by_request(_ME, f"m{_ALL // 2}"), {"messages_user_id_request_id_key"}, 5),
            "approval by id": (lambda: mine.approval(_ME, _id(4, _ALL // 2)), {"approvals_pkey"}, 5),
            "approvals, first page": (page(), {"approvals_of_user"}, _FEW),
            "approvals, later page": (page(_id(4, _ALL // 2)), {"approvals_of_user"}, _FEW),
            "approvals pending": (page(state="pending"), {"approvals_of_user"}, _FEW),
            "approvals of a run": (page(run_id=run_id), {"approvals_of_run", "approvals_of_user"}, 600),
            "approvals of a granted thread": (page(granted=_THREAD), {"approvals_of_thread"}, _FEW),
        }
        assert await _slow(pool, own) == {}


_RUNS_READ = """
SELECT seq_scan AS whole, (SELECT json_object_agg(indexrelname, json_build_array(idx_scan, idx_tup_read)) FROM pg_stat_user_indexes AS i
    WHERE i.relid = t.relid)::text AS indexes
FROM pg_stat_user_tables AS t WHERE t.relid = 'dispatcher.runs'::regclass
"""


async def test_what_starts_a_run_reads_by_indexes(stores: Standalone, database: str) -> None:
    await _filled(stores, database, _DISPATCHER_ROWS + _QUEUED_ROWS)
    address = prepare.on_database(stores.postgres_admin_url, database)
    async with _as(stores, database, "dispatcher", **postgres.BY_KEY) as pool, postgres.connection(address) as admin:
        mine = dispatcher_store.Store(pool.inner)

        async def read() -> tuple[int, dict[str, list[int]]]:
            # functions are not explained: what they read is counted, and told when asked
            await pool.inner.alone("SELECT pg_stat_force_next_flush()")
            (row,) = await admin.fetch(_RUNS_READ)
            return row["whole"], orjson.loads(row["indexes"])

        async def known() -> None:
            await mine.known(_YOU, "new", thread_id=_THREAD, most_queued=9, on_busy="reject")

        async def add() -> None:
            order = runs.Order(ids.RunId.new(), "agent", "echo", "", b"{}", 60.0, "", b"", "token", "", agent_version="1.0.0")
            await mine.add(
                _YOU, order, session_id=ids.uuid7(), tier="free", thread_id=ids.ThreadId.new(), request_id="new", digest=b"",
                correlation_id="c", most_queued=9, on_busy="interrupt", passed={}, owner="me", lease_s=60.0, concurrent=9,
            )  # fmt: skip

        looked = {"runs_user_id_request_id_key", "runs_of_thread", "runs_ready"}
        for ask, meant in ((known, looked), (add, looked | {"runs_executing", "runs_put_away"})):
            whole, before = await read()
            await ask()
            whole_after, after = await read()
            used = {name: after[name][1] - rows for name, (scans, rows) in before.items() if after[name][0] > scans}
            print(ask.__name__, used)
            assert whole_after == whole
            assert used.keys() >= meant
            assert sum(used.values()) <= 50


async def test_the_hot_reads_of_events(stores: Standalone, database: str) -> None:
    await _filled(stores, database, _EVENTS_ROWS)
    much = 256 * 1024
    async with _as(stores, database, "events", **events_store.OPTIONS) as pool:
        record, of_thread = events_store.Record(pool), events_threads.Threads(pool)
        reader = follow.Reader(str(_YOU), str(_THREAD), 0.0, 0.0)
        head = await of_thread.head(reader, _id(5, 400))
        reads: dict[str, Read] = {
            "events after a cursor": (lambda: record.page(_ME, 5000, limit=20, max_bytes=much), _BY_CURSOR, _FEW),
            "events of a run": (
                lambda: record.page(_ME, 9000, limit=20, max_bytes=much, run_id=_id(5, 400)), _BY_CURSOR | _BY_RUN, 2 * _FEW
            ),
            "end of a run": (lambda: record.end_of(_ME, _id(5, 80)), {"heads_pkey"}, 5),
            "runs of a thread": (lambda: of_thread.after(reader, _id(5, 4000), 20), {"heads_of_thread"}, _FEW),
            "runs of a thread that go on": (
                lambda: of_thread.going_on(reader, [_id(5, 400)], _id(5, 4000), "", 20),
                {"heads_of_thread", "heads_going_on", "heads_pkey"}, 4 * _FEW,
            ),
            "events of a thread's run": (
                lambda: of_thread.events(reader, [progress.Wanted(head, 4000, 0)], 20, much), _BY_RUN, _FEW
            ),
        }  # fmt: skip
        # the role asks for plans for the values at hand always: one for any values would look into every day
        slow = await _slow(pool, reads, plans.MODES[:1])
        assert slow == {}


async def test_the_hot_reads_of_auth(stores: Standalone, database: str) -> None:
    await _filled(stores, database, _AUTH_ROWS)
    async with _as(stores, database, "auth", "_system") as pool:
        everyone = auth_system.SystemStore(pool)
        used, tenant = bytes.fromhex("aa" * 32), _id(9, 1)
        reads: dict[str, Read] = {
            "user by e-mail": (lambda: everyone.by_email("u777@netra.example"), {"users_email_unique"}, 5),
            "refresh token": (lambda: everyone.rotate(used, bytes(32), ""), {"refresh_tokens_pkey"}, 10),
            "refresh token used before": (lambda: everyone.used_before(used), {"refresh_tokens_pkey"}, 5),
            "user to grant to": (lambda: everyone.resolved(tenant, None, "u777@netra.example"), {"users_email_unique"}, 5),
        }
        assert await _slow(pool, reads) == {}
    async with _as(stores, database, "auth") as pool:
        mine = auth_store.Store(pool)
        own: dict[str, Read] = {
            "sessions of a user": (lambda: mine.sessions(_ME, 20), {"sessions_of_user"}, _FEW),
            "password of a user": (lambda: mine.password_hash(_ME), {"users_pkey"}, 5),
        }
        assert await _slow(pool, own) == {}


@pytest.mark.multi_user
async def test_who_is_nobody_sees_nothing_of_all_that(stores: Standalone, database: str) -> None:
    """Every table that a service may read, over full tables: without a user, and for a user who has nothing, there is no row."""
    await _filled(stores, database, _CONTEXT_ROWS + _DISPATCHER_ROWS + _EVENTS_ROWS + _AUTH_ROWS)
    seen, looked = [], 0
    for service in prepare.SERVICES:
        async with _as(stores, database, service) as pool:
            async with pool.inner.transaction() as transaction:
                tables = await transaction.fetch(
                    "SELECT c.oid::regclass::text AS name, (SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute AS a"
                    "   WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
                    "   AND has_column_privilege(c.oid, a.attnum, 'SELECT')) AS columns FROM pg_class AS c"
                    " WHERE relnamespace = to_regnamespace($1) AND relkind IN ('r', 'p') AND relrowsecurity"
                    " AND has_any_column_privilege(c.oid, 'SELECT')",
                    service,
                )
            for user_id in (None, _id(1, 888_888)):
                for table in tables:
                    query = f"SELECT count(*) FROM (SELECT {table['columns']} FROM {table['name']}) AS t"  # noqa: S608 - of the catalogue
                    with contextlib.suppress(errors.NotFound):
                        async with pool.inner.transaction(user_id) as transaction:
                            count = await transaction.value(query)
                            looked += 1
                            if count:
                                seen.append((table["name"], user_id, count))
    assert seen == []
    assert looked > 20
