"""What does it cost a server to know who calls? CPU of a unary call with full verification, beside the same call without.

python bench/auth_overhead.py [rounds] [calls per round]

Three servers in one process, which does nothing else, answer the same call, which does nothing either: any work that a real call
does makes the ratio smaller. They take turns, so that whatever else the machine does falls on all of them alike.

  verified     as every service runs: a token of a user (cached after its first use), revocations, the access rule by its permission
  unverified   the same server and interceptor (deadline, trace, errors, metrics), but everybody is let in and nobody sends a token
  bare         grpc.aio alone
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import statistics
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import uvloop
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from google.protobuf.timestamp_pb2 import Timestamp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import child, report, stores
from chassis import identity, server, trust
from netra import ids
from netra.auth.v1 import auth_pb2
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc

GOAL = 1.15
ROUNDS, CALLS, AT_ONCE = 12, 1500, 16
REVOKED = 500


class Nothing(dispatcher_pb2_grpc.DispatcherServiceServicer):
    """Answers at once."""

    async def ListAgents(self, request: dispatcher_pb2.ListAgentsRequest, context: Any) -> dispatcher_pb2.ListAgentsResponse:
        return dispatcher_pb2.ListAgentsResponse()


def _nothing() -> Nothing:
    # the other methods are not called
    return Nothing()  # type: ignore[abstract]


class Everybody(identity.Authenticator):
    """Lets everybody in."""

    async def admit(self, *_: object) -> identity.Caller:
        return identity.Caller()


async def _trusted(key: Ed25519PrivateKey) -> trust.Trust:
    """What a process knows when it has run for a while."""
    grants = [auth_pb2.Grant(role="user", tier=tier, permissions=["agents:read", "runs:read", "runs:write"]) for tier in identity.TIERS]
    now = Timestamp(seconds=int(time.time()))
    withdrawn = [auth_pb2.Revocation(session_id=ids.SessionId.new(), revoked_at=now) for _ in range(REVOKED)]
    published = auth_pb2.Key(kid="bench", issuer="auth", state=auth_pb2.Key.STATE_CURRENT, public_key=key.public_key().public_bytes_raw())
    known = trust.Trust()
    update = auth_pb2.WatchTrustResponse(keys=[published], policy=auth_pb2.Policy(version=1, grants=grants), revocations=withdrawn)
    await known.apply(update)
    return known


def _token(key: Ed25519PrivateKey) -> str:
    claims = {
        "sub": ids.UserId.new(), "sid": ids.SessionId.new(), "tid": ids.TenantId.new(), "roles": ["user"], "tier": "business", "ver": 1,
    }  # fmt: skip
    return identity.sign(key, "bench", identity.ACCESS, claims, 900)


@contextlib.asynccontextmanager
async def _mounted(authenticator: identity.Authenticator) -> AsyncIterator[int]:
    one = server.Server("127.0.0.1", 0, authenticator, 0.1)
    descriptor = dispatcher_pb2.DESCRIPTOR.services_by_name["DispatcherService"]
    one.add(descriptor, dispatcher_pb2_grpc.add_DispatcherServiceServicer_to_server, _nothing())
    await one.start()
    yield one.port
    await one.drain()


@contextlib.asynccontextmanager
async def _bare() -> AsyncIterator[int]:
    one = grpc.aio.server()
    dispatcher_pb2_grpc.add_DispatcherServiceServicer_to_server(_nothing(), one)
    port = one.add_insecure_port("127.0.0.1:0")
    await one.start()
    yield port
    await one.stop(None)


async def _serve() -> None:
    """The process that is measured: tells its ports, then its CPU time as often as it is asked."""
    stores.set_up()
    key = Ed25519PrivateKey.generate()
    known = await _trusted(key)
    async with _mounted(identity.Authenticator(known)) as verified, _mounted(Everybody(known)) as unverified, _bare() as bare:
        ports = {"verified": verified, "unverified": unverified, "bare": bare}
        await child.answer({"ports": ports, "token": _token(key)})


async def _calls(call: Any, metadata: tuple[tuple[str, str], ...], times: int) -> None:
    async def some() -> None:
        for _ in range(times // AT_ONCE):
            await call(dispatcher_pb2.ListAgentsRequest(), metadata=metadata)

    await asyncio.gather(*(some() for _ in range(AT_ONCE)))


async def _spent(server: child.Child, call: Any, metadata: tuple[tuple[str, str], ...], calls: int) -> float:
    """Microseconds of the server's CPU per call."""
    before = await asyncio.to_thread(server.ask)
    await _calls(call, metadata, calls)
    return (await asyncio.to_thread(server.ask) - before) / (calls // AT_ONCE * AT_ONCE) * 1e6


async def _measured(rounds: int, calls: int) -> dict[str, list[float]]:
    server = await asyncio.to_thread(child.Child, __file__, "--serve")
    channels = {name: grpc.aio.insecure_channel(f"127.0.0.1:{port}") for name, port in server.told["ports"].items()}
    ways = {}
    for name, channel in channels.items():
        metadata = (("authorization", f"Bearer {server.told['token']}"),) if name == "verified" else ()
        ways[name] = functools.partial(_spent, server, dispatcher_pb2_grpc.DispatcherServiceStub(channel).ListAgents, metadata, calls)
    found = await report.in_turn(ways, rounds)
    for channel in channels.values():
        await channel.close()
    await asyncio.to_thread(server.close)
    return found


def main(rounds: int = ROUNDS, calls: int = CALLS) -> int:
    """Returns the exit code: 1 when verification costs more than the goal."""
    found = uvloop.run(_measured(rounds, calls))
    report.table(("server", "cpu_us_per_call_median", "lowest", "highest"), ((name, *report.spread(each)) for name, each in found.items()))
    ratios = report.ratios(found["verified"], found["unverified"])
    ratio = statistics.median(ratios)
    return report.verdict(
        "auth_overhead", ratio <= GOAL, f"<= {GOAL} x", f"{ratio:.3f} x",
        middle_half=[round(ratios[len(ratios) // 4], 3), round(ratios[-1 - len(ratios) // 4], 3)],
        ratio_to_bare=round(report.ratio(found["verified"], found["bare"]), 3), rounds=rounds, calls_per_round=calls,
    )  # fmt: skip


if __name__ == "__main__":
    if "--serve" in sys.argv:
        uvloop.run(_serve())
    else:
        sys.exit(main(*map(int, sys.argv[1:])))
