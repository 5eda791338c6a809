"""The part of AuthService about the policy and the record of access: proto in, domain call, proto out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from chassis import audit as audit_
from chassis import identity, postgres
from netra import errors
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from services.auth import audit, feed, pages, policy

_MAX_POSITION = 2**62


class PolicyServicer(auth_pb2_grpc.AuthServiceServicer):
    """Policy and audit."""

    _policies: policy.Policies
    _record: audit.Record
    _feed: feed.Feed

    async def GetPolicy(self, request: auth_pb2.GetPolicyRequest, context: Any) -> auth_pb2.GetPolicyResponse:
        found = await self._policies.get(_not_negative(request.version, "version"))
        await self._record.read(_reader(identity.current()), "get_policy", f"version {found.version}")
        return auth_pb2.GetPolicyResponse(policy=found)

    async def UpdatePolicy(self, request: auth_pb2.UpdatePolicyRequest, context: Any) -> auth_pb2.UpdatePolicyResponse:
        caller = identity.current()
        version = await self._policies.update(
            request.policy, request.expected_version, request.comment, caller.user, audit_.actor(caller)
        )  # fmt: skip
        await self._feed.refresh()
        return auth_pb2.UpdatePolicyResponse(version=version)

    async def RevertPolicy(self, request: auth_pb2.RevertPolicyRequest, context: Any) -> auth_pb2.RevertPolicyResponse:
        caller = identity.current()
        version = _not_negative(request.version, "version")
        now = await self._policies.revert(version, request.comment, caller.user, audit_.actor(caller))
        await self._feed.refresh()
        return auth_pb2.RevertPolicyResponse(version=now)

    async def ListPolicyVersions(
        self, request: auth_pb2.ListPolicyVersionsRequest, context: Any
    ) -> auth_pb2.ListPolicyVersionsResponse:  # fmt: skip
        size = pages.size(request.page_size)
        found = await self._policies.versions(_number(request.page_token), size + 1)
        await self._record.read(_reader(identity.current()), "list_policy_versions", f"{len(found[:size])} versions")
        token = pages.token(str(found[size - 1].version)) if len(found) > size else ""
        return auth_pb2.ListPolicyVersionsResponse(versions=[_version(each) for each in found[:size]], next_page_token=token)

    async def AppendAudit(self, request: auth_pb2.AppendAuditRequest, context: Any) -> auth_pb2.AppendAuditResponse:
        await self._record.append(identity.current().service, [_told(entry) for entry in request.entries])
        return auth_pb2.AppendAuditResponse()

    async def QueryAudit(self, request: auth_pb2.QueryAuditRequest, context: Any) -> auth_pb2.QueryAuditResponse:
        caller, size = identity.current(), pages.size(request.page_size)
        wanted = audit.Filter(
            caller.user.tenant_id, request.user_id, request.action, request.outcome,
            _time(request, "since"), _time(request, "until"),
        )  # fmt: skip
        found = await self._record.find(wanted, _number(request.page_token), size + 1, _reader(caller))
        token = pages.token(str(found[size - 1].position)) if len(found) > size else ""
        return auth_pb2.QueryAuditResponse(entries=[_entry(each) for each in found[:size]], next_page_token=token)

    async def ExportAudit(self, request: auth_pb2.ExportAuditRequest, context: Any) -> AsyncIterator[auth_pb2.ExportAuditResponse]:
        async for found in self._record.export(request.from_position, _reader(identity.current())):
            yield auth_pb2.ExportAuditResponse(entries=[_entry(each) for each in found])

    async def VerifyAudit(self, request: auth_pb2.VerifyAuditRequest, context: Any) -> auth_pb2.VerifyAuditResponse:
        after = audit.Link(request.after_position, request.after_hash) if request.after_position or request.after_hash else audit.START
        verdict = await self._record.verify(_reader(identity.current()), after)
        return auth_pb2.VerifyAuditResponse(
            verified=verdict.verified, broken_at=verdict.broken_at, head=verdict.last.hash, position=verdict.last.position,
            complete=verdict.complete,
        )  # fmt: skip


def told_to(record: audit.Record) -> audit_.Send:
    """Where auth itself tells what it refused."""

    async def send(entries: Sequence[auth_pb2.AuditEntry]) -> None:
        try:
            await record.append("auth", [_told(entry) for entry in entries])
        except (postgres.Conflict, postgres.Unfit) as error:
            raise errors.Internal("The record of access cannot be added to.") from error

    return send


def _reader(caller: identity.Caller) -> audit.Reader:
    return audit.Reader(caller.user.user_id, audit_.actor(caller))


def _not_negative(value: int, field: str) -> int:
    if value < 0:
        raise errors.InvalidPayload(f"{field} must not be negative", field=field)
    return value


def _number(page_token: str) -> int:
    """Where the page begins; 0 for the first."""
    last = pages.after(page_token)
    if last and not (last.isascii() and last.isdigit() and len(last) < 20 and 0 < int(last) < _MAX_POSITION):
        raise pages.wrong()
    return int(last or 0)


def _time(request: auth_pb2.QueryAuditRequest, field: str) -> datetime | None:
    if not request.HasField(field):  # type: ignore[arg-type]
        return None
    try:
        found: datetime = getattr(request, field).ToDatetime(UTC)
    except (ValueError, OverflowError):
        raise errors.InvalidPayload(f"{field} must be a time", field=field) from None
    return found


def _version(found: policy.Version) -> auth_pb2.PolicyVersion:
    return auth_pb2.PolicyVersion(version=found.version, actor=found.actor, created_at=_stamp(found.created_at), comment=found.comment)


def _told(entry: auth_pb2.AuditEntry) -> audit.Told:
    return audit.Told(
        entry.tenant_id, entry.user_id, entry.actor, entry.action, entry.outcome, entry.detail, entry.correlation_id
    )  # fmt: skip


def _entry(found: audit.Entry) -> auth_pb2.AuditEntry:
    told = found.told
    return auth_pb2.AuditEntry(
        position=found.position, at=_stamp(found.at), tenant_id=told.tenant_id, user_id=told.user_id, actor=told.actor,
        action=told.action, outcome=told.outcome, detail=told.detail, correlation_id=told.correlation_id, hash=found.hash,
    )  # fmt: skip


def _stamp(at: datetime) -> Timestamp:
    stamp = Timestamp()
    stamp.FromDatetime(at)
    return stamp
