"""Which backend `make test` chooses, and why."""

from __future__ import annotations

import pytest

from chassis.environment import IsolatedEnvironment
from standalone.errors import BackendUnavailable
from tests import launch

NAMES = ("NETRA_BACKEND", "NETRA_STACK", "NETRA_POSTGRES_ADMIN_URL", "NETRA_VALKEY_ADMIN_URL")


@pytest.mark.parametrize(
    ("given", "engine", "name", "reason"),
    [
        ({}, "26.1", "compose", "Docker engine 26.1 answers"),
        ({}, "", "embedded", "no Docker engine answers"),
        ({"NETRA_BACKEND": "embedded"}, "26.1", "embedded", "NETRA_BACKEND=embedded"),
        ({"NETRA_BACKEND": "compose"}, "", "compose", "NETRA_BACKEND=compose"),
        ({"NETRA_STACK": "standalone"}, "26.1", "embedded", "NETRA_STACK=standalone"),
        ({"NETRA_POSTGRES_ADMIN_URL": "postgresql://a", "NETRA_VALKEY_ADMIN_URL": "redis://b"}, "26.1", "env", "URLs are given"),
    ],
)
def test_auto_prefers_containers_and_a_wish_is_a_wish(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], engine: str, name: str, reason: str
) -> None:
    for variable in NAMES:
        monkeypatch.delenv(variable, raising=False)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr(launch, "engine", lambda: engine)
    chosen, why = launch.chosen(IsolatedEnvironment(given))
    assert chosen == name
    assert reason in why


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(BackendUnavailable, match="choose one of"):
        launch.chosen(IsolatedEnvironment({"NETRA_BACKEND": "elsewhere"}))
