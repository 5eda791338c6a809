"""A thousand guesses at a password: few are looked at, the owner signs in all the while, and nobody learns who has an account."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from chassis import limits, postgres, telemetry
from netra import ids
from netra.auth.v1 import auth_pb2
from services.auth import passwords
from tests.fixtures import web
from tests.fixtures.accounts import Accounts, new_email, refused
from tests.fixtures.stack import System, gateway_url
from tests.fixtures.users import NewUser

GUESSES, ADDRESSES, AT_ONCE = 1000, 20, 32
OVER_HTTP = 400
# what one account may cost strangers at once, and what comes back while the test runs
MOST_LOOKED_AT = 50 + 10
HOME = "192.0.2.1"
Steps = dict[str, list[str]]


async def _attack(guess: Callable[[int], Awaitable[None]], times: int) -> None:
    room = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        async with room:
            await guess(number)

    async with asyncio.TaskGroup() as group:
        for number in range(times):
            group.create_task(one(number))


@contextlib.asynccontextmanager
async def _signing_in(sign_in: Callable[[], Awaitable[object]]) -> AsyncIterator[list[float]]:
    """Somebody signs in again and again for the time of the block; how long each took."""
    took: list[float] = []

    async def again_and_again() -> None:
        while True:
            began = time.perf_counter()
            await sign_in()
            took.append(time.perf_counter() - began)

    async with asyncio.TaskGroup() as group:
        owner = group.create_task(again_and_again())
        yield took
        owner.cancel()


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every password that is really compared with a hash."""
    found: list[str] = []
    compare = passwords.Passwords._matches

    def counting(self: passwords.Passwords, stored: str, password: str) -> bool:
        found.append(password)
        return compare(self, stored, password)

    monkeypatch.setattr(passwords.Passwords, "_matches", counting)
    return found


async def test_of_a_thousand_guesses_few_cost_a_hash_and_the_owner_is_let_in(accounts: Accounts, looked_at: list[str]) -> None:
    user = await accounts.services.user()
    await accounts.login_from(HOME, user.email, user.password, "desk")
    codes: Counter[str] = Counter()

    async def guess(number: int) -> None:
        error = await refused(accounts.login_from(f"198.51.100.{number % ADDRESSES}", user.email, f"guess {number}"))
        assert error.code == "UNAUTHENTICATED" or error.retry_after_ms
        codes[error.code] += 1

    async with _signing_in(lambda: accounts.login_from(HOME, user.email, user.password, "desk")) as took:
        await _attack(guess, GUESSES)
    guessed = [password for password in looked_at if password.startswith("guess ")]
    assert 10 <= len(guessed) <= MOST_LOOKED_AT
    assert codes == {"UNAUTHENTICATED": len(guessed), "RATE_LIMITED": GUESSES - len(guessed)}
    # the task group has failed if one of them was refused
    assert len(took) >= 3
    assert max(took) < 10


async def test_over_http_they_are_told_when_to_come_back(system: System, new_user: NewUser) -> None:
    user = await asyncio.to_thread(new_user)
    codes: Counter[int] = Counter()
    async with contextlib.AsyncExitStack() as stack:

        async def client(number: int, name: str) -> httpx.AsyncClient:
            # idle connections are ours to close: the gateway's own end of one may cross with the next request
            transport = httpx.AsyncHTTPTransport(local_address=f"127.0.0.{number}", limits=httpx.Limits(keepalive_expiry=2.0))
            headers = {"User-Agent": name}
            made = web.client(base_url=gateway_url(system), transport=transport, headers=headers, timeout=60)
            return await stack.enter_async_context(made)

        owner = await client(1, "the owner's browser")
        strangers = [await client(100 + number, "a script") for number in range(ADDRESSES)]

        async def sign_in() -> None:
            answer = await owner.post("/auth/login", json={"email": user.email, "password": user.password})
            assert answer.status_code == 200, answer.text

        async def guess(number: int) -> None:
            answer = await strangers[number % ADDRESSES].post("/auth/login", json={"email": user.email, "password": f"guess {number}"})
            codes[answer.status_code] += 1
            if answer.status_code == 429:
                assert answer.json()["code"] == "RATE_LIMITED"
                assert 1 <= int(answer.headers["retry-after"]) <= 600

        await sign_in()
        async with _signing_in(sign_in) as took:
            await _attack(guess, OVER_HTTP)
    assert set(codes) == {401, 429}
    assert 10 <= codes[401] <= MOST_LOOKED_AT
    assert len(took) >= 3
    assert max(took) < 10


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, looked_at: list[str]) -> Steps:
    """What is done for a request, by its correlation id: hashes compared, transactions, counts."""
    found: Steps = defaultdict(list)

    def watch(owner: type, name: str, what: Callable[..., str]) -> None:
        method = getattr(owner, name)

        def watching(self: Any, *arguments: Any, **more: Any) -> Any:
            if telemetry.correlation_id():
                found[telemetry.correlation_id()].append(what(*arguments))
            return method(self, *arguments, **more)

        monkeypatch.setattr(owner, name, watching)

    watch(passwords.Passwords, "verify", lambda *_: "compare with a hash")
    watch(postgres.DatabaseManager, "transaction", lambda *_: "transaction")
    watch(postgres.Transaction, "execute", lambda query, *_: query)
    watch(postgres.Transaction, "row", lambda query, *_: query)
    for name in ("take", "check", "give_back"):
        watch(limits.Limits, name, lambda kind, *_, name=name: f"{name} {kind}")
    return found


async def test_the_same_is_done_whether_or_not_there_is_such_a_user(accounts: Accounts, steps: Steps, looked_at: list[str]) -> None:
    known, *disabled = [await accounts.services.user() for _ in range(3)]
    for user in disabled:
        await accounts.stub.DisableUser(auth_pb2.DisableUserRequest(user_id=user.user_id), metadata=await accounts.admin())
    gateway = await accounts.services.service_token("gateway")
    tried = {
        "known": (known.email, "a wrong password"),
        "unknown": (new_email(), "a wrong password"),
        "no address at all": ("nobody", "a wrong password"),
        "disabled": (disabled[0].email, "a wrong password"),
        "disabled, with the right password": (disabled[1].email, disabled[1].password),
    }
    stories = {}
    for place, (name, (email, password)) in enumerate(tried.items()):
        told = []
        for _ in range(14):
            correlation_id, before = ids.CorrelationId.new(), len(looked_at)
            request = auth_pb2.IssueTokenRequest(
                password=auth_pb2.PasswordGrant(email=email, password=password), client_address=f"203.0.113.{place}", device="x"
            )  # fmt: skip
            error = await refused(accounts.stub.IssueToken(request, metadata=(*gateway, ("x-correlation-id", correlation_id))))
            told.append((error.code, error.message, tuple(sorted(error.details)), len(looked_at) - before, steps[correlation_id]))
        stories[name] = told
    assert [code for code, *_ in stories["known"]].count("RATE_LIMITED") >= 3
    assert {hashes for *_, hashes, _ in stories["known"]} == {0, 1}
    # there is nothing to look for in the database under what is no address
    stories["no address at all"] = _as_if_looked_for(stories["no address at all"], stories["known"])
    for name, story in stories.items():
        assert story == stories["known"], name


def _as_if_looked_for(story: list[Any], other: list[Any]) -> list[Any]:
    """With the steps of the others put in after the first one, which counts the call."""

    def whole(own: list[str], others: list[str]) -> list[str]:
        return [*own[:1], *others[1 : 1 + len(others) - len(own)], *own[1:]]

    return [(*told[:-1], whole(told[-1], there[-1])) for told, there in zip(story, other, strict=True)]


async def test_and_takes_about_as_long(accounts: Accounts) -> None:
    known, unknown = (await accounts.services.user()).email, new_email()
    took: dict[str, list[float]] = {known: [], unknown: []}
    for number in range(40):
        email = (known, unknown)[number % 2]
        began = time.perf_counter()
        assert (await refused(accounts.login_from(f"203.0.113.{number}", email, "a wrong password"))).code == "UNAUTHENTICATED"
        took[email].append(time.perf_counter() - began)
    ratio = statistics.median(took[known]) / statistics.median(took[unknown])
    assert 1 / 3 < ratio < 3, ratio
