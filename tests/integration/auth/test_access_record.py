"""What the record of access says about calls to all services, and who may read it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import grpc
import pytest

from chassis import channel, status
from netra import errors, ids
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from services.auth import audit
from standalone import prepare
from tests.fixtures.policies import Administrator
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services


@pytest.fixture
async def admin(services: Services) -> Administrator:
    """Auth alone, and its administrator."""
    await services.auth()
    return await Administrator(services).signed_in()


async def refused(call: Awaitable[Any]) -> errors.NetraError:
    """The error of a call."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return status.from_rpc(caught.value)


async def entries(admin: Administrator, **wanted: Any) -> list[auth_pb2.AuditEntry]:
    """Entries of the administrator's tenant, newest first."""
    return list((await admin.stub.QueryAudit(auth_pb2.QueryAuditRequest(**wanted), metadata=admin.bearer)).entries)


async def exported(admin: Administrator, from_position: int = 0) -> list[auth_pb2.AuditEntry]:
    """The record of all tenants."""
    stream = admin.stub.ExportAudit(auth_pb2.ExportAuditRequest(from_position=from_position), metadata=admin.bearer)
    return [entry async for part in stream for entry in part.entries]


async def denials(admin: Administrator, count: int) -> list[auth_pb2.AuditEntry]:
    """The refusals on record, once there are so many: they are told in the background."""
    async with asyncio.timeout(15):
        while True:
            found = [entry for entry in await exported(admin) if entry.action == "deny"]
            if len(found) >= count:
                return found
            await asyncio.sleep(0.05)


async def test_refusals_of_every_service_are_on_record_with_who_and_what(services: Services) -> None:
    await services.auth()
    await services.context()
    await services.events()
    admin, reader = await Administrator(services).signed_in(), await services.user("readonly", "free")
    threads: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(services.channel("context"))
    record: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(services.channel("events"))
    correlation = (("x-correlation-id", "c" * 32),)
    foreign = await services.service_token("events")
    forged = channel.bearer(reader.token[:-4] + "AAAA")
    listing = auth_pb2.ListUsersRequest()
    assert (await refused(admin.stub.ListUsers(listing, metadata=(*reader.bearer, *correlation)))).code == "PERMISSION_DENIED"
    for _ in range(5):
        opened = threads.OpenContext(context_pb2.OpenContextRequest(), metadata=foreign, wait_for_ready=True)
        assert (await refused(opened)).code == "PERMISSION_DENIED"
    listed = record.ListEvents(events_pb2.ListEventsRequest(), metadata=forged, wait_for_ready=True)
    assert (await refused(listed)).code == "UNAUTHENTICATED"
    # who brings nothing was refused nothing
    assert (await refused(record.ListEvents(events_pb2.ListEventsRequest()))).code == "UNAUTHENTICATED"
    found = {entry.detail.partition(";")[0]: entry for entry in await denials(admin, 3)}
    assert sorted(found) == [
        "auth: netra.auth.v1.AuthService/ListUsers: permission_denied, users:read",
        "context: netra.context.v1.ContextService/OpenContext: permission_denied",
        "events: netra.events.v1.EventsService/ListEvents: unauthenticated",
    ]
    by_user, by_service, by_nobody = (found[name] for name in sorted(found))
    assert (by_user.actor, by_user.user_id, by_user.outcome, by_user.correlation_id) == (
        f"user:{reader.user_id}", reader.user_id, "refused", "c" * 32,
    )  # fmt: skip
    assert by_service.actor == "service:events"
    assert (by_nobody.actor, by_nobody.user_id, by_nobody.tenant_id) == ("anonymous", "", "")
    counts = sum(int(entry.detail.split("; ")[1].split()[0]) if "; " in entry.detail else 1
                 for entry in await denials(admin, 3) if entry.actor == "service:events")  # fmt: skip
    assert counts == 5
    assert (await admin.stub.VerifyAudit(auth_pb2.VerifyAuditRequest(), metadata=admin.bearer)).broken_at == 0


async def test_reads_narrow_page_and_are_on_record_themselves(admin: Administrator, services: Services) -> None:
    user = await services.user()
    await admin.change(lambda policy: None, "nothing")
    about = await entries(admin, user_id=user.user_id)
    assert [(entry.action, entry.outcome) for entry in about] == [("login", "ok"), ("create_user", "ok")]
    assert [entry.detail for entry in await entries(admin, action="update_policy")] == ["version 2: nothing"]
    assert await entries(admin, outcome="refused") == []
    assert await entries(admin, until=about[-1].at, user_id=user.user_id) == []
    since = await entries(admin, since=about[0].at)
    assert user.user_id in {entry.user_id for entry in since}
    page = await admin.stub.QueryAudit(auth_pb2.QueryAuditRequest(page_size=2), metadata=admin.bearer)
    assert [entry.action for entry in page.entries] == ["query_audit"] * 2
    following = auth_pb2.QueryAuditRequest(page_size=2, page_token=page.next_page_token)
    more = await admin.stub.QueryAudit(following, metadata=admin.bearer)
    positions = [entry.position for entry in (*page.entries, *more.entries)]
    assert positions == list(range(positions[0], positions[0] - 4, -1))


@pytest.mark.parametrize(
    ("wanted", "field"),
    [({"user_id": "me"}, "user_id"), ({"page_token": "x"}, "page_token"), ({"page_size": 201}, "page_size")],
)
async def test_a_question_that_makes_no_sense_is_refused(admin: Administrator, wanted: dict[str, Any], field: str) -> None:
    error = await refused(admin.stub.QueryAudit(auth_pb2.QueryAuditRequest(**wanted), metadata=admin.bearer))
    assert error.code == "INVALID_PAYLOAD"
    assert field in str(error.details.get("field", error.message))


async def test_no_tenant_reads_about_another(admin: Administrator, services: Services) -> None:
    elsewhere = ids.TenantId.new()
    token = await services.service_token("context")
    told = auth_pb2.AuditEntry(tenant_id=elsewhere, action="deny", outcome="refused", detail="of another tenant")
    await admin.stub.AppendAudit(auth_pb2.AppendAuditRequest(entries=[told]), metadata=token)
    assert "context: of another tenant" not in {entry.detail for entry in await entries(admin)}
    # those who run the installation see it in the export
    assert "context: of another tenant" in {entry.detail for entry in await exported(admin)}


async def test_who_may_read_export_and_append(admin: Administrator, services: Services) -> None:
    business, plain = await services.user("admin", "business"), await services.user()
    stub, append = admin.stub, auth_pb2.AppendAuditRequest(entries=[auth_pb2.AuditEntry(action="deny", outcome="refused")])
    await stub.QueryAudit(auth_pb2.QueryAuditRequest(), metadata=business.bearer)
    for call in (
        stub.QueryAudit(auth_pb2.QueryAuditRequest(), metadata=plain.bearer),
        stub.VerifyAudit(auth_pb2.VerifyAuditRequest(), metadata=business.bearer),
        stub.AppendAudit(append, metadata=admin.bearer),
    ):
        assert (await refused(call)).code == "PERMISSION_DENIED"
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in stub.ExportAudit(auth_pb2.ExportAuditRequest(), metadata=business.bearer):
            pass
    assert status.from_rpc(caught.value).details == {"permission": "audit:export", "tiers": "internal"}


async def test_an_export_can_be_verified_by_anybody_and_is_on_record(admin: Administrator) -> None:
    for _ in range(30):
        await admin.change(lambda policy: None)
    found = await exported(admin)
    assert [entry.position for entry in found] == list(range(1, len(found) + 1))
    before = audit.GENESIS
    for entry in found:
        told = audit.Told(
            entry.tenant_id, entry.user_id, entry.actor, entry.action, entry.outcome, entry.detail, entry.correlation_id
        )  # fmt: skip
        at = audit._EPOCH + audit._MICROSECOND * (entry.at.ToNanoseconds() // 1000)
        assert entry.hash == (before := audit.entry_hash(before, audit.Entry(entry.position, at, told, entry.hash)))
    assert (found[-1].action, found[-1].detail) == ("export_audit", "from position 1")
    assert (await exported(admin, len(found) - 1))[0].position == len(found) - 1


async def test_tampering_is_found_over_the_rpc(admin: Administrator, stores: Standalone, database: str) -> None:
    for _ in range(5):
        await admin.change(lambda policy: None)
    verdict = await admin.stub.VerifyAudit(auth_pb2.VerifyAuditRequest(), metadata=admin.bearer)
    assert (verdict.broken_at, len(verdict.head)) == (0, 32)
    position = (await entries(admin, action="update_policy"))[2].position
    owner = await asyncpg.connect(_owner(stores, database))
    await owner.execute("UPDATE auth.audit SET detail = 'it was somebody else' WHERE position = $1", position)
    await owner.close()
    verdict = await admin.stub.VerifyAudit(auth_pb2.VerifyAuditRequest(), metadata=admin.bearer)
    assert (verdict.verified, verdict.broken_at) == (position - 1, position)


async def test_a_service_that_acts_for_a_user_is_named_with_them(admin: Administrator, services: Services) -> None:
    user = await services.user()
    secret = (services.secrets / "dispatcher" / "service").read_text().strip()
    actor = auth_pb2.ClientCredentialsGrant(client_id="dispatcher", client_secret=secret)
    exchange = auth_pb2.ExchangeGrant(subject_token=user.token, actor=actor, scope=["session:read"])
    narrowed = (await admin.stub.IssueToken(auth_pb2.IssueTokenRequest(exchange=exchange))).tokens.access_token
    stub: auth_pb2_grpc.AuthServiceAsyncStub = admin.stub
    await stub.ListSessions(auth_pb2.ListSessionsRequest(), metadata=channel.bearer(narrowed))
    denied = stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=channel.bearer(narrowed))
    assert (await refused(denied)).details == {"permission": "session:write"}
    assert (await denials(admin, 1))[0].actor == f"service:dispatcher for user:{user.user_id}"


async def recorded(admin: Administrator, action: str, count: int) -> list[auth_pb2.AuditEntry]:
    """Entries of one action, once they stand for so many events: they are told in the background."""
    async with asyncio.timeout(15):
        while True:
            found = [entry for entry in await exported(admin) if entry.action == action]
            if sum(map(_times, found)) >= count:
                return found
            await asyncio.sleep(0.05)


def _times(entry: auth_pb2.AuditEntry) -> int:
    last = entry.detail.rpartition("; ")[2]
    return int(last.removesuffix(" times")) if last.endswith(" times") else 1


def _owner(stores: Standalone, database: str) -> str:
    password = (stores.secrets / "postgres" / "owner").read_text().strip()
    return prepare.dsn(stores.postgres_admin_url, "netra_owner", password, database)


class TestTokensAreOnRecord:
    """Each token that auth gives away, and each credential that it does not take, straight at its port."""

    async def test_those_that_are_issued(self, admin: Administrator, services: Services) -> None:
        user = await services.user()
        for _ in range(3):
            await services.service_token("events")
        made = await admin.stub.CreateApiKey(
            auth_pb2.CreateApiKeyRequest(name="program", scopes=["runs:read"]), metadata=user.bearer
        )  # fmt: skip
        grant = auth_pb2.ApiKeyGrant(api_key=made.api_key)
        await admin.stub.IssueToken(auth_pb2.IssueTokenRequest(api_key=grant))
        await admin.stub.RefreshToken(auth_pb2.RefreshTokenRequest(refresh_token=user.refresh_token))
        found = await recorded(admin, "issue_token", 5)
        assert {entry.outcome for entry in found} == {"ok"}
        of_service = [entry for entry in found if entry.actor == "service:events"]
        assert sum(map(_times, of_service)) == 3
        assert of_service[0].detail.startswith("auth: client credentials; from 127.0.0.1")
        of_user = [entry for entry in found if entry.user_id == user.user_id]
        assert {entry.actor for entry in of_user} == {f"user:{user.user_id}"}
        assert {entry.tenant_id for entry in of_user} == {entry.tenant_id for entry in await entries(admin, page_size=1)}
        session = (await admin.stub.GetPermissions(auth_pb2.GetPermissionsRequest(), metadata=user.bearer)).principal.session_id
        hows = sorted(entry.detail.partition("; ")[2] for entry in of_user)
        assert hows == ["api key; from 127.0.0.1", "refresh; from 127.0.0.1"]
        assert f"auth: session {session}; refresh; from 127.0.0.1" in {entry.detail for entry in of_user}

    async def test_a_refresh_does_not_wait_for_the_record(
        self, admin: Administrator, services: Services, stores: Standalone, database: str
    ) -> None:
        user = await services.user()
        owner = await asyncpg.connect(_owner(stores, database))
        try:
            async with owner.transaction(), asyncio.timeout(5):
                await owner.execute("SELECT position FROM auth.audit_head FOR UPDATE")
                await admin.stub.RefreshToken(auth_pb2.RefreshTokenRequest(refresh_token=user.refresh_token))
        finally:
            await owner.close()
        assert await recorded(admin, "issue_token", 1)

    async def test_credentials_that_are_refused(self, admin: Administrator) -> None:
        client = auth_pb2.ClientCredentialsGrant(client_id="events", client_secret="wrong")
        code = auth_pb2.LoginCodeGrant(code="nlc_" + "x" * 43)
        calls: list[Callable[[], Awaitable[Any]]] = [
            lambda: admin.stub.IssueToken(auth_pb2.IssueTokenRequest(client_credentials=client)),
            lambda: admin.stub.IssueToken(auth_pb2.IssueTokenRequest(login_code=code)),
            lambda: admin.stub.RefreshToken(auth_pb2.RefreshTokenRequest(refresh_token="nrt_" + "x" * 43)),
            lambda: admin.stub.ResetPassword(auth_pb2.ResetPasswordRequest(reset_token="nrs_" + "x" * 43, new_password="p" * 20)),
        ]
        for call in calls:
            for _ in range(5):
                assert (await refused(call())).code == "UNAUTHENTICATED"
        found = await recorded(admin, "deny", 20)
        # many of the same within a second are one entry: a flood of guesses is no flood of entries
        assert len(found) < 20
        counts: Counter[str] = Counter()
        for entry in found:
            counts[entry.detail.partition("; ")[0].removeprefix("auth: netra.auth.v1.AuthService/")] += _times(entry)
        assert counts == {
            "IssueToken client_credentials: unauthenticated": 5, "IssueToken login_code: unauthenticated": 5,
            "RefreshToken: unauthenticated": 5, "ResetPassword: unauthenticated": 5,
        }  # fmt: skip

    async def test_reads_of_the_policy(self, admin: Administrator) -> None:
        await admin.policy()
        await admin.policy(1)
        await admin.stub.ListPolicyVersions(auth_pb2.ListPolicyVersionsRequest(), metadata=admin.bearer)
        reads = [
            (entry.action, entry.detail)
            for entry in reversed(await entries(admin))
            if entry.action in ("get_policy", "list_policy_versions")
        ]
        assert reads == [("get_policy", "version 1"), ("get_policy", "version 1"), ("list_policy_versions", "1 versions")]


@pytest.mark.parametrize("scope", ["\0", "runs:read\n", "everything", "\x1b[2J", "x" * 3_000])
async def test_what_is_no_permission_is_not_named_and_takes_no_denial_along(admin: Administrator, services: Services, scope: str) -> None:
    user = await services.user("readonly")
    secret = (services.secrets / "dispatcher" / "service").read_text().strip()
    actor = auth_pb2.ClientCredentialsGrant(client_id="dispatcher", client_secret=secret)
    exchange = auth_pb2.ExchangeGrant(subject_token=user.token, actor=actor, scope=[scope])
    assert (await refused(admin.stub.ListUsers(auth_pb2.ListUsersRequest(), metadata=user.bearer))).code == "PERMISSION_DENIED"
    assert (await refused(admin.stub.IssueToken(auth_pb2.IssueTokenRequest(exchange=exchange)))).code == "INVALID_PAYLOAD"
    lacking = auth_pb2.ExchangeGrant(subject_token=user.token, actor=actor, scope=["runs:write"])
    error = await refused(admin.stub.IssueToken(auth_pb2.IssueTokenRequest(exchange=lacking)))
    assert (error.code, error.details["permission"]) == ("PERMISSION_DENIED", "runs:write")
    assert {entry.detail for entry in await denials(admin, 2)} == {
        "auth: netra.auth.v1.AuthService/ListUsers: permission_denied, users:read",
        "auth: netra.auth.v1.AuthService/IssueToken exchange: permission_denied, runs:write",
    }


@pytest.mark.parametrize("field", ["action", "outcome"])
@pytest.mark.parametrize("text", ["\0", "Login", "a\nb", "x" * 65])
async def test_what_no_entry_can_have_is_not_looked_for(admin: Administrator, field: str, text: str) -> None:
    wanted: dict[str, Any] = {field: text}
    error = await refused(admin.stub.QueryAudit(auth_pb2.QueryAuditRequest(**wanted), metadata=admin.bearer))
    assert (error.code, error.details["field"]) == ("INVALID_PAYLOAD", field)
