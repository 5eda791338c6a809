"""The pool and the transaction; the only importer of asyncpg."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import asyncpg
import stamina

from chassis import log
from netra import errors

_log = log.get(__name__)
Row = asyncpg.Record
_TRANSIENT = (OSError, asyncpg.PostgresConnectionError, asyncpg.CannotConnectNowError, asyncpg.InterfaceError, TimeoutError)


# the server goes down, comes up, is full, or chose this transaction as a victim: the same again may succeed
_AWAY = (
    OSError, asyncpg.PostgresConnectionError, asyncpg.OperatorInterventionError, asyncpg.InterfaceError,
    asyncpg.InsufficientResourcesError, asyncpg.TransactionRollbackError, asyncpg.ReadOnlySQLTransactionError,
    asyncpg.IdleInTransactionSessionTimeoutError,
    # a connection that was lost between two statements
    asyncpg.InternalClientError,
)  # fmt: skip
_UNFIT = (asyncpg.DataError, asyncpg.exceptions._base.DataError, asyncpg.IntegrityConstraintViolationError)


class Conflict(Exception):
    """A unique constraint was violated; its name is the argument."""


class Unfit(Exception):
    """A value does not fit the database; the same again would fail again."""


class Locked(errors.Unavailable):
    """Another transaction holds a lock that was waited for as long as the pool allows; nothing was written."""


class _Connection(asyncpg.Connection):
    """A connection whose return to the pool costs no round trip: all session state here is `SET LOCAL`."""

    async def reset(self, *, timeout: float | None = None) -> None:
        if self.is_in_transaction():
            await super().reset(timeout=timeout)


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
            async with self._connection.transaction():
                yield


class DatabaseManager:
    """The pool of one role. Errors of the driver leave as `Unavailable` (`Locked`), `DeadlineExceeded`, `Conflict` or `Unfit`."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool

    @contextlib.asynccontextmanager
    async def transaction(
        self, user_id: str | None = None, *, timeout_s: float = 10.0, within: Mapping[str, str] = MappingProxyType({})
    ) -> AsyncIterator[Transaction]:
        """One transaction. With a user, row-level security shows that user's rows and no other.

        `within` sets more of what policies look at (`netra.<name>`), for this transaction only: what a signed token allows beyond.
        """
        with translated():
            async with asyncio.timeout(timeout_s), self._pool.acquire() as connection, connection.transaction():
                if user_id is not None:
                    await connection.execute("SELECT set_config('netra.user_id', $1, true)", user_id)
                for name, value in within.items():
                    await connection.execute("SELECT set_config('netra.' || $1, $2, true)", name, value)
                yield Transaction(connection)

    async def close(self) -> None:
        """Wait for open transactions, up to 5 s, and close."""
        try:
            await asyncio.wait_for(self._pool.close(), 5.0)
        except TimeoutError:
            self._pool.terminate()


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
    except _UNFIT as error:
        raise Unfit(type(error).__name__) from error
    except _AWAY as error:
        _log.warning("database not reachable", error=type(error).__name__)
        raise errors.Unavailable("The database is not reachable just now. Try again.") from None


async def open_pool(dsn: str, name: str, *, size: int = 8, options: Mapping[str, str] = MappingProxyType({})) -> DatabaseManager:
    """A pool that waits for the database at start, however long it takes; `options` are settings of the server."""
    async for attempt in stamina.retry_context(on=_retryable, attempts=None, timeout=None, wait_initial=0.1, wait_max=2.0):
        with attempt:
            pool = await asyncpg.create_pool(
                dsn, min_size=1, max_size=size, connection_class=_Connection, timeout=5.0, init=_ids_as_text,
                server_settings={"application_name": name, "statement_timeout": "15s", **options},
            )  # fmt: skip
    return DatabaseManager(pool)


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
    except asyncpg.InsufficientPrivilegeError:
        return 0  # the schema was made a moment ago; its grants come with the first migration
