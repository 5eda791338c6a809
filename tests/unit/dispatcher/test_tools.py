"""Tools: declared by functions, found by those who may call them, checked before they run."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Annotated, Any

import pytest
from pydantic import Field

from chassis import trust
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


async def found(tools: registry.ToolRegistry, *permissions: str, **wanted: str) -> list[str]:
    """The names of what a user finds who has these permissions."""
    return [tool.spec.name for tool in tools.discover(await permitted(*permissions), registry.Wanted(**wanted)).tools]


async def test_a_user_finds_only_what_the_user_may_call() -> None:
    tools = registry.ToolRegistry([add, wipe])
    assert await found(tools, "tools:execute") == ["add"]
    assert await found(tools, *ALL) == ["add", "wipe"]
    assert await found(tools) == []


async def test_discovery_filters_by_text_and_tag() -> None:
    tools = registry.ToolRegistry([add, wipe])
    assert await found(tools, *ALL, text="WIPES") == ["wipe"]
    assert await found(tools, *ALL, tag="math") == ["add"]


def test_a_name_is_registered_once() -> None:
    @tool(name="add")
    async def other(a: int) -> int:
        """Adds otherwise."""
        return a

    # the same tool may be offered twice
    assert len(registry.ToolRegistry([add, add])) == 1
    with pytest.raises(ValueError, match="two tools are named add"):
        registry.ToolRegistry([add, other])


def test_the_same_declaration_again_changes_nothing_and_another_needs_a_higher_version() -> None:
    tools = registry.ToolRegistry([])
    first = tools.register(add)
    assert tools.register(dataclasses.replace(add, function=wipe.function)) is first
    other = dataclasses.replace(add, description="Otherwise.")
    for spec, replace, words in [
        (other, False, "higher version and ask to replace"), (dataclasses.replace(other, version="2.0.0"), False, "ask to replace"),
        (other, True, "higher version than that"), (dataclasses.replace(other, version="0.10.0"), True, "higher version than that"),
    ]:  # fmt: skip
        with pytest.raises(errors.AlreadyExists, match=words):
            tools.register(spec, replace=replace)
    assert tools.get("add") is first
    assert tools.register(dataclasses.replace(other, version="1.0.1"), replace=True) is tools.get("add") is not first
    assert tools.register(dataclasses.replace(other, version="1.10.0"), replace=True).spec.version == "1.10.0"
    with pytest.raises(errors.AlreadyExists, match=r"not 1\.9\.0"):
        tools.register(dataclasses.replace(other, version="1.9.0"), replace=True)
    assert len(tools) == 1


async def test_what_was_removed_is_found_no_more() -> None:
    tools = registry.ToolRegistry([add, wipe])
    tools.remove("add")
    tools.remove("add")
    assert await found(tools, *ALL) == ["wipe"]
    with pytest.raises(errors.NotFound):
        tools.get("add")


def many(count: int) -> registry.ToolRegistry:
    """Many tools of a few kinds."""
    tools = registry.ToolRegistry([])
    first = registry.registered(add, add.digest)
    for number in range(count):
        spec = dataclasses.replace(
            add, name=f"tool.{number:05}", category=f"c{number % 7}", tags=(f"t{number % 100}",), min_tier="business" if number % 3 else ""
        )
        tools.put(dataclasses.replace(first, spec=spec, haystack=f"{spec.name} {number}", size=1000))
    return tools


async def test_pages_go_on_where_the_last_one_ended() -> None:
    tools, mine = many(1000), await permitted(*ALL)
    seen: list[str] = []
    pages, more = 0, True
    while more:
        page = tools.discover(mine, registry.Wanted(category="c3"), after=seen[-1] if seen else "", most=10)
        seen += [tool.spec.name for tool in page.tools]
        pages, more = pages + 1, page.more
        # what comes and goes meanwhile moves nothing else
        tools.remove(seen[0])
    assert seen == [f"tool.{number:05}" for number in range(1000) if number % 7 == 3 and number % 3 == 0]
    assert pages == 5


async def test_a_page_ends_at_its_size() -> None:
    tools, mine = many(3000), await permitted(*ALL, tier="business")
    page = tools.discover(mine)
    assert (len(page.tools), page.more) == (registry.PAGE_BYTES // 1000, True)
    huge = dataclasses.replace(tools.get("tool.00000"), size=10 * registry.PAGE_BYTES)
    tools.put(huge)
    # but for one there is always room
    assert [(len(page.tools), page.more) for page in (tools.discover(mine), tools.discover(mine, after="tool.02998"))] == [
        (1, True), (1, False),
    ]  # fmt: skip


async def test_a_list_of_ten_thousand_asks_for_the_rights_once() -> None:
    tools, known = many(10_000), trust.Trust()
    mine = await permitted(*ALL, known=known)
    asked: list[object] = []
    permissions = known.permissions
    known.permissions = lambda *who: asked.append(who) or permissions(*who)  # type: ignore[method-assign, func-returns-value]
    assert len(tools.discover(mine, registry.Wanted(text="nowhere")).tools) == 0
    assert len(tools.discover(mine, registry.Wanted(tag="t99")).tools) == 34
    assert len(asked) == 2


def test_arguments_that_cost_too_much_to_check_are_refused() -> None:
    schema = {"type": "object", "properties": {"a": {"items": {"allOf": [{"minLength": 1}] * 100}}}}
    spec = dataclasses.replace(add, input_schema=schema)
    costly = registry.registered(spec, spec.digest, 103)
    costly.check_arguments({"a": ["x"] * 19_000})
    with pytest.raises(errors.TooLarge) as caught:
        costly.check_arguments({"a": ["x"] * 20_000})
    assert caught.value.details["limit"] == "19417"
    with pytest.raises(errors.ToolFailed, match="more values"):
        registry.registered(dataclasses.replace(spec, output_schema=schema), spec.digest, 103).check_result({"a": ["x"] * 20_000})
    # the operator's own tools have no such limit
    registry.registered(spec, spec.digest).check_arguments({"a": ["x"] * 20_000})


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
