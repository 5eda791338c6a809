"""Who may call what: every RPC of every service with every kind of credential, allowed exactly where its rule and the policy say.

What is expected is computed here, from the rules in the protos and the policy that auth publishes. What happens is asked with a
message that cannot be read: whoever is let in learns that, everybody else is refused before, and nothing is done either way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor

from netra import ids
from netra.access.v1 import access_pb2
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from netra.events.v1 import events_pb2
from tests.fixtures import users
from tests.fixtures.forge import Forge
from tests.fixtures.stack import System, gateway_url
from tests.prove import hostile

_MODULES = {"auth": auth_pb2, "context": context_pb2, "dispatcher": dispatcher_pb2, "events": events_pb2}
_SERVICES = ("auth", "context", "dispatcher", "events", "gateway", "worker", "intruder")
_ROLES, _TIERS = ("readonly", "user", "admin"), ("free", "early", "business", "enterprise", "internal")
_NARROW = frozenset({"session:read", "runs:read", "users:write"})
_UNREADABLE = b"\xff"


@dataclass(frozen=True, slots=True)
class Rpc:
    """One method of one service."""

    service: str
    method: MethodDescriptor

    @property
    def rule(self) -> access_pb2.Rule:
        """Who may call it."""
        return self.method.GetOptions().Extensions[access_pb2.rule]

    @property
    def path(self) -> str:
        """Its name on the wire."""
        return f"/{self.method.containing_service.full_name}/{self.method.name}"

    @property
    def outside(self) -> bool:
        """Whether it is at the gateway too."""
        return self.rule.edge and not (self.method.client_streaming or self.method.server_streaming)


RPCS = [
    Rpc(name, method)
    for name, module in _MODULES.items()
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


@dataclass(frozen=True, slots=True)
class Credential:
    """What comes with a call: nothing to believe, a user, or a service."""

    name: str
    token: str = ""
    role: str = ""
    tier: str = ""
    scope: frozenset[str] | None = None
    service: str = ""
    context: str = ""

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Of the call."""
        found = [("authorization", f"Bearer {self.token}")] if self.token else []
        return (*found, ("x-netra-context", self.context)) if self.context else tuple(found)


Policy = dict[tuple[str, str], frozenset[str]]


def expected(rule: access_pb2.Rule, credential: Credential, policy: Policy) -> str:
    """`in`, or the code of the refusal."""
    if rule.public:
        return "in"
    if credential.service:
        if credential.service not in rule.services:
            return "PERMISSION_DENIED"
        return "in" if credential.context or not rule.context else "UNAUTHENTICATED"
    if not credential.role:
        return "UNAUTHENTICATED"
    allowed = policy[credential.role, credential.tier]
    if credential.scope is not None:
        allowed &= credential.scope
    return "in" if rule.permission and rule.permission in allowed else "PERMISSION_DENIED"


@dataclass(frozen=True, slots=True)
class World:
    """The running system with everybody who may come."""

    system: System
    forge: Forge
    policy: Policy
    made: Callable[[], Iterator[Credential]]
    channels: dict[str, grpc.Channel]
    edge: httpx.Client

    @property
    def credentials(self) -> tuple[Credential, ...]:
        """Everybody's, made anew: some last for no more than a minute."""
        return tuple(self.made())

    @property
    def auth(self) -> auth_pb2_grpc.AuthServiceStub:
        """The auth service."""
        return auth_pb2_grpc.AuthServiceStub(self.channels["auth"])

    def admin(self) -> str:
        """A token of the first user."""
        return users.sign_in(self.auth, self.system.admin_email, self.system.admin_password()).access_token


@pytest.fixture(scope="module")
def world(system: System) -> Iterator[World]:
    """Real users of each role in each tier; what they cannot have is forged with the platform's own keys."""
    with contextlib.ExitStack() as stack:
        channels = {name: stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{system.ports[name]}")) for name in _MODULES}
        stub = auth_pb2_grpc.AuthServiceStub(channels["auth"])
        admin = users.sign_in(stub, system.admin_email, system.admin_password()).access_token
        forge = Forge.of(system, admin)
        people = {(role, tier): users.make_user(stub, admin, role, tier) for role in _ROLES for tier in _TIERS}
        revoked = users.make_user(stub, admin, "admin", "internal")
        stub.RevokeToken(auth_pb2.RevokeTokenRequest(), metadata=revoked.bearer)
        _until_known(channels, Credential("revoked", revoked.token))
        edge = stack.enter_context(httpx.Client(base_url=gateway_url(system), timeout=20))
        yield World(system, forge, _policy(stub, forge), lambda: _credentials(forge, people, revoked), channels, edge)


def _until_known(channels: dict[str, grpc.Channel], revoked: Credential) -> None:
    """Returns when every service has heard of a revocation."""
    for name, channel in channels.items():
        rpc = next(rpc for rpc in RPCS if rpc.service == name and rpc.rule.permission)
        give_up_at = time.monotonic() + 10
        while _happens(channel, rpc, revoked) == "in" and time.monotonic() < give_up_at:
            pass


def _policy(stub: auth_pb2_grpc.AuthServiceStub, forge: Forge) -> Policy:
    metadata = (("authorization", f"Bearer {forge.token(hostile.SERVICE, sub='gateway')}"),)
    stream = stub.WatchTrust(auth_pb2.WatchTrustRequest(), metadata=metadata)
    grants = next(iter(stream)).policy.grants
    stream.cancel()
    return {(grant.role, grant.tier): frozenset(grant.permissions) for grant in grants}


def _credentials(forge: Forge, people: dict[tuple[str, str], users.User], revoked: users.User) -> Iterator[Credential]:
    now = int(time.time())
    powers = {"roles": ["admin"], "tier": "internal"}
    yield Credential("no token")
    yield Credential("no token, a context", context=forge.token(hostile.CONTEXT))
    yield Credential("nonsense", "nonsense")
    yield Credential("signed by a stranger", forge.token(hostile.ACCESS, None, Ed25519PrivateKey.generate(), **powers))
    yield Credential("a service, signed by a stranger", forge.token(hostile.SERVICE, None, Ed25519PrivateKey.generate()))
    yield Credential("expired", forge.token(hostile.ACCESS, iat=now - 700, nbf=now - 700, exp=now - 100, **powers))
    yield Credential("a service, expired", forge.token(hostile.SERVICE, iat=now - 700, nbf=now - 700, exp=now - 100))
    yield Credential("revoked", revoked.token)
    yield Credential("a context as a token", forge.token(hostile.CONTEXT))
    for (role, tier), user in people.items():
        yield Credential(f"{role}, {tier}", user.token, role, tier)
    narrow = forge.token(hostile.ACCESS, scope=sorted(_NARROW), **powers)
    yield Credential("an admin, narrowed", narrow, "admin", "internal", _NARROW)
    behalf = forge.token(hostile.BEHALF, scope=sorted(_NARROW), exp=now + 60, **powers)
    yield Credential("on behalf of an admin", behalf, "admin", "internal", _NARROW)
    context = forge.token(hostile.CONTEXT)
    for name in _SERVICES:
        yield Credential(f"the service {name}", forge.token(hostile.SERVICE, sub=name), service=name)
        yield Credential(f"the service {name} with a context", forge.token(hostile.SERVICE, sub=name), service=name, context=context)


def _happens(channel: grpc.Channel, rpc: Rpc, credential: Credential) -> str:
    """`in`, or the code of the refusal."""
    kind = ("stream" if rpc.method.client_streaming else "unary") + "_" + ("stream" if rpc.method.server_streaming else "unary")
    request = iter([_UNREADABLE]) if rpc.method.client_streaming else _UNREADABLE
    call: Any = getattr(channel, kind)(rpc.path)
    try:
        answer = call(request, metadata=credential.metadata, timeout=20)
        if rpc.method.client_streaming and rpc.method.server_streaming:
            # such a stream may say that it lives before it has read what it is asked
            for _ in answer:
                pass
        elif rpc.method.server_streaming:
            next(answer, None)
    except grpc.RpcError as error:
        refusal: Any = error
        return "in" if refusal.code() == grpc.StatusCode.INVALID_ARGUMENT else str(refusal.code().name)
    return "answered"


@pytest.mark.parametrize("rpc", RPCS, ids=lambda rpc: rpc.path)
def test_an_rpc_lets_in_whom_its_rule_names(world: World, rpc: Rpc) -> None:
    channel = world.channels[rpc.service]
    seen = {credential.name: _happens(channel, rpc, credential) for credential in world.credentials}
    assert seen == {credential.name: expected(rpc.rule, credential, world.policy) for credential in world.credentials}


_AT_THE_EDGE = {"in": "400", "UNAUTHENTICATED": "401", "PERMISSION_DENIED": "403"}


@pytest.mark.parametrize("rpc", RPCS, ids=lambda rpc: rpc.path)
def test_at_the_edge_the_same_rule_holds_for_users_and_services_are_nobody(world: World, rpc: Rpc) -> None:
    wanted, seen = {}, {}
    for credential in world.credentials:
        # tokens of services, and on behalf of users, are for inside
        known = not (credential.service or credential.name.startswith("on behalf"))
        meant = expected(rpc.rule, credential if known else Credential(credential.name), world.policy)
        wanted[credential.name] = _AT_THE_EDGE[meant] if rpc.outside else "404"
        answer = world.edge.post(f"/rpc{rpc.path}", json={"no such field": 1}, headers=dict(credential.metadata))
        seen[credential.name] = str(answer.status_code)
    assert seen == wanted


def test_the_matrix_is_no_formality(world: World) -> None:
    """Each kind of outcome is there, for users and for services, and roles and tiers differ."""
    outcomes = {expected(rpc.rule, credential, world.policy) for rpc in RPCS for credential in world.credentials}
    assert outcomes == {"in", "UNAUTHENTICATED", "PERMISSION_DENIED"}
    assert len({world.policy[role, "internal"] for role in _ROLES}) == len(_ROLES)
    assert len(RPCS) > 50
    assert set(world.policy) == {(role, tier) for role in _ROLES for tier in _TIERS}


# what is somebody else's

_IDS = ("run_id", "thread_id", "user_id", "session_id", "key_id", "context_id")
_LAST = ("CancelRun", "DeleteThread", "RestoreThread", "EraseThread", "EraseRuns", "RevokeApiKey", "EndSessions")
# one's own need one permission, those of others another one
_OF_OTHERS = ("EraseEvents", "ExportEvents", "GetContext", "ListContextAudit", "ListContexts")
# they take more than an id: tests/prove/isolation asks them
_PROVEN = ("GrantThread", "ListThreadEvents", "WithdrawGrant")
_NAMING = [
    rpc for rpc in RPCS if rpc.rule.permission and set(_IDS) & set(rpc.method.input_type.fields_by_name) and rpc.method.name not in _PROVEN
]


@pytest.fixture(scope="module")
def owned(world: World) -> dict[str, str]:
    """Ids of things of an owner, and the owner's token under `token`."""
    owner = users.make_user(world.auth, world.admin(), "user", "internal")
    key_id = world.auth.CreateApiKey(auth_pb2.CreateApiKeyRequest(name="theirs", scopes=["runs:read"]), metadata=owner.bearer).key.key_id
    session_id = world.auth.GetPermissions(auth_pb2.GetPermissionsRequest(), metadata=owner.bearer).principal.session_id
    start = dispatcher_pb2.StartRunRequest(request_id=ids.uuid7(), agent="text-analyst", user_request="Some text.")
    run = dispatcher_pb2_grpc.DispatcherServiceStub(world.channels["dispatcher"]).StartRun(start, metadata=owner.bearer)
    return {
        "token": owner.token, "user_id": owner.user_id, "session_id": session_id, "key_id": key_id, "run_id": run.run_id,
        "thread_id": run.thread_id, "context_id": ids.uuid7(),
    }  # fmt: skip


def _asked(world: World, rpc: Rpc, named: dict[str, str], token: str) -> tuple[str, str]:
    """The code, and what was answered as text."""
    request, answer = _request(rpc, named), message_factory.GetMessageClass(rpc.method.output_type)
    channel = world.channels[rpc.service]
    kind = channel.unary_stream if rpc.method.server_streaming else channel.unary_unary
    call: Any = kind(rpc.path, request_serializer=type(request).SerializeToString, response_deserializer=answer.FromString)
    try:
        found = call(request, metadata=(("authorization", f"Bearer {token}"),), timeout=10)
        return "OK", str(next(iter(found), "")) if rpc.method.server_streaming else str(found)
    except grpc.RpcError as error:
        refusal: Any = error
        return refusal.code().name, refusal.details()


def _request(rpc: Rpc, named: dict[str, str]) -> Any:
    fields = rpc.method.input_type.fields_by_name
    request = message_factory.GetMessageClass(rpc.method.input_type)()
    plain = {
        "request_id": ids.uuid7(), "user_request": "Some text.", "message": "Some text.", "tool_name": "text_statistics",
        "arguments": b'{"text":"Some text."}',
    }  # fmt: skip
    for name, value in {**{name: named[name] for name in _IDS}, **plain}.items():
        # either a user or a thread of one's own
        if name in fields and not (name == "thread_id" and rpc.method.name == "EraseEvents"):
            setattr(request, name, value)
    return request


@pytest.mark.parametrize("rpc", _NAMING, ids=lambda rpc: rpc.path)
def test_what_is_somebody_elses_is_not_there(world: World, owned: dict[str, str], rpc: Rpc) -> None:
    stranger = next(credential for credential in world.credentials if credential.name == "user, internal")
    code, said = _asked(world, rpc, owned, stranger.token)
    users_may = rpc.rule.permission in world.policy["user", "internal"] and rpc.method.name not in _OF_OTHERS
    assert code in ({"NOT_FOUND", "OK"} if users_may else {"PERMISSION_DENIED"}), said
    if code == "OK":
        assert not any(value in said for name, value in owned.items() if name != "token"), said


def test_the_owner_finds_it_all(world: World, owned: dict[str, str]) -> None:
    """The positive control, after the strangers: what ends things comes last."""
    for rpc in sorted(_NAMING, key=lambda rpc: _LAST.index(rpc.method.name) if rpc.method.name in _LAST else -1):
        if rpc.rule.permission in world.policy["user", "internal"] and "context_id" not in rpc.method.input_type.fields_by_name:
            code, said = _asked(world, rpc, owned, owned["token"])
            assert code in ("OK", "FAILED_PRECONDITION"), (rpc.path, code, said)
