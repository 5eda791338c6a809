"""Certificates are read again when their files change, and never half."""

from __future__ import annotations

from pathlib import Path

import pydantic
import pytest

from chassis import settings, tls
from tests.fixtures.certificates import Authority, Files


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture(autouse=True)
def _look_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "_LOOK_EVERY_S", 0.0)


def _read(files: Files) -> tls.Certificates:
    return tls.Certificates(files.cert, files.key, files.ca)


def test_names_are_the_alternative_ones(authority: Authority) -> None:
    assert _read(authority.issue("events", "events.netra")).current().names == {"events", "events.netra"}


def test_the_common_name_counts_where_there_are_no_others(authority: Authority) -> None:
    assert _read(authority.issue(common_name="events")).current().names == {"events"}


def test_new_files_are_noticed(authority: Authority) -> None:
    files = authority.issue("events")
    known = _read(files)
    before = known.current()
    assert known.current() is before
    authority.issue("dispatcher", into="events")
    assert known.current().names == {"dispatcher"}


def test_files_that_do_not_fit_together_change_nothing(authority: Authority) -> None:
    files = authority.issue("events")
    known = _read(files)
    before = known.current()
    fresh = authority.issue("dispatcher")
    files.cert.write_bytes(fresh.cert.read_bytes())
    assert known.current() is before
    files.key.write_bytes(fresh.key.read_bytes())
    assert known.current().names == {"dispatcher"}
    files.key.unlink()
    assert known.current().names == {"dispatcher"}


@pytest.mark.parametrize("wrong", ["cert", "key", "ca"])
def test_a_start_with_a_wrong_file_names_it(authority: Authority, wrong: str) -> None:
    files = authority.issue("events")
    path: Path = getattr(files, wrong)
    path.write_text("nonsense")
    with pytest.raises(ValueError, match=str(path)):
        _read(files)
    path.unlink()
    with pytest.raises(ValueError, match=str(path)):
        _read(files)


def test_a_key_of_another_certificate_is_named(authority: Authority) -> None:
    files, other = authority.issue("events"), authority.issue("auth")
    files.key.write_bytes(other.key.read_bytes())
    with pytest.raises(ValueError, match="is not that of the certificate"):
        _read(files)


def test_settings_want_all_three_files_or_none(authority: Authority) -> None:
    given = authority.issue("events").settings()
    assert tls.of(settings.ProcessSettings()) is None
    assert tls.of(settings.ProcessSettings(**given)) is not None  # type: ignore[arg-type]
    for name in given:
        with pytest.raises(pydantic.ValidationError, match=f"NETRA_{name.upper()} is not set"):
            settings.ProcessSettings(**{other: path for other, path in given.items() if other != name})  # type: ignore[arg-type]


def test_a_peer_is_whom_its_certificate_names() -> None:
    context = {"x509_common_name": [b"auth"], "x509_subject_alternative_name": [b"events", b"127.0.0.1"]}
    assert tls.peer_names(context) == {"events", "127.0.0.1"}
    assert tls.peer_names({"x509_common_name": [b"auth"]}) == {"auth"}
    assert tls.peer_names({}) == frozenset()
