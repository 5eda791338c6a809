"""A NUL in any text of any request is answered with the name of the field; no database takes it, and none is asked to."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message import Message

from chassis import status
from netra.access.v1 import access_pb2
from netra.auth.v1 import auth_pb2, auth_pb2_grpc
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2
from tests.fixtures import users
from tests.fixtures.forge import Forge
from tests.fixtures.stack import System
from tests.prove import hostile

_MODULES = {"auth": auth_pb2, "context": context_pb2, "dispatcher": dispatcher_pb2, "events": events_pb2}
# these are compared and not kept: a wrong one is answered as a wrong one
_SECRETS = ("token", "password", "secret", "api_key")
_WRONG = {"UNAUTHENTICATED", "INVALID_ARGUMENT", "OK"}


@dataclass(frozen=True, slots=True)
class Text:
    """A field of a request that holds text, and how to get there."""

    service: str
    method: MethodDescriptor
    path: tuple[str, ...]

    @property
    def rpc(self) -> str:
        """The name of the method on the wire."""
        return f"/{self.method.containing_service.full_name}/{self.method.name}"

    @property
    def is_secret(self) -> bool:
        """Whether it is for comparing only."""
        return any(word in self.path[-1] for word in _SECRETS)

    def __str__(self) -> str:
        return f"{self.method.name}.{'.'.join(self.path)}"

    def request(self) -> Message:
        """A request with a NUL there, and nothing else."""
        request = message_factory.GetMessageClass(self.method.input_type)()
        within: Any = request
        for name in self.path[:-1]:
            found = getattr(within, name)
            within = found.add() if _repeated(within.DESCRIPTOR.fields_by_name[name]) else found
        last = self.path[-1]
        if _repeated(within.DESCRIPTOR.fields_by_name[last]):
            getattr(within, last).append("a\0b")
        else:
            setattr(within, last, "a\0b")
        return request


def _repeated(field: FieldDescriptor) -> bool:
    return bool(field.is_repeated)


def _texts(message: Descriptor, above: tuple[Descriptor, ...] = ()) -> Iterator[tuple[str, ...]]:
    assert not message.GetOptions().map_entry, "nobody looks into maps yet"
    for field in message.fields:
        if field.type == field.TYPE_STRING:
            yield (field.name,)
        elif field.message_type is not None and field.message_type not in above:
            yield from ((field.name, *rest) for rest in _texts(field.message_type, (*above, message)))


TEXTS = [
    Text(name, method, path)
    for name, module in _MODULES.items()
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if not method.client_streaming
    for path in _texts(method.input_type)
]


@dataclass(frozen=True, slots=True)
class Callers:
    """Whoever may call, whatever the rule is."""

    forge: Forge
    admin: str
    channels: dict[str, grpc.Channel]

    def metadata(self, rule: access_pb2.Rule) -> tuple[tuple[str, str], ...]:
        """Of a call that the rule lets in."""
        if rule.permission:
            return (("authorization", f"Bearer {self.admin}"),)
        if not rule.services:
            return ()
        caller = ("authorization", f"Bearer {self.forge.token(hostile.SERVICE, sub=rule.services[0])}")
        return (caller, ("x-netra-context", self.forge.token(hostile.CONTEXT))) if rule.context else (caller,)


@pytest.fixture(scope="module")
def callers(system: System) -> Iterator[Callers]:
    """Of the running system."""
    with contextlib.ExitStack() as stack:
        channels = {name: stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{system.ports[name]}")) for name in _MODULES}
        stub = auth_pb2_grpc.AuthServiceStub(channels["auth"])
        admin = users.sign_in(stub, system.admin_email, system.admin_password()).access_token
        yield Callers(Forge.of(system, admin), admin, channels)


def _answered(callers: Callers, text: Text) -> tuple[str, str]:
    """The code, and the field that is named."""
    request, answer = text.request(), message_factory.GetMessageClass(text.method.output_type)
    channel = callers.channels[text.service]
    kind = channel.unary_stream if text.method.server_streaming else channel.unary_unary
    call: Any = kind(text.rpc, request_serializer=type(request).SerializeToString, response_deserializer=answer.FromString)
    rule = text.method.GetOptions().Extensions[access_pb2.rule]
    try:
        found = call(request, metadata=callers.metadata(rule), timeout=20)
        if text.method.server_streaming:
            next(iter(found), None)
    except grpc.RpcError as error:
        refused: Any = error
        return refused.code().name, status.from_rpc(refused).details.get("field", "")
    return "OK", ""


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_a_nul_is_answered_with_the_name_of_its_field(callers: Callers, text: Text) -> None:
    code, field = _answered(callers, text)
    if text.is_secret:
        assert code in _WRONG
    else:
        # of a list of messages the place is named as well
        assert (code, field.replace("[0]", "")) == ("INVALID_ARGUMENT", ".".join(text.path))


def test_there_are_texts_to_ask_about() -> None:
    assert len(TEXTS) > 100
    assert {text.service for text in TEXTS} == set(_MODULES)
    assert any(text.is_secret for text in TEXTS)
