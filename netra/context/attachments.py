"""What is at hand while a context is used, and never goes along with it: a database transaction, a connection."""

from __future__ import annotations

from typing import TypeVar

from netra import errors

T = TypeVar("T")


class Attached:
    """The two attachments. They count for nothing in comparisons, and no copy, child, message, claim, log line or pickle has them.

    No dataclass, so that they are no fields of the one that is built on it.
    """

    __slots__ = ("__weakref__", "_connection", "_transaction")
    _transaction: object | None
    _connection: object | None

    @property
    def has_transaction(self) -> bool:
        """Whether a database transaction is attached."""
        return self._transaction is not None

    @property
    def has_connection(self) -> bool:
        """Whether a connection is attached."""
        return self._connection is not None

    def transaction(self, kind: type[T]) -> T:
        """The attached transaction. Raises `FailedPrecondition` when there is none of this kind."""
        return _of_kind(self._transaction, kind, "transaction")

    def connection(self, kind: type[T]) -> T:
        """The attached connection. Raises `FailedPrecondition` when there is none of this kind."""
        return _of_kind(self._connection, kind, "connection")


def required(name: str, value: object) -> object:
    """The value. Raises `InvalidContext` when there is none."""
    if value is None:
        raise errors.InvalidContext(f"{name} is required", field=name)
    return value


def _of_kind(attached: object | None, kind: type[T], name: str) -> T:
    if not isinstance(attached, kind):
        raise errors.FailedPrecondition(f"No {name} of the kind {kind.__name__} is attached to the execution context.")
    return attached
