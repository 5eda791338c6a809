"""The factories of execution contexts, fed by tokens, requests and services that are real."""

from __future__ import annotations

import asyncio

import pytest

from chassis import identity
from netra import errors, ids
from netra.context import Isolation, UserExecutionContext, managed
from netra.context.v1 import context_pb2, context_pb2_grpc
from tests.fixtures.accounts import refused
from tests.fixtures.contexts import Contexts
from tests.fixtures.storage import Services
from tests.fixtures.user_execution_context_fixtures import TIERS, Somebody, arrived
from tests.fixtures.witness import SEEN
from tests.integration.conftest import Runs

pytestmark = [pytest.mark.user_context, pytest.mark.real_services]


class TestUserContextFactoryIntegration:
    """Each makes what its caller may have, and nothing of anybody else's."""

    @pytest.mark.multi_user
    def test_user_context_factory_creates_isolated_contexts(self, clean_context_registry: Isolation) -> None:
        everybody = [Somebody(tier=tier) for tier in TIERS]
        found = [arrived(who, "/v1/runs", {"x-user-id": everybody[0].user_id}) for who in everybody]
        for who, contexts in zip(everybody, found, strict=True):
            for context in contexts.values():
                assert (context.user_id, context.tenant_id, context.tier) == (who.user_id, who.tenant_id, who.tier)
                clean_context_registry.watch(context)
        assert clean_context_registry.verify_all() == 10
        with pytest.raises(TypeError, match="factories"):
            UserExecutionContext()
        for own in ("user_id", "tenant_id", "session_id", "roles", "tier", "scope"):
            with pytest.raises(errors.InvalidContext) as taken:
                UserExecutionContext.from_asgi({"type": "http"}, everybody[0], **{own: getattr(everybody[1], own)})
            assert taken.value.details["field"] == own

    @pytest.mark.multi_user
    async def test_concurrent_user_context_creation_no_leakage(self, contexts: Contexts) -> None:
        users = [await contexts.services.user() for _ in range(3)]
        owners = [user for user in users for _ in range(5)]
        answers = await asyncio.gather(
            *(contexts.open(user, agent_context=f'{{"canary":"{user.user_id}","at":{at}}}'.encode()) for at, user in enumerate(owners))
        )
        for at, (user, answer) in enumerate(zip(owners, answers, strict=True)):
            found = UserExecutionContext.from_proto((await contexts.get(user, answer.context.context_id)).context)
            assert (found.user_id, found.agent_context) == (user.user_id, {"canary": user.user_id, "at": at})
            stranger = users[(users.index(user) + 1) % 3]
            assert (await refused(contexts.get(stranger, found.context_id))).code == "NOT_FOUND"
        assert len({answer.context.context_id for answer in answers}) == len({answer.context.thread_id for answer in answers}) == 15

    async def test_session_scoped_context_lifecycle(self, contexts: Contexts) -> None:
        opened = await contexts.open(user := await contexts.services.user())
        context = UserExecutionContext.from_proto(opened.context)
        again = await contexts.open(await contexts.login(user))
        assert again.context.session_id != context.session_id
        async with managed(context) as scope:
            scope.on_close(lambda: contexts.close(opened.context_token))
            await contexts.renew(opened.context_token)
        assert (await refused(contexts.renew(opened.context_token))).code == "FAILED_PRECONDITION"
        assert (await contexts.get(user, context.context_id)).HasField("closed_at")
        # the other session's goes on
        await contexts.renew(again.context_token)

    async def test_factory_adapter_integration_with_real_services(self, contexts: Contexts) -> None:
        opened = await contexts.open(user := await contexts.services.user(), agent_context=b'{"goal":"spend"}')
        verifier, metadata = identity.Verifier(contexts.services.trusts[-1]), contexts.within(opened.context_token)
        complete = UserExecutionContext.from_proto(opened.context)
        for context in (
            await UserExecutionContext.from_token(opened.context_token, verifier, "dispatcher"),
            await UserExecutionContext.from_grpc(metadata, verifier),
        ):
            # equal by the digests of what a token does not carry
            assert context == complete
            assert context.to_dict()["agent_context"] is None
        principal = await verifier.principal(user.token)
        local = UserExecutionContext.from_asgi({"type": "http", "method": "POST"}, principal, thread_id=complete.thread_id)
        assert (local.user_id, local.session_id, local.roles) == (complete.user_id, complete.session_id, complete.roles)
        bearer, carried = metadata
        service = await contexts.services.service_token("events")
        wrong: list[list[tuple[str, str]]] = [
            [bearer], [carried], [bearer, carried, carried], [bearer, bearer, carried], [*service, carried], [*user.bearer, carried],
            [bearer, (carried[0], f"{carried[1]},{carried[1]}")], [bearer, (carried[0], user.token)], [(bearer[0], bearer[1][7:]), carried],
        ]  # fmt: skip
        for pairs in wrong:
            with pytest.raises(errors.Unauthenticated):
                await UserExecutionContext.from_grpc(pairs, verifier)

    async def test_execution_factory_user_context_integration(self, witnessed: Services) -> None:
        runs, user = Runs(witnessed), await witnessed.user()
        run = await runs.start(user, "witness")
        await runs.ended(user, run.run_id)
        executed = SEEN[run.run_id][0]
        stub: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(witnessed.channel("context"))
        request = context_pb2.GetContextRequest(context_id=executed.context_id)
        kept = UserExecutionContext.from_proto((await stub.GetContext(request, metadata=user.bearer)).context)
        assert kept == executed
        assert (kept.run_id, kept.user_id) == (run.run_id, user.user_id)
        assert type(executed.run_id) is ids.RunId
