"""What an execution context takes from whoever it is opened for, and what it lets be done in their name."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from chassis import channel
from netra import ids
from netra.auth.v1 import auth_pb2
from netra.context import UserExecutionContext
from netra.context.v1 import context_pb2
from standalone import prepare
from tests.fixtures import forge, oidc
from tests.fixtures.accounts import Accounts, refused
from tests.fixtures.contexts import Contexts, serving
from tests.fixtures.policies import Administrator, without
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.users import User

pytestmark = [pytest.mark.user_context, pytest.mark.auth_validation, pytest.mark.real_services]


def _identity(answer: context_pb2.ExecutionContext) -> tuple[str, str, str, list[str], str]:
    return answer.user_id, answer.tenant_id, answer.session_id, list(answer.roles), answer.tier


def _claimed(token: str) -> tuple[str, str, str, list[str], str]:
    claims = forge.claims_of(token)
    return claims["sub"], claims["tid"], claims["sid"], claims["roles"], claims["tier"]


class TestUserExecutionContextAuthentication:
    """Whose it is."""

    async def test_context_creation_with_authenticated_user(self, contexts: Contexts) -> None:
        """It is that of the token's user, whatever else is said; without a good token there is none."""
        user, other = await contexts.services.user(tier="early"), await contexts.services.user(role="admin")
        opened = (await contexts.open(user, agent_context=b'{"note":"for user %s"}' % other.user_id.encode())).context
        assert _identity(opened) == _claimed(user.token)
        frame = UserExecutionContext.from_proto(opened)
        assert (frame.user_id, frame.roles, frame.tier, frame.depth) == (user.user_id, ("user",), "early", 0)
        header, claims, signature = user.token.split(".")
        forged = f"{header}.{other.token.split('.')[1]}.{signature}"
        # the dispatcher's own token is nobody's, and metadata says nothing about whom a context is for
        service = contexts.dispatcher[0][1].removeprefix("Bearer ")
        for token in ("", "junk", f"{header}.{claims}.", forged, service):
            request = context_pb2.OpenContextRequest(request_id=ids.uuid7(), run_id=ids.uuid7(), access_token=token)
            metadata = (*contexts.dispatcher, ("x-user-id", user.user_id))
            assert (await refused(contexts.stub.OpenContext(request, metadata=metadata))).code == "UNAUTHENTICATED"
        # an identity in what the agent is told, where somebody might look for it, is refused
        error = await refused(contexts.open(user, agent_context=b'{"user_id":"%s"}' % other.user_id.encode()))
        assert error.code == "INVALID_PAYLOAD"
        assert len((await contexts.page(user)).contexts) == 1

    async def test_context_oauth_authentication_integration(
        self, services: Services, tmp_path: Path, stores: Standalone, database: str
    ) -> None:
        """Who signed in with an outside provider has contexts like everybody else, of that session."""
        with oidc.provider() as outside:
            entry = outside.entry(create_users=True, tier="early")
            await services.auth(oidc_providers=oidc.write(tmp_path / "oidc.json", outside=entry))
            await services.context()
            await serving(services)
            accounts = Accounts(services, prepare.on_database(stores.postgres_admin_url, database))
            contexts = Contexts(services, accounts, await services.service_token("dispatcher"))
            users = [await self._signed_in(contexts, name) for name in ("ada", "bea", "ada")]
        opened = [(await contexts.open(user)).context for user in users]
        assert [_identity(context) for context in opened] == [_claimed(user.token) for user in users]
        assert {context.tier for context in opened} == {"early"}
        ada, bea, again = opened
        # the same person, in another session; and another person
        assert (ada.user_id == again.user_id, ada.session_id == again.session_id, ada.user_id == bea.user_id) == (True, False, False)
        assert {each.context.context_id for each in (await contexts.page(users[0])).contexts} == {ada.context_id, again.context_id}
        assert (await refused(contexts.get(users[1], ada.context_id))).code == "NOT_FOUND"
        await accounts.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=users[0].bearer)
        await contexts.until_withdrawn(users[0])
        assert (await refused(contexts.open(users[0]))).code == "UNAUTHENTICATED"
        assert (await contexts.open(users[2])).context.user_id == ada.user_id

    async def _signed_in(self, contexts: Contexts, name: str) -> User:
        stub, gateway = contexts.accounts.stub, await contexts.services.service_token("gateway")
        began = await stub.StartOidc(auth_pb2.StartOidcRequest(provider="outside", callback_uri=oidc.CALLBACK), metadata=gateway)
        back = await oidc.sign_in(began.authorization_url, name)
        request = auth_pb2.FinishOidcRequest(
            state=back["state"], code=back["code"], issuer=back["iss"], binding=began.binding, device="a browser"
        )  # fmt: skip
        tokens = (await stub.FinishOidc(request, metadata=gateway)).tokens
        return User(forge.claims_of(tokens.access_token)["sub"], f"{name}@netra.example", "", tokens.access_token, tokens.refresh_token)

    async def test_context_permission_enforcement_patterns(self, contexts: Contexts) -> None:
        """Each call by its rule: users look, services open and use, each only what is theirs; denied unless allowed."""
        user = await contexts.services.user()
        opened = await contexts.open(user)
        token = opened.context_token
        # a user does not do what services do, not even with a context of their own
        own = (*user.bearer, ("x-netra-context", token))
        wanted = context_pb2.OpenContextRequest(request_id=ids.uuid7(), run_id=ids.uuid7(), access_token=user.token)
        for call in (
            contexts.stub.OpenContext(wanted, metadata=user.bearer),
            contexts.stub.RenewContext(context_pb2.RenewContextRequest(), metadata=own),
            contexts.stub.CloseContext(context_pb2.CloseContextRequest(), metadata=own),
            contexts.stub.AppendMessage(context_pb2.AppendMessageRequest(request_id="1", role="user", content="a"), metadata=own),
        ):
            assert (await refused(call)).code == "PERMISSION_DENIED"
        # nor does another service, nor the one that may without a context, nor nobody
        getting = context_pb2.GetContextRequest(context_id=opened.context.context_id)
        for metadata, code in (
            (await contexts.services.service_token("gateway"), "PERMISSION_DENIED"), (contexts.dispatcher, "UNAUTHENTICATED"),
            ((), "UNAUTHENTICATED"), (channel.bearer(token), "UNAUTHENTICATED"),
        ):  # fmt: skip
            assert (await refused(contexts.stub.GetContext(getting, metadata=metadata))).code == code
        # a token that is narrowed does no more than it says
        narrow = channel.bearer((await contexts.accounts.program(user, "runs:read")).access_token)
        error = await refused(contexts.stub.GetContext(getting, metadata=narrow))
        assert (error.code, error.details["permission"]) == ("PERMISSION_DENIED", "contexts:read")
        # and the policy decides, from one moment to the next
        assert (await contexts.get(user, opened.context.context_id)).context == opened.context
        administrator = await Administrator(contexts.services).signed_in()
        await administrator.change_everywhere(without("user", "internal", "contexts:read"))
        assert (await refused(contexts.page(user))).code == "PERMISSION_DENIED"
        assert (await contexts.renew(token)).context_token

    async def test_context_session_validation_integration(self, contexts: Contexts) -> None:
        """Nothing new begins in a session that ended; what was accepted goes on, unless it ended for reasons of security."""
        user = await contexts.services.user()
        again = await contexts.login(user)
        before, beside = await contexts.open(user), await contexts.open(again)
        assert before.context.session_id != beside.context.session_id
        await contexts.accounts.stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=user.bearer)
        await contexts.until_withdrawn(user)
        assert (await refused(contexts.open(user))).code == "UNAUTHENTICATED"
        assert (await refused(contexts.get(user, before.context.context_id))).code == "UNAUTHENTICATED"
        assert (await contexts.derive((await contexts.renew(before.context_token)).context_token)).context.session_id == (
            before.context.session_id
        )
        assert (await contexts.open(again)).context.user_id == user.user_id
        change = auth_pb2.ChangePasswordRequest(current_password=user.password, new_password="another good one", cancel_runs=True)
        await contexts.accounts.stub.ChangePassword(change, metadata=again.bearer)
        # the other sessions' contexts end, that one's goes on
        await contexts.until_closed(before.context.context_id)
        assert (await refused(contexts.renew(before.context_token))).code == "FAILED_PRECONDITION"
        assert (await contexts.renew(beside.context_token)).context_token


class TestUserExecutionContextAuthorization:
    """What it allows."""

    async def test_context_role_based_authorization(self, contexts: Contexts) -> None:
        """A context has the roles of its user at the time, and roles decide who sees whose."""
        people = {role: await contexts.services.user(role=role) for role in ("user", "admin", "readonly")}
        opened = {role: await contexts.open(user) for role, user in people.items()}
        assert {role: list(answer.context.roles) for role, answer in opened.items()} == {role: [role] for role in people}
        for role, reader in people.items():
            for other, answer in opened.items():
                call = contexts.get(reader, answer.context.context_id, people[other].user_id)
                if role in ("admin", other):
                    assert (await call).context == answer.context
                else:
                    assert (await refused(call)).code == "PERMISSION_DENIED", (role, other)
        # who deletes data is more than a reader
        request = context_pb2.EraseDataRequest(request_id=ids.uuid7())
        error = await refused(contexts.stub.EraseData(request, metadata=people["readonly"].bearer))
        assert (error.code, error.details["permission"]) == ("PERMISSION_DENIED", "data:erase")
        # other roles make other contexts, and leave those there are as they were
        change = auth_pb2.UpdateUserRequest(user_id=people["user"].user_id, roles=["readonly"])
        await contexts.accounts.stub.UpdateUser(change, metadata=await contexts.accounts.admin())
        later = await contexts.open(await contexts.login(people["user"]))
        assert list(later.context.roles) == ["readonly"]
        assert list((await contexts.derive(opened["user"].context_token)).context.roles) == ["user"]

    async def test_context_subscription_based_authorization(self, contexts: Contexts) -> None:
        """A context has the tier of its user at the time; what a tier may not, its user may not."""
        tiers = ("free", "early", "business", "enterprise", "internal")
        people = {tier: await contexts.services.user(tier=tier) for tier in tiers}
        opened = dict(zip(tiers, await asyncio.gather(*(contexts.open(user) for user in people.values())), strict=True))
        assert {tier: answer.context.tier for tier, answer in opened.items()} == {tier: tier for tier in tiers}
        children = {tier: (await contexts.derive(answer.context_token)).context.tier for tier, answer in opened.items()}
        assert children == {tier: tier for tier in tiers}
        change = auth_pb2.UpdateUserRequest(user_id=people["free"].user_id, roles=["user"], tier="business")
        await contexts.accounts.stub.UpdateUser(change, metadata=await contexts.accounts.admin())
        upgraded = await contexts.login(people["free"])
        assert (await contexts.open(upgraded)).context.tier == "business"
        # the frame of what began before is what it was
        assert (await contexts.get(upgraded, opened["free"].context.context_id)).context.tier == "free"
        administrator = await Administrator(contexts.services).signed_in()
        await administrator.change_everywhere(without("user", "early", "contexts:read"))
        error = await refused(contexts.page(people["early"]))
        assert error.code == "PERMISSION_DENIED"
        assert "early" not in error.details["tiers"].split(",")
        assert "business" in error.details["tiers"].split(",")
        assert (await contexts.page(people["business"])).contexts

    @pytest.mark.multi_user
    async def test_context_resource_access_authorization(self, contexts: Contexts) -> None:
        """Owner: all. Granted: read, or read and write, but not delete. Others: nothing, not even that it exists."""
        owner, writer, reader, stranger = [await contexts.services.user() for _ in range(4)]
        first = await contexts.open(owner)
        thread_id = first.context.thread_id
        await contexts.append(first.context_token, "the owner's")
        await contexts.grant(owner, thread_id, writer, "write")
        await contexts.grant(owner, thread_id, reader, "read")
        run = await contexts.open(writer, thread_id=thread_id)
        said = await contexts.append(run.context_token, "the writer's")
        assert (said.user_id, said.position) == (writer.user_id, 2)
        for user in (owner, writer, reader):
            seen = (await contexts.messages(user, thread_id)).messages
            assert [message.content for message in seen] == ["the owner's", "the writer's"]
        assert (await refused(contexts.open(reader, thread_id=thread_id))).code == "PERMISSION_DENIED"

        async def delete(user: User, thread: str = thread_id) -> str:
            request = context_pb2.DeleteThreadRequest(request_id=ids.uuid7(), thread_id=thread)
            return (await refused(contexts.stub.DeleteThread(request, metadata=user.bearer))).code

        assert [await delete(writer), await delete(reader)] == ["PERMISSION_DENIED", "PERMISSION_DENIED"]
        unknown = ids.uuid7()
        for thread in (thread_id, unknown):
            answers = [await refused(contexts.open(stranger, thread_id=thread)), await refused(contexts.messages(stranger, thread))]
            assert [(error.code, error.message) for error in answers] == [("NOT_FOUND", "There is no such thread.")] * 2
            assert await delete(stranger, thread) == "NOT_FOUND"
        # what was withdrawn is gone at once, also for a run that goes on
        await contexts.withdraw(owner, thread_id, writer)
        assert (await refused(contexts.append(run.context_token, "more"))).code in ("NOT_FOUND", "PERMISSION_DENIED")
        assert (await refused(contexts.messages(writer, thread_id))).code == "NOT_FOUND"
        assert len((await contexts.messages(owner, thread_id)).messages) == 2

    async def test_context_child_authorization_inheritance(self, contexts: Contexts) -> None:
        """A child has the authority of its parent or less; what was narrowed once stays narrow for all generations."""
        user = await contexts.services.user(tier="early")
        token = (await contexts.accounts.program(user, "runs:read", "runs:write", "tools:execute")).access_token
        program = User(user.user_id, user.email, user.password, token, "")
        parent = await contexts.open(program)
        assert list(parent.context.scope) == ["runs:read", "runs:write", "tools:execute"]
        child = await contexts.derive(parent.context_token, scope=["runs:read", "runs:write"])
        grandchild = await contexts.derive(child.context_token)
        assert list(grandchild.context.scope) == list(child.context.scope) == ["runs:read", "runs:write"]
        for name in ("user_id", "tenant_id", "session_id", "thread_id", "run_id", "roles", "tier", "correlation_id"):
            assert getattr(grandchild.context, name) == getattr(parent.context, name)
        for scope in (["tools:execute"], ["runs:read", "tools:execute"], ["users:write"]):
            assert (await refused(contexts.derive(child.context_token, scope=scope))).code == "PERMISSION_DENIED"
        # not by what the agent is told, either; and no other way round
        error = await refused(contexts.derive(child.context_token, agent_context=b'{"scope":["users:write"]}'))
        assert error.code == "INVALID_PAYLOAD"
        for reserved in (b'{"roles":["admin"]}', b'{"tier":"enterprise"}'):
            assert (await refused(contexts.derive(child.context_token, agent_context=reserved))).code == "INVALID_PAYLOAD"
        # one that is not narrowed may narrow its children
        free = await contexts.open(user)
        assert not free.context.scope
        assert list((await contexts.derive(free.context_token, scope=["runs:read"])).context.scope) == ["runs:read"]
        signed = forge.claims_of(grandchild.context_token)["ctx"]
        assert (signed["scope"], signed["depth"], signed["roles"], signed["tier"]) == (["runs:read", "runs:write"], 2, ["user"], "early")
