"""Texts of several contexts go as one, and come apart as they were."""

from __future__ import annotations

import pytest

from netra import errors
from services.context import store_openings


def test_texts_go_together() -> None:
    assert store_openings._together(["a", "b", ""]).split(store_openings._BETWEEN) == ["a", "b", ""]


@pytest.mark.parametrize("text", ["\x1f", "a\x1fb", "a\x1f"])
def test_a_text_that_would_come_apart_is_not_sent(text: str) -> None:
    with pytest.raises(errors.Internal):
        store_openings._together(["a", text, "c"])
