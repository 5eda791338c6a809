"""All there is to ask, as the running system itself tells it, and which examples there are of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from gateway import frames as gateway_frames
from gateway import rpc as gateway_rpc
from tests.prove.isolation import (
    asking,
    examples_admin,
    examples_auth,
    examples_context,
    examples_frames,
    examples_resources,
    examples_routes,
    examples_runs,
    examples_threads,
)
from tests.prove.isolation.example import Example, frames, routes, rpcs
from tests.prove.isolation.world import SERVICES, World

# read for what they register
FILES = (
    examples_admin,
    examples_auth,
    examples_context,
    examples_frames,
    examples_resources,
    examples_routes,
    examples_runs,
    examples_threads,
)
_OPEN = ("grpc.health.", "grpc.reflection.")
# what needs an outside provider to sign in with
_OUTSIDE = ("StartOidc", "FinishOidc", "/auth/oidc/")


@dataclass(slots=True)
class Universe:
    """Names of what there is, by kind."""

    rpcs: set[str] = field(default_factory=set)
    routes: set[str] = field(default_factory=set)
    frames: set[str] = field(default_factory=set)
    streams: set[str] = field(default_factory=set)

    def kinds(self) -> dict[str, set[str]]:
        """All."""
        return {"rpcs": self.rpcs, "routes": self.routes, "frames": self.frames, "streams": self.streams}


async def seen(world: World) -> Universe:
    """By reflection of every service, by the gateway's own document, by its table of frames."""
    found = Universe()
    for name in SERVICES:
        for method in await asyncio.to_thread(_reflected, world.system.ports[name]):
            found.rpcs.add(f"{name}.{method}")
    document = (await world.http.get("/openapi.json")).json()
    for path, methods in document["paths"].items():
        found.routes |= {f"{method.upper()} {path}" for method in methods}
    found.frames = set(gateway_frames.TYPES)
    found.streams = {name for name in found.rpcs if name in asking.METHODS and _streams(name)}
    found.streams |= {f"STREAM {name}" for name in opened_by_stream()}
    if world.provider is None:
        found.rpcs, found.routes = {one for one in found.rpcs if _inside(one)}, {one for one in found.routes if _inside(one)}
    return found


def _inside(name: str) -> bool:
    return not any(part in name for part in _OUTSIDE)


def _reflected(port: int) -> list[str]:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        found = []
        for service in database.get_services():
            if not service.startswith(_OPEN):
                file = database.FindFileContainingSymbol(service)
                (described,) = [one for one in file.service if f"{file.package}.{one.name}" == service]
                found += [method.name for method in described.method]
        return found


def _streams(name: str) -> bool:
    method = asking.METHODS[name]
    return bool(method.client_streaming or method.server_streaming)


def opened_by_stream() -> dict[str, str]:
    """The RPCs that STREAM opens, with their names on the wire."""
    wires = {one.path.removeprefix("/rpc/") for one in gateway_rpc.streams()}
    return {name: asking.full(name) for name in asking.METHODS if asking.full(name) in wires}


def examples(world: World) -> dict[str, tuple[asking.Way, Example]]:
    """Every example with its way, by name."""
    over = asking.Rpc(world), asking.Edge(world), asking.Route(world), asking.Frames(world)
    found: dict[str, tuple[asking.Way, Example]] = {name: (over[0], one) for name, one in rpcs.known.items()}
    outside = {one.path.removeprefix("/rpc/") for one in gateway_rpc.methods()}
    for name, one in rpcs.known.items():
        if name in asking.METHODS and asking.full(name) in outside:
            found[f"POST /rpc/{asking.full(name)}"] = over[1], one
    found |= {name: (over[2], one) for name, one in routes.known.items()}
    found |= {name: (over[3], one) for name, one in frames.known.items()}
    found |= {name: (over[3], one) for name, one in examples_frames.streams(opened_by_stream()).items()}
    if world.provider is None:
        found = {name: one for name, one in found.items() if _inside(name)}
    return found


def covered(universe: Universe, names: set[str]) -> dict[str, set[str]]:
    """What of each kind has an example."""
    names = names | {name.partition("#")[0] for name in names}
    frames_ = {name.partition(" ")[0] for name in names}
    return {kind: wanted & (frames_ if kind == "frames" else names) for kind, wanted in universe.kinds().items()}
