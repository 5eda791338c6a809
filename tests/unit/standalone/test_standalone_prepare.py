"""Secrets are made once, stay private, and the rules made from them keep services apart."""

import hashlib
import json
import stat
from pathlib import Path

from standalone import prepare


def test_secrets_are_made_once_and_private(tmp_path: Path) -> None:
    prepare.secrets(tmp_path)
    first = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    prepare.secrets(tmp_path)
    assert {path: path.read_text() for path in first} == first
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in first)
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o700 for path in tmp_path.iterdir())


def test_no_secret_is_used_twice(tmp_path: Path) -> None:
    prepare.secrets(tmp_path)
    values = [(tmp_path / name / file).read_text().strip() for name, files in prepare.FILES.items() for file in files]
    assert len(values) == len(set(values))
    assert min(map(len, values)) >= 32


def test_auth_knows_digests_not_secrets(tmp_path: Path) -> None:
    prepare.secrets(tmp_path)
    digests = json.loads((tmp_path / "auth" / "services.json").read_text())
    for name in prepare.PEERS:
        secret = (tmp_path / name / "service").read_text().strip()
        assert digests[name] == hashlib.sha256(secret.encode()).hexdigest()


def test_a_lost_secret_is_replaced_and_its_traces_follow(tmp_path: Path) -> None:
    prepare.secrets(tmp_path)
    before = (tmp_path / "auth" / "services.json").read_text()
    (tmp_path / "events" / "service").unlink()
    prepare.secrets(tmp_path)
    assert (tmp_path / "auth" / "services.json").read_text() != before


def test_valkey_users_have_their_own_keys_only(tmp_path: Path) -> None:
    prepare.secrets(tmp_path)
    lines = (tmp_path / "valkey" / "users.acl").read_text().splitlines()
    assert lines[0] == "user default off"
    rules = {line.split()[1]: line.split()[2:] for line in lines}
    for name in prepare.VALKEY_USERS:
        assert [word for word in rules[name] if word[0] in "~&"] == [f"~{name}:*", f"&{name}:*"]
        assert {"-@dangerous", "-@admin", "-scan"} <= set(rules[name])


def test_dsn_keeps_the_server_and_quotes_the_password() -> None:
    made = prepare.dsn("postgresql://postgres:a@db.example:5434/postgres?sslmode=require", "netra_auth", "p@ss/word", "netra")
    assert made == "postgresql://netra_auth:p%40ss%2Fword@db.example:5434/netra?sslmode=require"
