"""What runs wait for outside of themselves, asked for with patience: messages to them and approvals."""

from __future__ import annotations

from typing import Protocol

from netra import errors, ids
from netra.context import UserExecutionContext
from services.dispatcher import approvals, runs
from services.dispatcher.patience import patient


class Kept(Protocol):
    """Where messages and approvals are kept."""

    async def mail(self, run_id: ids.RunId, after: int) -> list[runs.Mail]:
        """The first messages to a run with higher numbers, oldest first."""
        ...

    async def ask(self, wanted: approvals.Wanted, context: UserExecutionContext) -> approvals.Approval:
        """Store an approval, once, and return it as it is now."""
        ...

    async def approval(self, run_id: ids.RunId, approval_id: str) -> approvals.Approval:
        """An approval of a run with its votes; it has expired once its time has passed. Raises `NotFound`."""
        ...


class Waits:
    """What came for runs. While the database is away it is asked again: a run that waits anyhow can wait for that as well."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    async def mail(self, run_id: ids.RunId, after: int) -> list[runs.Mail]:
        """The first messages to the run whose number is higher, oldest first."""
        return await patient(lambda: self._kept.mail(run_id, after))

    async def ask(self, wanted: approvals.Wanted, context: UserExecutionContext) -> approvals.Approval:
        """Ask people for an approval, once: what it has come to by now. Raises `InvalidPayload` for one that nobody can give."""
        if not 1 <= wanted.quorum <= approvals.MAX_QUORUM:
            raise errors.InvalidPayload(f"quorum must be from 1 to {approvals.MAX_QUORUM}", field="quorum")
        return await patient(lambda: self._kept.ask(wanted, context))

    async def approval(self, run_id: ids.RunId, approval_id: str) -> approvals.Approval:
        """What an approval of the run has come to by now. Raises `NotFound`."""
        return await patient(lambda: self._kept.approval(run_id, approval_id))
