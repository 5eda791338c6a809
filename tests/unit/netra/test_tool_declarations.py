"""Tools as people declare them: what is read out of a function, what is refused and how, and what makes two declarations the same."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Any, Literal

import pydantic
import pytest

from chassis import identity
from netra import declarations, registration
from netra.tool import Settled, ToolContext, ToolSpec, from_object, tool
from services.auth import permissions
from services.dispatcher.tools import registry


class Row(pydantic.BaseModel):
    """One line of a table."""

    name: str
    cost: float = 0.0


@tool(tags=("text",), idempotent=True)
async def described(rows: list[Row], mode: Literal["sum", "mean"] = "sum", *, limit: Annotated[int, pydantic.Field(le=10)] = 3) -> float:
    """Adds up rows.

    One number for all of them:

        sum(rows)

    Args:
        rows: What is added up.
        mode (str): How:
            the sum or the mean.
        limit: How many at most. Defaults to 3.

    Returns:
        The number.

    Raises:
        ValueError: Never.
    """
    return sum(row.cost for row in rows)


@tool()
def plain(a: int, b: int = 1) -> int:
    """Adds in another process."""
    return a + b


@tool(enforcement="python")
def walled(text: str) -> int:
    """Counts in the sandbox."""
    return len(text)


def test_a_docstring_of_google_style_explains_tool_and_parameters() -> None:
    assert described.description == "Adds up rows.\n\nOne number for all of them:\n\n    sum(rows)"
    told = {name: schema.get("description") for name, schema in described.input_schema["properties"].items()}
    assert told == {"rows": "What is added up.", "mode": "How:\nthe sum or the mean.", "limit": "How many at most. Defaults to 3."}
    assert described.output_schema == {"type": "number", "description": "The number."}


def test_annotations_become_the_schema() -> None:
    schema = described.input_schema
    assert (schema["required"], schema["additionalProperties"]) == (["rows"], False)
    assert schema["properties"]["limit"] | {"maximum": 10, "default": 3} == schema["properties"]["limit"]
    assert schema["properties"]["mode"]["enum"] == ["sum", "mean"]
    assert schema["$defs"]["Row"]["required"] == ["name"]


def test_what_an_annotation_says_comes_before_the_docstring() -> None:
    @tool()
    async def both(a: Annotated[int, pydantic.Field(description="of the annotation")]) -> None:
        """Does.

        Args:
            a: of the docstring
        """

    assert both.input_schema["properties"]["a"]["description"] == "of the annotation"


def test_a_docstring_without_sections_stays_as_it_is() -> None:
    @tool()
    async def odd() -> None:
        """Says this: and that.

        Note:
            As it stands.
        """

    assert odd.description == "Says this: and that.\n\nNote:\n    As it stands."


def test_a_parameter_may_have_the_name_of_a_method_of_models() -> None:
    @tool()
    async def named(schema: str, json: int, model_config: int, _own: int, copy: bool = False) -> None:
        """Does."""

    assert set(named.input_schema["properties"]) == {"schema", "json", "model_config", "_own", "copy"}


def test_the_context_is_no_argument_and_may_be_explained() -> None:
    @tool()
    async def within(a: int, where: ToolContext) -> None:
        """Does.

        Args:
            a: A number.
            where: The call.
        """

    assert (within.context_parameter, list(within.input_schema["properties"])) == ("where", ["a"])


def test_where_a_function_runs_follows_from_what_it_is() -> None:
    assert [(spec.asynchronous, spec.backend) for spec in (described, plain, walled)] == [
        (True, "asyncio"), (False, "worker"), (False, "sandbox"),
    ]  # fmt: skip
    # where it is contained it is imported by its name, and is this
    assert plain(2, b=3) == 5


async def _reconcile(context: ToolContext, arguments: Any) -> Settled | None:
    return None


def declared(**options: Any) -> ToolSpec:
    """A tool that may be wrong."""

    @tool(**{"name": "odd", **options})
    async def odd() -> None:
        """Does."""

    return odd


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("name", {"name": "Odd"}), ("name", {"name": "a" * 65}), ("name", {"name": "a b"}),
        ("version", {"version": "1.0"}), ("version", {"version": "01.0.0"}), ("version", {"version": "1.0.\u0661"}),
        ("tags", {"tags": "text"}), ("tags", {"tags": ("a", "a")}), ("tags", {"tags": ("A b",)}), ("tags", {"tags": ["a"]}),
        ("category", {"category": "Two words"}),
        ("permission", {"permission": "everything"}), ("permission", {"permission": ""}),
        ("min_role", {"min_role": "root"}), ("min_tier", {"min_tier": "gold"}),
        ("enforcement", {"enforcement": "none"}),
        ("timeout_s", {"timeout_s": 0}), ("timeout_s", {"timeout_s": float("nan")}), ("timeout_s", {"timeout_s": 1e6}),
        ("timeout_s", {"timeout_s": "5"}), ("timeout_s", {"timeout_s": True}),
        ("retries", {"retries": 1}), ("retries", {"retries": -1, "idempotent": True}), ("retries", {"retries": 11, "idempotent": True}),
        ("retries", {"retries": 1.5, "idempotent": True}),
        ("concurrency", {"concurrency": -1}), ("concurrency", {"concurrency": None}),
        ("fallback", {"fallback": "odd"}), ("fallback", {"fallback": "No name"}),
        ("deprecated", {"deprecated": "two\nlines"}), ("deprecated", {"deprecated": True}),
        ("secrets", {"secrets": ("UPPER",)}), ("secrets", {"secrets": ("a", "a")}), ("secrets", {"secrets": "key"}),
        ("side_effects", {"side_effects": 1}), ("idempotent", {"idempotent": "yes"}),
        ("reconcile", {"reconcile": _reconcile}), ("reconcile", {"reconcile": print, "side_effects": True}),
        ("backend", {"backend": "worker"}),
    ],
)  # fmt: skip
def test_each_field_is_checked_and_named(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(declarations.Misdeclared) as caught:
        declared(**options)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"tool {options.get('name', 'odd')}: {field} must") or field in ("reconcile", "retries")
    assert "\n" not in str(caught.value)


def test_all_fields_at_their_best_are_accepted() -> None:
    spec = declared(
        version="2.10.3", tags=("a", "b-c"), category="spend", permission="data:read", min_role="admin", min_tier="business",
        enforcement="command", timeout_s=60, retries=10, idempotent=True, side_effects=True, reconcile=_reconcile, concurrency=4,
        fallback="other.tool", deprecated="Use other.tool.", secrets=("api_key",), backend="process",
    )  # fmt: skip
    assert (spec.secrets, spec.reconcile, spec.fallback) == (("api_key",), _reconcile, "other.tool")


def _top() -> int:
    return 1


def _positional(a: int, /) -> int:
    return a


def _yielding(a: int) -> Any:
    yield a


async def _starred(*rows: int) -> None: ...


async def _unknown(a: "Nowhere") -> None: ...  # type: ignore[name-defined] # noqa: F821, UP037


async def _callable(a: functools.partial[int]) -> None: ...


async def _misnamed(a: int) -> None:
    """Does.

    Args:
        b: Is not there.
    """


def _with_context(where: ToolContext) -> None: ...


@pytest.mark.parametrize(
    ("function", "options", "words"),
    [
        (lambda a: a, {"name": "x"}, "top of a module"),
        (_top, {"enforcement": "command"}, "async def"),
        (_with_context, {}, "ToolContext"),
        (_yielding, {}, "returns its result"),
        (_positional, {}, "by name"), (_starred, {}, "by name"),
        (_callable, {}, "JSON Schema"),
        (_unknown, {}, "Nowhere"),
        (_misnamed, {}, "b, which is no parameter"),
    ],
)  # fmt: skip
def test_a_function_that_cannot_be_a_tool_is_refused(function: Any, options: dict[str, Any], words: str) -> None:
    named = {"name": function.__name__.strip("_"), **options}
    with pytest.raises(ValueError, match=words):
        tool(**named)(function)


def test_a_function_inside_of_another_cannot_be_imported() -> None:
    def inner() -> int:
        return 1

    with pytest.raises(ValueError, match="top of a module"):
        tool()(inner)


class Analysis:
    """Analyses costs."""

    name = "analysis"

    async def arun(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Runs."""
        return {"total_cost": 15420.50, "asked": kwargs, "args": args}


class Narrow:
    """Never read: `arun` has a text."""

    description = "Looks at one thing."

    async def arun(self, thing: str, *, often: int = 1) -> list[str]:
        """Runs.

        Args:
            thing: What is looked at.
        """
        return [thing] * often


async def test_an_object_with_arun_becomes_a_tool() -> None:
    spec = from_object(Analysis(), tags=("mock",), side_effects=True)
    assert (spec.name, spec.description, spec.tags, spec.side_effects) == ("analysis", "Analyses costs.", ("mock",), True)
    registry.ToolRegistry([spec]).get("analysis").check_arguments({"anything": [1]})
    assert await spec.function(period="month") == {"total_cost": 15420.50, "asked": {"period": "month"}, "args": ()}


async def test_an_object_with_named_parameters_has_their_schema() -> None:
    spec = from_object(Narrow(), name="narrow")
    assert (spec.description, spec.input_schema["required"]) == ("Looks at one thing.", ["thing"])
    assert spec.input_schema["properties"]["thing"]["description"] == "What is looked at."
    assert spec.input_schema["additionalProperties"] is False
    assert await spec.function(thing="x", often=2) == ["x", "x"]


def test_a_schema_can_be_given_for_an_object() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert from_object(Analysis(), description="Else.", input_schema=schema).input_schema == schema


@pytest.mark.parametrize("thing", [object(), Analysis, type("Sync", (), {"arun": lambda self: 1})()])
def test_an_object_without_an_awaitable_arun_is_refused(thing: Any) -> None:
    with pytest.raises(ValueError, match="arun"):
        from_object(thing, name="thing")


def test_entry_points_offer_tools_objects_and_lists_of_them() -> None:
    found = registry.offered("ours", [plain, Analysis()])
    assert [spec.name for spec in found] == ["plain", "analysis"]
    assert registry.offered("narrow", Narrow())[0].name == "narrow"
    for wrong in (Analysis, _top, None):
        with pytest.raises(ValueError, match="entry point 'ours'"):
            registry.offered("ours", wrong)


def test_a_digest_says_that_the_same_is_declared() -> None:
    same = declared(timeout_s=5)
    assert declared().digest == same.digest == declared(timeout_s=5.0).digest
    assert len(same.digest) == 64
    changes: dict[str, Any] = {
        "version": "1.0.1", "tags": ("a",), "category": "b", "permission": "a:b", "min_role": "user", "min_tier": "free",
        "enforcement": "script", "timeout_s": 6.0, "side_effects": True, "idempotent": True, "concurrency": 1, "fallback": "other",
        "deprecated": "x", "secrets": ("a",),
    }  # fmt: skip
    digests = [declared(**{name: value}).digest for name, value in changes.items()]
    digests += [dataclasses.replace(same, description="Does more.").digest, dataclasses.replace(same, output_schema={}).digest]
    digests += [dataclasses.replace(same, input_schema={"type": "object"}).digest, declared(idempotent=True, retries=1).digest]
    assert len({same.digest, *digests}) == len(digests) + 1
    # the order of keys says nothing
    turned = dict(reversed(list(same.input_schema.items())))
    assert list(turned) != list(same.input_schema)
    assert dataclasses.replace(same, input_schema=turned).digest == same.digest


def test_a_message_tells_everything_but_secrets() -> None:
    spec = declared(secrets=("api_key",), timeout_s=1.5, deprecated="Use x.", side_effects=True, reconcile=_reconcile)
    told = registration.message(spec)
    assert (told.timeout.ToMilliseconds(), told.deprecated, told.reconciles, told.digest) == (1500, "Use x.", True, spec.digest)
    assert "api_key" not in str(told)


def test_roles_and_tiers_are_those_of_the_platform_in_their_order() -> None:
    assert declarations.TIERS == permissions.TIERS
    assert set(declarations.TIERS) == identity.TIERS
    assert set(declarations.ROLES) == identity.ROLES
    for lower, higher in (declarations.ROLES[:2], declarations.ROLES[1:]):
        assert permissions.OF_ROLE[lower] < permissions.OF_ROLE[higher]
