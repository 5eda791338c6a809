"""Options, markers and the fixtures that all tests share."""

from __future__ import annotations

import gc

import pytest

pytest_plugins = [
    "tests.fixtures.stack",
    "tests.fixtures.users",
    "tests.fixtures.storage",
    "tests.fixtures.accounts",
    "tests.fixtures.contexts",
    "tests.fixtures.replayed",
    "tests.fixtures.walled",
    "tests.fixtures.user_execution_context_fixtures",
    "tests.fixtures.witness",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the folder they lie in."""
    for item in items:
        for folder in ("unit", "integration", "system", "security", "faults"):
            if f"tests/{folder}/" in item.path.as_posix():
                item.add_marker(getattr(pytest.mark, folder))


def pytest_collection_finish() -> None:
    """Tests are thousands of objects that stay until the end: none of them is looked at for garbage again and again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """What ends with the process ends in order: libraries complain of what nobody has freed."""
    gc.unfreeze()
