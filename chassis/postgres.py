"""The pool and the transaction; the only importer of asyncpg."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType, SimpleNamespace
from typing import Any, TypeVar

import asyncpg
import stamina
from opentelemetry import metrics

from chassis import log
from netra import deadline, errors

_log = log.get(__name__)
# not through `telemetry`: set-up work that needs this door only must not pay for loading what exports
_meter = metrics.get_meter("netra")
_waiting = _meter.create_gauge("netra.postgres.waiting", description="Transactions that wait for a connection, by pool.")
_repeated = _meter.create_counter("netra.postgres.repeated", description="Transactions done again, as they had to give way.")
Row = asyncpg.Record
_T = TypeVar("_T")
_TRANSIENT = (OSError, asyncpg.PostgresConnectionError, asyncpg.CannotConnectNowError, asyncpg.InterfaceError, TimeoutError)
_TIMEOUT_S = 10.0
# of what had to give way to another transaction
_ATTEMPTS = 3
# how long a rollback may take before its connection is thrown away
_UNDO_S = 2.0
# the last line, should a process be stopped or its network be gone; the transaction's own deadline comes first
_SESSION = {"statement_timeout": "15s", "idle_in_transaction_session_timeout": "15s"}
# For a role whose statements all name the rows they want by an index: of such a statement and a wall that says the same again the
# planner expects far fewer rows than there are, and would rather gather and sort all rows of a user than read a page in its order.
BY_KEY: Mapping[str, str] = MappingProxyType({"enable_bitmapscan": "off", "plan_cache_mode": "force_generic_plan"})
# what the driver was told of types that come with PostgreSQL: their numbers are below this one, and the same in every database
_FIRST_OWN_TYPE = 16_384
_types: dict[frozenset[int], Sequence[Any]] = {}
# in the place of the statement that asks: the driver prepares its caller's again when that one had no name
_NOT_ASKED = SimpleNamespace(name="not asked")
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_NAME = re.compile(r"[a-z][a-z_]{0,39}")
_VALUE = re.compile(r"[0-9A-Za-z_.:@/=+-]{0,256}")

# the server goes down, comes up, is full, or chose this transaction as a victim: the same again may succeed
_AWAY = (
    OSError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError, asyncpg.InterfaceError,
    asyncpg.InsufficientResourcesError, asyncpg.TransactionRollbackError, asyncpg.ReadOnlySQLTransactionError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    # a connection that was lost between two statements
    asyncpg.InternalClientError,
)  # fmt: skip
# what a connection says that died while it lay in the pool
# the driver's own error: the server's last word came in before it was asked, and the connection is not known to be closed yet
_DEAD = (
    ConnectionError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError, asyncpg.InterfaceError, asyncpg.InternalClientError
)  # fmt: skip
_VICTIM = (asyncpg.DeadlockDetectedError, asyncpg.SerializationError)
_UNFIT = (asyncpg.DataError, asyncpg.exceptions._base.DataError, asyncpg.IntegrityConstraintViolationError)


class Conflict(Exception):
    """A unique constraint was violated; its name is the argument."""


class Unfit(Exception):
    """A value does not fit the database; the same again would fail again."""


class Locked(errors.Unavailable):
    """Another transaction holds a lock that was waited for as long as the pool allows; nothing was written."""


class Victim(errors.Unavailable):
    """The transaction had to give way to another one, in a deadlock for example; nothing was written. Try again."""


class Undecided(errors.Unavailable):
    """The database was lost in the moment of the commit: nobody knows whether it is done. Ask again with the same request id."""


class _Connection(asyncpg.Connection):
    """A connection whose return to the pool costs no round trip: all session state here is `SET LOCAL`.

    What the driver asks the server about its types, it asks once in this process: for arrays of uuid and the like that took three
    round trips and 40 ms of the server's processor time in every new connection.
    """

    @property
    def rests(self) -> bool:
        """Whether it may be given back without waiting for anything."""
        return not (self.is_closed() or self.is_in_transaction() or self._protocol._is_cancelling())  # type: ignore[attr-defined]

    async def reset(self, *, timeout: float | None = None) -> None:
        if self.is_in_transaction():
            await super().reset(timeout=timeout)

    async def _introspect_types(self, typeoids: Iterable[int], timeout: float | None) -> tuple[Sequence[Any], Any]:
        wanted = frozenset(typeoids)
        if (known := _types.get(wanted)) is not None:
            return known, _NOT_ASKED
        found, asked = await super()._introspect_types(typeoids, timeout)  # type: ignore[misc]
        if max(wanted) < _FIRST_OWN_TYPE:
            _types[wanted] = found
        return found, asked


class Transaction:
    """One open transaction."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def execute(self, query: str, *arguments: object) -> str:
        """Run a statement; returns its command tag."""
        return str(await self._connection.execute(query, *arguments))

    async def fetch(self, query: str, *arguments: object) -> list[Row]:
        """All rows."""
        return list(await self._connection.fetch(query, *arguments))

    async def row(self, query: str, *arguments: object) -> Row | None:
        """The first row, or None."""
        found: Row | None = await self._connection.fetchrow(query, *arguments)
        return found

    async def value(self, query: str, *arguments: object) -> Any:
        """The first column of the first row, or None."""
        return await self._connection.fetchval(query, *arguments)

    async def many(self, query: str, rows: Sequence[Sequence[object]]) -> None:
        """Run a statement once per row."""
        await self._connection.executemany(query, rows)

    @contextlib.asynccontextmanager
    async def savepoint(self) -> AsyncIterator[None]:
        """A nested transaction: an error inside undoes only what was done inside."""
        with translated():
            if not self._connection.is_in_transaction():
                async with self._connection.transaction():
                    yield
                return
            # the driver does not know of a transaction that it did not begin; of one name the innermost is meant
            await self._connection.execute("SAVEPOINT inner_one")
            try:
                yield
            except BaseException:
                await _undone(self._connection, "ROLLBACK TO inner_one; RELEASE inner_one")
                raise
            await self._connection.execute("RELEASE inner_one")


class DatabaseManager:
    """The pool of one role. Errors of the driver leave as `Unavailable` (`Locked`, `Victim`, `Undecided`), `DeadlineExceeded`,
    `Conflict` or `Unfit`.
    """

    def __init__(self, pool: Any, name: str = "") -> None:
        self._pool = pool
        self._size: int = pool.get_max_size()
        self._asking = 0
        self._labels = {"pool": name}

    @property
    def waiting(self) -> int:
        """How many transactions wait for a connection just now."""
        return max(self._asking - self._size, 0)

    @contextlib.asynccontextmanager
    async def transaction(
        self, user_id: str | None = None, *, timeout_s: float = _TIMEOUT_S, within: Mapping[str, str] = MappingProxyType({})
    ) -> AsyncIterator[Transaction]:
        """One transaction. With a user, row-level security shows that user's rows and no other.

        It ends with the caller's deadline, or after `timeout_s`, whichever is sooner; so does each statement, also at the server.
        `within` sets more of what policies look at (`netra.<name>`), for this transaction only: what a signed token allows beyond.
        """
        set_ = _settings(user_id, within)
        committing = False
        with translated():
            try:
                async with self._begun(timeout_s, set_) as connection:
                    yield Transaction(connection)
                    committing = True
                    await _committed(connection)
                    # what comes after changes nothing of that
                    committing = False
            except (TimeoutError, *_AWAY) as error:
                if committing and not isinstance(error, (asyncpg.QueryCanceledError, asyncpg.TransactionRollbackError)):
                    _log.warning("the database was lost in the moment of a commit", error=type(error).__name__)
                    raise Undecided from None
                raise

    async def retried(
        self, user_id: str | None, work: Callable[[Transaction], Awaitable[_T]], *, attempts: int = _ATTEMPTS,
        timeout_s: float = _TIMEOUT_S, within: Mapping[str, str] = MappingProxyType({}),
    ) -> _T:  # fmt: skip
        """What `work` returns, done in a transaction; done again from the beginning when that had to give way to another one.

        Raises what `transaction` raises; `Victim` when it had to give way each time. All attempts together get `timeout_s`.
        """
        now = asyncio.get_running_loop().time
        ends = now() + timeout_s

        async def once() -> _T:
            async with self.transaction(user_id, timeout_s=ends - now(), within=within) as transaction:
                return await work(transaction)

        return await self._again(once, attempts)

    async def _again(self, work: Callable[[], Awaitable[_T]], attempts: int) -> _T:
        """What `work` returns, done again when it had to give way. Raises `Victim` when it had to each time."""
        for attempt in range(1, attempts + 1):
            try:
                return await work()
            except Victim:
                if attempt == attempts:
                    raise
            _repeated.add(1, self._labels)
            # those that met must not meet again
            await asyncio.sleep(random.uniform(0.005, 0.025) * 2**attempt)  # noqa: S311 - no secret
        raise errors.Internal("No attempt was allowed.")

    async def alone(self, query: str, *arguments: object, timeout_s: float = _TIMEOUT_S) -> list[Row]:
        """All rows of one statement that is a transaction by itself, in one round trip: for one that may be done twice. When its
        connection dies it is done again on another, and nobody knows whether it was done before; and when it had to give way.

        Raises what `transaction` raises; `Undecided` when nobody knows whether it is done.
        """
        now = asyncio.get_running_loop().time
        ends = now() + timeout_s
        return await self._again(lambda: self._alone(query, arguments, ends - now()), _ATTEMPTS)

    async def _alone(self, query: str, arguments: Sequence[object], timeout_s: float) -> list[Row]:
        left, unknown = self._size, False
        self._asking += 1
        with translated():
            try:
                async with asyncio.timeout(deadline.timeout(timeout_s)):
                    while True:
                        connection = await self._acquired()
                        unknown = True
                        try:
                            return list(await connection.fetch(query, *arguments))
                        except BaseException as error:
                            # an error on a connection that lives on is the server's answer: nothing was done
                            unknown = not await _undone(connection, "SELECT 1") or not isinstance(error, Exception)
                            # all of the pool may have died so; a new one that cannot be made is an error at once
                            if not unknown or not left or not isinstance(error, Exception):
                                raise
                            left -= 1
                        finally:
                            await self._released(connection)
            except (TimeoutError, *_AWAY) as error:
                if unknown:
                    _log.warning("the database was lost in the middle of a statement", error=type(error).__name__)
                    raise Undecided from None
                raise
            finally:
                self._asking -= 1

    async def check(self, timeout_s: float = 1.0) -> None:
        """Returns when the database answers. Raises `Unavailable` or `DeadlineExceeded`."""
        async with self.transaction(timeout_s=timeout_s) as transaction:
            await transaction.value("SELECT 1")

    @contextlib.asynccontextmanager
    async def _begun(self, timeout_s: float, set_: str) -> AsyncIterator[Any]:
        """A connection with a transaction, which is rolled back on an error: a connection returns without one, or not at all."""
        self._asking += 1
        connection = None
        try:
            async with asyncio.timeout(deadline.timeout(timeout_s)) as limit:
                connection = await self._begin(limit, set_)
                try:
                    yield connection
                except BaseException:
                    await _undone(connection, "ROLLBACK")
                    raise
        finally:
            try:
                # outside of the time: what is done by now is done
                if connection is not None:
                    await self._released(connection)
            finally:
                self._asking -= 1

    async def _released(self, connection: Any) -> None:
        """Give a connection back. The pool throws away one that it cannot take: of the transaction that changes nothing."""
        with contextlib.suppress(TimeoutError, *_AWAY):
            if connection._con is not None and connection._con.rests:
                # as the driver does, but for the task that it makes, lest the wait be cut: there is none
                connection._con._on_release()
                await connection._holder.release(_UNDO_S)
            else:
                await self._pool.release(connection, timeout=_UNDO_S)

    async def _begin(self, limit: asyncio.Timeout, set_: str) -> Any:
        """Begin, in one round trip. On a connection that died unseen nothing was done: another one takes its place.

        When the server went away all of the pool may have died so; a new one that cannot be made is an error at once.
        """
        for more in range(self._size, -1, -1):
            connection = await self._acquired()
            try:
                await connection.execute(_beginning(limit, set_))
            except BaseException as error:
                await _undone(connection, "ROLLBACK")
                await self._released(connection)
                if not more or not isinstance(error, _DEAD):
                    raise
            else:
                break
        return connection

    async def _acquired(self) -> Any:
        if not self.waiting:
            return await self._pool.acquire()
        _waiting.set(self.waiting, self._labels)
        try:
            return await self._pool.acquire()
        finally:
            _waiting.set(max(self.waiting - 1, 0), self._labels)

    async def close(self) -> None:
        """Wait for open transactions, up to 5 s, and close."""
        try:
            await asyncio.wait_for(self._pool.close(), 5.0)
        except TimeoutError:
            self._pool.terminate()


def _settings(user_id: str | None, within: Mapping[str, str]) -> str:
    """Statements that set what policies look at. They are text, not parameters, so that all goes in one message."""
    if user_id is not None and not _UUID.fullmatch(user_id):
        raise Unfit("user_id")
    for name, value in within.items():
        if not _NAME.fullmatch(name) or name == "user_id" or not _VALUE.fullmatch(value):
            raise Unfit(name)
    wanted = within if user_id is None else {"user_id": user_id, **within}
    return "".join(f"; SET LOCAL netra.{name} = '{value}'" for name, value in wanted.items())


def _beginning(limit: asyncio.Timeout, set_: str) -> str:
    ends = limit.when()
    left_ms = _TIMEOUT_S * 1000 if ends is None else (ends - asyncio.get_running_loop().time()) * 1000
    return f"BEGIN; SET LOCAL statement_timeout = {max(int(left_ms), 1)}{set_}"


async def _committed(connection: Any) -> None:
    # the server answers ROLLBACK when a statement had failed and somebody swallowed the error
    if await connection.execute("COMMIT") != "COMMIT":
        raise errors.Internal("A statement of the transaction had failed: nothing of it is stored.")


async def _undone(connection: Any, statement: str) -> bool:
    """Undo; a connection on which that cannot be done is thrown away, and with it all that was done on it: then false."""
    try:
        async with asyncio.timeout(_UNDO_S):
            await connection.execute(statement)
    except BaseException as error:
        with contextlib.suppress(asyncpg.InterfaceError):
            connection.terminate()
        if not isinstance(error, Exception):
            raise
        return False
    return True


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Raise our errors instead of the driver's."""
    try:
        yield
    except asyncpg.UniqueViolationError as error:
        raise Conflict(error.constraint_name or "") from None
    except (asyncpg.QueryCanceledError, TimeoutError):
        raise errors.DeadlineExceeded("The database did not answer in time.") from None
    except asyncpg.LockNotAvailableError:
        raise Locked("Another transaction holds what this one needs. Try again.") from None
    except _VICTIM:
        raise Victim("Another transaction needed the same at the same moment. Try again.") from None
    except _UNFIT as error:
        raise Unfit(type(error).__name__) from error
    except asyncpg.InsufficientPrivilegeError as error:
        # a policy refused the row, or a role was not granted what the code needs: the log shows which
        _log.warning("the database refused a statement", reason=str(error))
        raise errors.PermissionDenied("You may not do this, or not any more.") from error
    except _AWAY as error:
        _log.warning("database not reachable", error=type(error).__name__)
        raise errors.Unavailable("The database is not reachable just now. Try again.") from None


async def open_pool(dsn: str, name: str, *, size: int = 8, options: Mapping[str, str] = MappingProxyType({})) -> DatabaseManager:
    """A pool that waits for the database at start, however long it takes; `options` are settings of the server."""
    async for attempt in stamina.retry_context(on=_retryable, attempts=None, timeout=None, wait_initial=0.1, wait_max=2.0):
        with attempt:
            pool = await asyncpg.create_pool(
                dsn, min_size=1, max_size=size, connection_class=_Connection, timeout=5.0, init=_ids_as_text,
                server_settings={"application_name": name, **_SESSION, **options},
            )  # fmt: skip
    return DatabaseManager(pool, name)


async def _ids_as_text(connection: Any) -> None:
    # the driver's own codec refuses subclasses of str, which our typed ids are
    await connection.set_type_codec("uuid", schema="pg_catalog", encoder=str, decoder=str, format="text")


def _retryable(error: Exception) -> bool:
    # the roles and the database are made by a job that may still run
    starting = (asyncpg.InvalidAuthorizationSpecificationError, asyncpg.InvalidCatalogNameError)
    return isinstance(error, (*_TRANSIENT, *starting))


@contextlib.asynccontextmanager
async def connection(dsn: str) -> AsyncIterator[Transaction]:
    """One connection outside of a pool, in autocommit, for set-up work. Waits up to a minute for a starting server."""
    opened = await _connected(dsn)
    try:
        yield Transaction(opened)
    finally:
        await opened.close()


@stamina.retry(on=_TRANSIENT, attempts=None, timeout=60.0, wait_initial=0.05, wait_max=0.5)
async def _connected(dsn: str) -> Any:
    return await asyncpg.connect(dsn, timeout=5.0)


async def schema_version(database: DatabaseManager, schema: str) -> int:
    """The highest migration applied to a schema; 0 when there is none."""
    try:
        async with database.transaction() as transaction:
            if await transaction.value("SELECT to_regclass($1)", f"{schema}.migrations") is None:
                return 0
            return int(await transaction.value(f"SELECT coalesce(max(version), 0) FROM {schema}.migrations"))  # noqa: S608 - a constant of ours
    except errors.PermissionDenied:
        return 0  # the schema was made a moment ago; its grants come with the first migration
