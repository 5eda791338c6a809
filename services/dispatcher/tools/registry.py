"""ToolRegistry: register, discover, filter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jsonschema_rs

from netra import errors
from netra.tool import ToolSpec
from services.dispatcher.tools import permits, text
from services.dispatcher.tools.spend import chart, report
from services.dispatcher.tools.spend import tools as spend


@dataclass(frozen=True, slots=True)
class Registered:
    """A tool with its schemas compiled."""

    spec: ToolSpec
    _arguments: jsonschema_rs.Draft202012Validator
    _result: jsonschema_rs.Draft202012Validator | None

    def check_arguments(self, arguments: dict[str, Any]) -> None:
        """Raises `InvalidPayload` naming the argument."""
        if (problem := next(self._arguments.iter_errors(arguments), None)) is not None:
            place = ".".join(["arguments", *map(str, problem.instance_path)])
            raise errors.InvalidPayload(f"{self.spec.name}: {place}: {problem.message}", field=place)

    def check_result(self, result: object) -> None:
        """Raises `ToolFailed` when the tool did not return what it declares."""
        if self._result is not None and (problem := next(self._result.iter_errors(result), None)) is not None:
            place = ".".join(["result", *map(str, problem.instance_path)])
            raise errors.ToolFailed(f"{self.spec.name} returned something else than it declares: {place}: {problem.message}")


def _no_fetching(uri: str) -> Any:
    raise ValueError(f"a schema may not refer to {uri}: nothing is fetched")


def _compiled(schema: Any) -> jsonschema_rs.Draft202012Validator:
    return jsonschema_rs.Draft202012Validator(
        schema, retriever=_no_fetching, pattern_options=jsonschema_rs.RegexOptions(), mask="the value"
    )


def _registered(spec: ToolSpec) -> Registered:
    try:
        result = None if spec.output_schema is None else _compiled(spec.output_schema)
        return Registered(spec, _compiled(spec.input_schema), result)
    except (ValueError, jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError) as error:
        raise ValueError(f"tool {spec.name}: its schema is not valid: {error}") from None


class ToolRegistry:
    """The tools of this process, by name. A name is registered once."""

    def __init__(self, tools: Iterable[ToolSpec]) -> None:
        self._tools: dict[str, Registered] = {}
        for spec in tools:
            if spec.name in self._tools:
                raise ValueError(f"two tools are named {spec.name}")
            self._tools[spec.name] = _registered(spec)

    def get(self, name: str) -> Registered:
        """The tool. Raises `NotFound`."""
        try:
            return self._tools[name]
        except KeyError:
            raise errors.NotFound(f"There is no tool {name!r}.", field="tool_name") from None

    def discover(self, mine: permits.Permits, *, text: str = "", tag: str = "") -> list[ToolSpec]:
        """The tools that somebody may call, by name; with a text in name or description; with a tag."""
        wanted = text.casefold()
        return [
            tool.spec
            for _, tool in sorted(self._tools.items())
            if mine.may_call(tool.spec)
            and wanted in f"{tool.spec.name} {tool.spec.description}".casefold()
            and (not tag or tag in tool.spec.tags)
        ]


def built_in() -> list[ToolSpec]:
    """The tools that come with Netra."""
    figures = [spend.usage_load, spend.usage_profile, spend.cost_breakdown, spend.spend_opportunities]
    return [text.text_statistics, text.text_keywords, *figures, chart.spend_chart, report.spend_report]


def installed() -> list[ToolSpec]:
    """The tools that installed packages offer under the entry-point group `netra.tools`."""
    return [point.load() for point in metadata.entry_points(group="netra.tools")]
