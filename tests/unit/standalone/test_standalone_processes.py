"""What each process is told, and what it is not."""

import dataclasses
from pathlib import Path

import pytest

from standalone import folder, processes
from standalone.errors import AlreadyRunning, StandaloneError
from standalone.login import email_of, password_file


@pytest.fixture
def setting(tmp_path: Path) -> processes.Setting:
    ports = {row.name: 9000 + number for number, row in enumerate(processes.TABLE)}
    return processes.Setting(
        folder.Folder(tmp_path), ports, "postgresql://postgres:secret@127.0.0.1:9000/postgres", "redis://admin:secret@127.0.0.1:9001/0"
    )


def row(name: str) -> processes.Process:
    return next(row for row in processes.TABLE if row.name == name)


def test_a_process_is_told_every_target_and_its_own_secrets(setting: processes.Setting) -> None:
    told = processes.environment_of(row("dispatcher"), setting)
    assert told["NETRA_DISPATCHER_PORT"] == "9004"
    assert told["NETRA_EVENTS_TARGET"] == "127.0.0.1:9005"
    assert told["NETRA_SECRETS_DIR"] == str(setting.place.secrets / "dispatcher")
    assert told["NETRA_POSTGRES_URL"] == "postgresql://127.0.0.1:9000/netra"
    assert told["NETRA_VALKEY_URL"] == "redis://127.0.0.1:9001/0"


def test_administrators_urls_stay_with_the_launcher(setting: processes.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRA_POSTGRES_ADMIN_URL", setting.postgres_admin_url)
    monkeypatch.setenv("NETRA_VALKEY_ADMIN_URL", setting.valkey_admin_url)
    for one in processes.TABLE:
        told = processes.environment_of(one, setting)
        assert not any("secret@" in value for value in told.values())
        assert ("NETRA_BOOTSTRAP_ADMIN" in told) == (one.name == "auth")


def test_ports_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRA_EVENTS_PORT", "7104")
    ports = processes.default_ports()
    assert (ports["events"], ports["auth"]) == (7104, 7001)


def test_dispatchers_are_as_many_as_wanted(setting: processes.Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.wanted() == processes.TABLE
    monkeypatch.setenv("NETRA_DISPATCHERS", "3")
    table = processes.wanted()
    assert [one.name for one in table[len(processes.TABLE) :]] == ["dispatcher2", "dispatcher3"]
    ports = processes.default_ports(table)
    assert (ports["dispatcher"], ports["dispatcher2"], ports["dispatcher3"]) == (7003, 7103, 7203)
    told = processes.environment_of(table[-1], dataclasses.replace(setting, ports=ports))
    assert (told["NETRA_DISPATCHER_PORT"], told["NETRA_SECRETS_DIR"]) == ("7203", str(setting.place.secrets / "dispatcher"))
    assert told["NETRA_DISPATCHER_TARGET"] == "127.0.0.1:7003,127.0.0.1:7103,127.0.0.1:7203"


def test_a_replica_has_a_port_of_its_own_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRA_DISPATCHERS", "2")
    monkeypatch.setenv("NETRA_DISPATCHER2_PORT", "7333")
    ports = processes.default_ports(processes.wanted())
    assert (ports["dispatcher"], ports["dispatcher2"]) == (7003, 7333)


@pytest.mark.parametrize("told", ["0", "10", "two", "-1"])
def test_a_number_of_dispatchers_that_is_none_is_refused(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NETRA_DISPATCHERS", told)
    with pytest.raises(StandaloneError, match="NETRA_DISPATCHERS"):
        processes.wanted()


def test_one_launcher_per_folder(tmp_path: Path) -> None:
    place = folder.Folder(tmp_path)
    with folder.held(place):
        assert place.holder() is not None
        with pytest.raises(AlreadyRunning, match="is in use by pid"), folder.held(place):
            pass
    assert place.holder() is None


def test_sweep_leaves_processes_alone_that_are_not_ours(tmp_path: Path) -> None:
    place = folder.Folder(tmp_path)
    place.write_state({"processes": {"events": {"pid": 1, "mark": "no such command line"}}})
    assert folder.sweep(place) == []
    assert place.state() == {}


def test_names_of_development_users(tmp_path: Path) -> None:
    place = folder.Folder(tmp_path)
    assert email_of("alice") == "alice@netra.example"
    assert password_file(place, "alice") == tmp_path / "secrets" / "users" / "alice@netra.example"
    assert password_file(place, "dev") == tmp_path / "secrets" / "auth" / "bootstrap_admin"
    with pytest.raises(StandaloneError):
        email_of("../auth/signing")
