"""Secrets of every kind go through a running system, rightly and wrongly; afterwards they are nowhere, and what is no secret is there."""

from __future__ import annotations

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from standalone import prepare
from tests.fixtures import canaries, oidc, own, traffic
from tests.fixtures.canaries import Canaries
from tests.fixtures.stack import gateway_url

# a whole system, and others that start beside it, on a machine that may be busy
pytestmark = pytest.mark.timeout(300)
PLAIN = "marmalade-5b1c"
KINDS = [
    "password", "new password", "access token", "refresh token", "API key", "reset token", "login code", "client secret", "tool argument",
    "JWT_SECRET_KEY", "database password", "Valkey password", "code of the provider", "client secret of Netra at the provider",
]  # fmt: skip
_FILES = {"service": "client secret", "valkey": "Valkey password", "admin": "Valkey password", "bootstrap_admin": "password"}
_PLUG = '''
from netra.tool import tool


@tool()
async def sign_in(word: str, api_key: str) -> str:
    """Needs a secret, and is content with it."""
    return word


@tool()
async def fail_to_sign_in(word: str, api_key: str) -> str:
    """Needs a secret, and shows it in its error, as libraries do."""
    raise ValueError(f"{api_key} is not valid for {word}")
'''


@dataclass(frozen=True, slots=True)
class Left:
    """What the system has left behind, by place."""

    canaries: Canaries
    places: dict[str, bytes]
    correlation_id: str

    def of(self, *beginnings: str) -> dict[str, bytes]:
        """The places whose names begin so."""
        return {name: content for name, content in self.places.items() if name.startswith(beginnings)}


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Left:
    """A system that has seen it all and is stopped."""
    folder, known = tmp_path_factory.mktemp("netra"), Canaries()
    settings = {"JWT_SECRET_KEY": known.new("JWT_SECRET_KEY"), "NETRA_LOG_LEVEL": "debug"}
    system = own.Own(folder, {"dispatcher": {"PYTHONPATH": str(_plug(tmp_path_factory.mktemp("plug")))}}, (), **settings)
    _operate(system.secrets, known)
    with oidc.provider(f"{gateway_url(system)}/auth/oidc/callback") as provider:
        known.keep("client secret of Netra at the provider", provider.client_secret)
        entry = provider.entry(create_users=True, tier="internal", redirects=[traffic.PAGE])
        oidc.write(system.secrets / "auth" / "oidc.json", idp=entry)
        system.start()
        try:
            did = traffic.Traffic(system, known, PLAIN)
            places = asyncio.run(_lived(did, _wrong_secrets(tmp_path_factory.mktemp("wrong"), system.secrets, known)))
        finally:
            system.stop()
    # pending spans and lines are written at the end
    places |= canaries.files(folder, "logs/*", "traces/*", "state/**/*.*", "state.json")
    return Left(known, {**places, **did.answers}, did.correlation_id)


def _plug(folder: Path) -> Path:
    """An installed package that offers tools."""
    (folder / "canary_tools.py").write_text(_PLUG)
    about = folder / "canary_tools-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: canary-tools\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text("[netra.tools]\nsign_in = canary_tools:sign_in\nfail = canary_tools:fail_to_sign_in\n")
    return folder


def _operate(secrets: Path, known: Canaries) -> None:
    """The operator's secrets, before anything is started."""
    for name, files in prepare.FILES.items():
        for file in files:
            kind = _FILES.get(file, "JWT_SECRET_KEY" if file == "signing" else "database password")
            prepare.write_secret(secrets / name / file, known.new(kind) + "\n")


async def _lived(did: traffic.Traffic, wrong: dict[str, dict[str, str]]) -> dict[str, bytes]:
    """Everything there is to do; meanwhile other processes are started with wrong secrets. What can only be asked while it runs."""
    said = asyncio.gather(*(asyncio.to_thread(did.system.said, "auth", 40, **settings) for settings in wrong.values()))
    async with did.signed_in():
        token, refresh_token = await did.passwords()
        await did.runs(token)
        await did.tools(token)
        await did.api_keys(token)
        await did.services(token)
        await did.outside()
        await did.without_stores(token, refresh_token)
        await did.refreshing(token, refresh_token)
        await did.told()
        places = {"audit": await asyncio.to_thread(did.audit), **await did.metrics()}
        places |= await canaries.tables(did.system.database_url)
        places |= await canaries.keys(did.system.valkey_admin_url)
    return places | {f"start with {name}": text.encode() for name, text in zip(wrong, await said, strict=True)}


def _wrong_secrets(folder: Path, secrets: Path, known: Canaries) -> dict[str, dict[str, str]]:
    """Settings that a process of auth cannot start with, or not get far."""
    shutil.copytree(secrets / "auth", folder / "auth")
    prepare.write_secret(folder / "auth" / "postgres", known.new("database password") + "\n")
    return {
        "a weak key": {"JWT_SECRET_KEY": known.new("JWT_SECRET_KEY")[:31]},
        "another key": {"JWT_SECRET_KEY": known.new("JWT_SECRET_KEY")},
        "a wrong database password": {"NETRA_SECRETS_DIR": str(folder / "auth")},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_no_secret_is_anywhere(left: Left, kind: str) -> None:
    assert kind in left.canaries.kinds()
    assert left.canaries.seen(kind, left.places) == []


def test_all_kinds_are_asked_for(left: Left) -> None:
    assert left.canaries.kinds() == set(KINDS)


def test_no_signed_token_is_written_or_told_at_all(left: Left) -> None:
    places = left.of("file logs", "file traces", "audit", "metrics", "answer", "table events", "table auth")
    assert [(place, canaries.signed_tokens(content)) for place, content in places.items() if canaries.signed_tokens(content)] == []


@pytest.mark.parametrize(
    ("place", "word"),
    [
        ("table auth.users", PLAIN),
        ("table auth.sessions", f"device {PLAIN}"),
        ("table auth.api_keys", PLAIN),
        ("table context.messages", PLAIN),
        ("table events.events", PLAIN),
        ("table auth.audit", ""),
        ("audit", ""),
        ("file traces/gateway.jsonl", ""),
        ("file traces/auth.jsonl", ""),
        ("file logs/auth.log", ""),
        ("file logs/gateway.log", ""),
        ("file logs/dispatcher.log", "a tool failed"),
        ("metrics of auth", "netra_rpc_server_duration"),
        ("metrics of gateway", "netra_http_server_duration"),
        ("start with a weak key", "JWT_SECRET_KEY"),
        ("start with another key", "JWT_SECRET_KEY"),
        ("start with a wrong database password", "password authentication failed"),
    ],
)
def test_what_is_no_secret_is_where_it_belongs(left: Left, place: str, word: str) -> None:
    """The positive control: the places were looked into, and the traffic came through them. Without a word: the correlation id."""
    assert (word or left.correlation_id).encode() in left.places[place]
