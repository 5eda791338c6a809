"""A service with an RPC that nobody gave an access rule does not start."""

from __future__ import annotations

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool

from chassis import server
from netra.auth.v1 import auth_pb2
from netra.context.v1 import context_pb2
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2


def test_an_rpc_without_a_rule_is_named() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="bare.proto", package="bare.v1", syntax="proto3")
    file.message_type.add(name="Empty")
    service = file.service.add(name="BareService")
    service.method.add(name="Open", input_type=".bare.v1.Empty", output_type=".bare.v1.Empty")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    with pytest.raises(server.MissingAccessRule, match=r"bare\.v1\.BareService/Open"):
        server.rules(pool.FindServiceByName("bare.v1.BareService"))


@pytest.mark.parametrize("module", [auth_pb2, context_pb2, dispatcher_pb2, events_pb2])
def test_every_rpc_of_netra_has_a_rule(module: object) -> None:
    for descriptor in module.DESCRIPTOR.services_by_name.values():  # type: ignore[attr-defined]
        assert len(server.rules(descriptor)) == len(descriptor.methods)
