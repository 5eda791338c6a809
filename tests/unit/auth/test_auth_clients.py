"""Service identities from a file that may change."""

import hashlib
import json
from pathlib import Path

import pytest

from chassis import settings
from services.auth import clients


def _write(path: Path, **secrets: str) -> None:
    path.write_text(json.dumps({name: hashlib.sha256(secret.encode()).hexdigest() for name, secret in secrets.items()}))


def test_only_the_right_secret_of_the_right_service(tmp_path: Path) -> None:
    path = tmp_path / "services.json"
    _write(path, gateway="one", events="two")
    known = clients.Clients(path)
    assert known.known("gateway", "one")
    assert not known.known("gateway", "two")
    assert not known.known("nobody", "one")
    assert not known.known("", "")


def test_a_changed_file_counts_at_once_and_a_broken_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "services.json"
    _write(path, gateway="one")
    known = clients.Clients(path)
    assert known.known("gateway", "one")
    _write(path, gateway="another", events="two")
    assert known.known("gateway", "another")
    assert not known.known("gateway", "one")
    path.write_text("{")
    assert known.known("gateway", "another")


def test_a_missing_or_malformed_file_is_told_at_start(tmp_path: Path) -> None:
    with pytest.raises(settings.MissingSecret, match=r"services\.json"):
        clients.Clients(tmp_path / "services.json").load()
    (tmp_path / "services.json").write_text('{"gateway": "plain secret"}')
    with pytest.raises(ValueError, match=r"services\.json"):
        clients.Clients(tmp_path / "services.json").load()
