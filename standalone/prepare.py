"""Secrets, then roles, database and migrations: everything that must exist before the services.

python -m standalone.prepare secrets     generated files under NETRA_SECRETS_ROOT
python -m standalone.prepare database    roles, database and migrations, as the superuser
"""

import argparse
import asyncio
import hashlib
import json
import os
import secrets as random
import sys
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from chassis import environment, migrations
from chassis import postgres as door
from standalone.errors import StandaloneError
from standalone.folder import ROOT, write_private

SERVICES = ("auth", "context", "dispatcher", "events")
PEERS = ("context", "dispatcher", "events", "gateway")
VALKEY_USERS = (*SERVICES, "gateway")
OWNER = "netra_owner"
TOKEN_BYTES = 32
LOCK = 7005_7006
NOT_FOR_SERVICES = "-@dangerous -@admin -scan -randomkey -dbsize -function -script|flush -pubsub|channels +info"

FILES = {
    "postgres": ("password", "owner"),
    "valkey": ("admin",),
    "auth": ("postgres", "postgres_system", "valkey", "signing", "bootstrap_admin"),
    "context": ("postgres", "postgres_system", "valkey", "signing", "service"),
    "dispatcher": ("postgres", "postgres_system", "valkey", "service"),
    "events": ("postgres", "postgres_system", "valkey", "service"),
    "gateway": ("valkey", "service"),
}


def secrets(root: Path, uid: int | None = None) -> None:
    """Make every secret that does not exist yet; `uid` is given the folders of the services."""
    for name, files in FILES.items():
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        for file in files:
            if not _read(folder / file):
                write_private(folder / file, random.token_urlsafe(TOKEN_BYTES) + "\n")
    digests = {name: _digest(root / name / "service") for name in PEERS}
    write_secret(root / "auth" / "services.json", json.dumps(digests, indent=2) + "\n")
    write_secret(root / "valkey" / "users.acl", _acl_file(root))
    if uid is not None:
        _give(root, uid)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return ""


def _digest(path: Path) -> str:
    return hashlib.sha256(_read(path).encode()).hexdigest()


def write_secret(path: Path, text: str) -> None:
    """Write a secret where it is new or another one, in a folder of its own if need be."""
    if _read(path) != text.strip():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(path, text)


def _give(root: Path, uid: int) -> None:
    for path in (root, *root.rglob("*")):
        if path.stat().st_uid != uid:
            os.chown(path, uid, uid)


def valkey_rules(root: Path) -> list[list[str]]:
    """One ACL rule per service: its own keys and channels, nothing that lists or empties."""
    rules = []
    for name in VALKEY_USERS:
        password = _read(root / name / "valkey")
        words = f"on >{password} ~{name}:* &{name}:* +@all {NOT_FOR_SERVICES}"
        rules.append([name, *words.split()])
    return rules


def _acl_file(root: Path) -> str:
    admin = f"user admin on >{_read(root / 'valkey' / 'admin')} ~* &* +@all"
    lines = [" ".join(["user", *rule]) for rule in valkey_rules(root)]
    return "\n".join(["user default off", admin, *lines]) + "\n"


def dsn(admin_dsn: str, user: str, password: str, database: str) -> str:
    """The same server as `admin_dsn`, another user and database."""
    parts = urlsplit(admin_dsn)
    host = parts.netloc.rpartition("@")[2]
    netloc = f"{user}:{quote(password, safe='')}@{host}"
    return urlunsplit(parts._replace(netloc=netloc, path=f"/{database}"))


def on_database(admin_dsn: str, database: str) -> str:
    return urlunsplit(urlsplit(admin_dsn)._replace(path=f"/{database}"))


async def wait(admin_dsn: str) -> None:
    """Return when PostgreSQL answers a query; raise `StandaloneError` with its last answer."""
    try:
        async with door.connection(admin_dsn) as connection:
            await connection.value("SELECT 1")
    except Exception as error:  # whatever the driver raises: it is reported, with what to do
        raise StandaloneError(
            f"PostgreSQL does not let us in: {error}",
            "check the server and the password; where the secrets are newer than the data, make reset starts afresh",
        ) from error


def _roles(root: Path) -> dict[str, str]:
    roles = {OWNER: _read(root / "postgres" / "owner")}
    for name in SERVICES:
        roles[f"netra_{name}"] = _read(root / name / "postgres")
        roles[f"netra_{name}_system"] = _read(root / name / "postgres_system")
    return roles


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


async def database(admin_dsn: str, root: Path, database: str = "netra") -> list[str]:
    """Make roles and database, run the migrations as their owner; returns what was applied."""
    async with door.connection(admin_dsn) as connection:
        await connection.execute("SELECT pg_advisory_lock($1)", LOCK)
        await _make_roles(connection, _roles(root))
        if not await connection.value("SELECT 1 FROM pg_database WHERE datname = $1", database):
            await connection.execute(f'CREATE DATABASE "{database}"')
    async with door.connection(on_database(admin_dsn, database)) as connection:
        await _grant(connection, database)
    return await migrate(dsn(admin_dsn, OWNER, _read(root / "postgres" / "owner"), database))


async def _make_roles(connection: door.Transaction, roles: dict[str, str]) -> None:
    """Create what is missing; set the password always, so new secrets are believed at once."""
    known = {row["rolname"] for row in await connection.fetch("SELECT rolname FROM pg_roles")}
    statements = []
    for role, password in roles.items():
        if role not in known:
            statements.append(f"CREATE ROLE {role}")
        statements.append(
            f"ALTER ROLE {role} LOGIN NOINHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOBYPASSRLS NOREPLICATION PASSWORD {_literal(password)}"
        )
    await connection.execute("; ".join(statements))


async def _grant(connection: door.Transaction, database: str) -> None:
    """The database belongs to nobody but its roles; only the owner may create in it."""
    others = ", ".join(f"netra_{name}, netra_{name}_system" for name in SERVICES)
    await connection.execute(
        f'REVOKE ALL ON DATABASE "{database}" FROM PUBLIC; '
        f'GRANT CONNECT, CREATE, TEMPORARY ON DATABASE "{database}" TO {OWNER}; '
        f'GRANT CONNECT ON DATABASE "{database}" TO {others}; '
        "REVOKE ALL ON SCHEMA public FROM PUBLIC"
    )


async def migrate(owner_dsn: str) -> list[str]:
    """Apply each service's migrations in its own schema; returns the names of the new ones."""
    applied = []
    for name in SERVICES:
        folder = ROOT / "services" / name / "migrations"
        if folder.is_dir():
            applied += await migrations.apply(owner_dsn, name, folder)
    return applied


def _arguments() -> argparse.Namespace:
    variables = environment.get_environment()
    parser = argparse.ArgumentParser(prog="python -m standalone.prepare", description=__doc__)
    parser.add_argument("step", choices=["secrets", "database"])
    root = variables.get("NETRA_SECRETS_ROOT") or str(ROOT / ".netra" / "secrets")
    parser.add_argument("--root", type=Path, default=Path(root))
    return parser.parse_args()


async def _database(root: Path) -> None:
    variables = environment.get_environment()
    url = variables.get("NETRA_POSTGRES_ADMIN_URL")
    if not url:
        raise StandaloneError("NETRA_POSTGRES_ADMIN_URL is not set", "set it to the URL of a superuser")
    parts = urlsplit(url)
    if not parts.password:  # compose names the server; the password is a generated file
        user = parts.username or "postgres"
        url = dsn(url, user, _read(root / "postgres" / "password"), parts.path.strip("/") or user)
    await wait(url)
    name = variables.get("NETRA_DATABASE") or "netra"
    applied = await database(url, root, name)
    sys.stdout.write(f"database {name} is ready; applied: {', '.join(applied) or 'nothing new'}\n")


def main() -> int:
    arguments = _arguments()
    try:
        if arguments.step == "secrets":
            uid = environment.get_environment().get("NETRA_SECRETS_UID")
            secrets(arguments.root, int(uid) if uid else None)
            sys.stdout.write(f"secrets are in {arguments.root}\n")
        else:
            asyncio.run(_database(arguments.root))
    except StandaloneError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
