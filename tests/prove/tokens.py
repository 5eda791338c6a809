"""python -m tests.prove.tokens: hostile tokens against the running services; one line of JSON at the end, exit 1 on any acceptance."""

from __future__ import annotations

import asyncio
import json
import secrets
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.fixtures import web
from tests.prove import doors, hostile, ways
from tests.prove.place import Place, running

_AT_ONCE = 12
_ACCEPTED = frozenset({"OK", "200", "SPOOFED"})


@dataclass(slots=True)
class Findings:
    """What became of everything that was sent."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def note(self, what: str, outcome: str, expected: frozenset[str]) -> None:
        """Count an outcome; remember it when it is not one of those expected."""
        self.outcomes[outcome] += 1
        if outcome not in expected and outcome != ways.UNSENDABLE:
            self.wrong.append(f"{what}: {outcome}")


async def _controls(place: Place) -> list[str]:
    """Good tokens must pass everywhere, or a refusal would prove nothing."""
    failed = []
    for typ in hostile.TYPES:
        for name, way in place.ways.of(typ).items():
            good = place.user.token if typ == hostile.ACCESS else place.forge.token(typ, **_subject(name, typ))
            if name == "http POST /auth/logout" or _elsewhere(name, typ):
                continue
            outcome = await way(good)
            if outcome in ways.REFUSED or outcome in ("INTERNAL", "500", "UNAVAILABLE", "503"):
                failed.append(f"{typ} {name}: {outcome}")
    return failed


def _subject(name: str, typ: str) -> dict[str, str]:
    return {"sub": "gateway"} if typ == hostile.SERVICE and "VerifyToken" in name else {}


def _elsewhere(name: str, typ: str) -> bool:
    """Ways for another type of token: even a good one is refused there."""
    return typ != hostile.ACCESS and (name.startswith(("http", "ws")) or name in ("grpc dispatcher.ListRuns", "grpc events.ListEvents"))


async def _tokens(place: Place, findings: Findings) -> int:
    """The whole table over every way."""
    cases = hostile.table(place.forge)
    room = asyncio.Semaphore(_AT_ONCE)

    async def one(case: hostile.Case, name: str, way: ways.Way) -> None:
        async with room:
            what = f"{case.typ} over {name}, {case.attack}: {case.name}"
            try:
                outcome = await way(case.token)
            except Exception as error:  # whatever it is, it is a finding
                outcome = f"{type(error).__name__} {error}"[:120]
            findings.note(what, outcome, _expected(case))

    async with asyncio.TaskGroup() as group:
        for case in cases:
            for name, way in place.ways.of(case.typ).items():
                if case.name.startswith("a good token") and _elsewhere(name, case.typ):
                    continue  # there it is what it is meant to be
                group.create_task(one(case, name, way))
    return len({(case.typ, case.attack, case.name) for case in cases})


def _expected(case: hostile.Case) -> frozenset[str]:
    # a good token of a service is known for what it is, and may not do what users may
    return ways.REFUSED | {"PERMISSION_DENIED"} if case.name == f"a good {hostile.SERVICE}" else ways.REFUSED


async def _withdrawn(place: Place, findings: Findings) -> None:
    """Tokens that were good: of a session that ended, of a user who was disabled, of a service at the wrong door."""
    async with web.client(base_url=place.url, timeout=30) as client:
        ended = (await _post(client, "/auth/login", {"email": place.other.email, "password": place.other.password})).json()
        await client.post("/auth/logout", headers=_bearer(ended["access_token"]))
        disabled = await _disabled(place, client)
        behalf = place.forge.token(hostile.BEHALF)
    for name, token in {"of an ended session": ended["access_token"], "of a disabled user": disabled}.items():
        for way_name, way in place.ways.of(hostile.ACCESS).items():
            findings.note(f"token {name} over {way_name}", await way(token), ways.REFUSED)
    for way_name, way in place.ways.of(hostile.ACCESS).items():
        if way_name.startswith(("http", "ws")):
            findings.note(f"token on behalf of a user over {way_name}", await way(behalf), ways.REFUSED)
    for refresh in (ended["refresh_token"], f"nrt_{secrets.token_urlsafe(32)}", place.user.token, "nrt_", "x" * 3000):
        await _refresh(place, refresh, findings)


async def _disabled(place: Place, client: httpx.AsyncClient) -> str:
    tokens = (await _post(client, "/auth/login", {"email": place.other.email, "password": place.other.password})).json()
    path, body = "/rpc/netra.auth.v1.AuthService/DisableUser", {"user_id": place.other.user_id, "reason": "proof"}
    answer = await client.post(path, json=body, headers=_bearer(place.admin))
    answer.raise_for_status()
    # in force everywhere once it has reached every process
    async with asyncio.timeout(10):
        for name in _EVERYWHERE:
            while await place.ways.of(hostile.ACCESS)[name](tokens["access_token"]) not in ways.REFUSED:
                pass
    return str(tokens["access_token"])


_EVERYWHERE = (
    "grpc auth.GetPermissions",
    "grpc context.ListThreads",
    "grpc dispatcher.ListRuns",
    "grpc events.ListEvents",
    "http GET /v1/me",
)


async def _refresh(place: Place, token: str, findings: Findings) -> None:
    async with web.client(base_url=place.url, timeout=30) as client:
        answers = {
            "POST /auth/refresh": await _post(client, "/auth/refresh", {"refresh_token": token}),
            "POST /rpc RefreshToken": await _post(client, "/rpc/netra.auth.v1.AuthService/RefreshToken", {"refresh_token": token}),
            "POST /auth/token": await client.post(
                "/auth/token", data={"grant_type": "refresh_token", "refresh_token": token}, headers=ways.a_client()
            ),
        }
    for name, answer in answers.items():
        code = answer.json().get("code", "OK")
        findings.note(f"refresh token {token[:8]} over {name}", code, ways.REFUSED)


async def _post(client: httpx.AsyncClient, path: str, body: dict[str, Any]) -> httpx.Response:
    return await client.post(path, json=body, headers=ways.a_client())


def _bearer(token: str) -> dict[str, str]:
    return {**ways.a_client(), "Authorization": f"Bearer {token}"}


async def _credentials(place: Place, findings: Findings) -> None:
    """Everything else somebody may sign in with."""
    secret = place.forge.auth.kid
    grants: dict[str, dict[str, Any]] = {
        "a service without its secret": {"client_credentials": {"client_id": "dispatcher", "client_secret": ""}},
        "a service with a key id": {"client_credentials": {"client_id": "dispatcher", "client_secret": secret}},
        "a service that does not exist": {"client_credentials": {"client_id": "root", "client_secret": "x"}},
        "an API key": {"api_key": {"api_key": f"nak_{secrets.token_hex(4)}_{secrets.token_urlsafe(32)}"}},
        "an API key of the wrong form": {"api_key": {"api_key": "nak_' OR 1=1"}},
        "a code": {"login_code": {"code": secrets.token_urlsafe(32)}},
        "an exchange with a hostile token": {
            "exchange": _exchange(place.forge.token(hostile.ACCESS, {"kid": place.forge.context.kid}), "x")
        },
        "an exchange without the secret": {"exchange": _exchange(place.user.token, "wrong")},
    }
    async with web.client(base_url=place.url, timeout=30) as client:
        for name, grant in grants.items():
            answer = await _post(client, "/rpc/netra.auth.v1.AuthService/IssueToken", grant)
            findings.note(f"sign-in with {name}", answer.json().get("code", "OK"), ways.REFUSED)


def _exchange(token: str, secret: str) -> dict[str, Any]:
    return {"subject_token": token, "actor": {"client_id": "dispatcher", "client_secret": secret}, "scope": ["session:read"]}


async def _doors(place: Place, findings: Findings) -> int:
    tried = doors.every(place)
    for name, expected, ask in tried:
        findings.note(name, await ask(), frozenset(expected.split()))
    return len(tried)


async def prove() -> dict[str, Any]:
    """Everything, against a system of its own."""
    began = time.monotonic()
    findings = Findings()
    async with running() as place:
        before = await _controls(place)
        cases = await _tokens(place, findings)
        requests = await _doors(place, findings)
        await _credentials(place, findings)
        await _withdrawn(place, findings)
        after = await _controls(place)
        restarts = place.system.restarts()
    outcomes = dict(findings.outcomes.most_common())
    return {
        "proof": "tokens",
        "ok": not (findings.wrong or before or after or restarts),
        "cases": cases,
        "requests": requests,
        "sent": sum(outcomes.values()) - outcomes.get(ways.UNSENDABLE, 0),
        "accepted": sum(line.rpartition(": ")[2] in _ACCEPTED for line in findings.wrong),
        "internal": outcomes.get("INTERNAL", 0) + outcomes.get("500", 0),
        "restarts": restarts,
        "outcomes": outcomes,
        "controls_failed": before + after,
        "wrong": len(findings.wrong),
        "first_wrong": findings.wrong[:40],
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    """Returns the exit code."""
    found = asyncio.run(prove())
    print(json.dumps(found))
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
