"""Tools: declared by functions, found by those who may call them, checked before they run."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import pytest
from pydantic import Field

from netra import errors
from netra.tool import ToolSpec, tool
from services.dispatcher.tools import registry, text
from tests.fixtures.permits import permitted

ALL = frozenset({"tools:execute", "tools:admin"})


@tool(tags=("math",))
async def add(a: int, b: Annotated[int, Field(le=10)] = 1) -> int:
    """Adds two numbers."""
    return a + b


@tool(permission="tools:admin")
async def wipe() -> None:
    """Wipes everything."""


def test_a_declaration_comes_from_the_function() -> None:
    assert (add.name, add.description, add.tags) == ("add", "Adds two numbers.", ("math",))
    assert add.input_schema["required"] == ["a"]
    assert add.output_schema == {"type": "integer"}


def test_a_synchronous_function_is_refused() -> None:
    def slow() -> None: ...

    with pytest.raises(ValueError, match="async def"):
        tool()(slow)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "place"),
    [({}, "arguments"), ({"a": "1"}, "arguments.a"), ({"a": 1, "b": 11}, "arguments.b"), ({"a": 1, "user_id": "x"}, "arguments")],
)
def test_arguments_are_checked_by_name(arguments: dict[str, Any], place: str) -> None:
    with pytest.raises(errors.InvalidPayload) as caught:
        registry.ToolRegistry([add]).get("add").check_arguments(arguments)
    assert caught.value.details["field"] == place


def test_a_schema_that_refers_elsewhere_is_refused() -> None:
    spec = ToolSpec("far", "1.0.0", "", {"$ref": "https://schemas.example/all.json"}, None, add.function)
    with pytest.raises(ValueError, match="nothing is fetched"):
        registry.ToolRegistry([spec])


async def test_a_user_finds_only_what_the_user_may_call() -> None:
    tools = registry.ToolRegistry([add, wipe])
    assert [spec.name for spec in tools.discover(await permitted("tools:execute"))] == ["add"]
    assert [spec.name for spec in tools.discover(await permitted(*ALL))] == ["add", "wipe"]
    assert tools.discover(await permitted()) == []


async def test_discovery_filters_by_text_and_tag() -> None:
    tools, mine = registry.ToolRegistry([add, wipe]), await permitted(*ALL)
    assert [spec.name for spec in tools.discover(mine, text="WIPES")] == ["wipe"]
    assert [spec.name for spec in tools.discover(mine, tag="math")] == ["add"]


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="two tools"):
        registry.ToolRegistry([add, add])


async def test_text_statistics_count() -> None:
    figures = await text.text_statistics.function(text="One two. Two three! Four?")
    assert figures == {
        "characters": 25, "words": 5, "unique_words": 4, "sentences": 3, "longest_word": "three", "reading_time_s": 1.3
    }  # fmt: skip


async def test_text_statistics_take_no_longer_for_odd_texts() -> None:
    # a quadratic expression would need an hour for this one
    async with asyncio.timeout(5):
        figures: Any = await text.text_statistics.function(text="a." + " " * 262_000)
    assert figures["sentences"] == 1


async def test_text_statistics_of_nothing() -> None:
    figures: Any = await text.text_statistics.function(text="")
    assert (figures["words"], figures["sentences"], figures["longest_word"]) == (0, 0, "")


async def test_text_keywords_rank_by_count_then_name() -> None:
    found = await text.text_keywords.function(text="pears apples pears Apples plums the the the", limit=2)
    assert found == {"keywords": [{"word": "apples", "count": 2}, {"word": "pears", "count": 2}]}
