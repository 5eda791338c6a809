"""ToolRegistry: register, replace, discover, filter."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from chassis import telemetry
from netra import declarations, errors, registration
from netra.dispatcher.v1 import dispatcher_pb2
from netra.tool import ToolSpec, from_object
from services.dispatcher.tools import arguments, code, demo, model, permits, schemas, text
from services.dispatcher.tools.spend import chart, report
from services.dispatcher.tools.spend import tools as spend

# what an answer may weigh, beside at least one tool
PAGE_BYTES = 1024 * 1024
# values times schemas that one call of a tool from outside may cost: some 0.1 s of a processor
_MOST_CHECKS = 2_000_000
_deprecated = telemetry.meter.create_counter("netra.tools.deprecated_calls", description="Calls of tools that are deprecated, by tool.")


@dataclass(frozen=True, slots=True)
class Registered:
    """A tool with its schemas compiled. `weight` bounds what checking one value costs; 0 where the operator's own code declares it."""

    spec: ToolSpec
    digest: str
    _arguments: schemas.Validator
    _result: schemas.Validator | None
    # as it is listed, and how large that is
    shown: dispatcher_pb2.Tool = field(repr=False)
    size: int
    # what text is looked for in, and the names of the parameters
    haystack: str = field(repr=False)
    parameters: frozenset[str]
    weight: int = 0

    def check_arguments(self, given: dict[str, Any]) -> None:
        """Raises `InvalidPayload` naming the argument; `TooLarge` when checking it would take too long."""
        if self.weight and self._costly(given):
            message = f"{self.spec.name}: arguments have too many values for the schema of the tool"
            raise errors.TooLarge(message, field="arguments", limit=_MOST_CHECKS // self.weight)
        if not self._arguments.is_valid(given):
            problem = next(self._arguments.iter_errors(given))
            place = ".".join(["arguments", *map(str, problem.instance_path)])
            raise errors.InvalidPayload(f"{self.spec.name}: {place}: {problem.message}", field=place)

    def check_result(self, result: object) -> None:
        """Raises `ToolFailed` when the tool did not return what it declares."""
        if self._result is None:
            return
        if self.weight and self._costly(result):
            raise errors.ToolFailed(f"{self.spec.name} returned more values than can be held against what it declares.")
        if not self._result.is_valid(result):
            problem = next(self._result.iter_errors(result))
            place = ".".join(["result", *map(str, problem.instance_path)])
            raise errors.ToolFailed(f"{self.spec.name} returned something else than it declares: {place}: {problem.message}")

    def _costly(self, value: object) -> bool:
        return self.weight * arguments.nodes(value) > _MOST_CHECKS

    def called(self) -> None:
        """Count a call of a tool that is deprecated."""
        if self.spec.deprecated:
            _deprecated.add(1, {"tool": self.spec.name})


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which tools are looked for; what is empty is not looked at."""

    text: str = ""
    tag: str = ""
    category: str = ""
    permission: str = ""
    tier: str = ""
    enforcement: str = ""
    parameter: str = ""

    def conditions(self, mine: permits.Permits) -> Iterator[Callable[[Registered], bool]]:
        """What a tool must be, the cheapest first."""
        if self.tag:
            yield lambda tool: self.tag in tool.spec.tags
        for name, asked in (("category", self.category), ("permission", self.permission), ("enforcement", self.enforcement)):
            if asked:
                yield _declares(name, asked)
        if self.parameter:
            yield lambda tool: self.parameter in tool.parameters
        if self.text:
            needle = self.text.casefold()
            yield lambda tool: needle in tool.haystack
        if self.tier:
            yield lambda tool: mine.comes_with(tool.spec, self.tier)
        sight = mine.sight()
        yield lambda tool: sight(tool.spec)


def _declares(name: str, asked: str) -> Callable[[Registered], bool]:
    read = operator.attrgetter(name)
    return lambda tool: bool(read(tool.spec) == asked)


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the tools that were found, by name; `more` when there are others after them."""

    tools: list[Registered]
    more: bool


class ToolRegistry:
    """The tools of this process, by name: its own, and those that are registered from outside while it runs."""

    def __init__(self, tools: Iterable[ToolSpec]) -> None:
        """Raises `ValueError` for two tools of one name, and for a schema that is not valid."""
        self._tools: dict[str, Registered] = {}
        self._names: list[str] = []
        for spec in tools:
            if (known := self._tools.get(spec.name)) is not None and known.spec.function is not spec.function:
                raise ValueError(f"two tools are named {spec.name}")
            self.register(spec)
        self._own = frozenset(self._tools)

    def __len__(self) -> int:
        return len(self._tools)

    def own(self, name: str) -> bool:
        """Whether the tool came with this process; others of its name are not heard."""
        return name in self._own

    def get(self, name: str) -> Registered:
        """The tool. Raises `NotFound`."""
        try:
            return self._tools[name]
        except KeyError:
            raise errors.NotFound(f"There is no tool {name!r}.", field="tool_name") from None

    def register(self, spec: ToolSpec, *, replace: bool = False, weight: int = 0) -> Registered:
        """Add a tool. The same declaration again changes nothing; another one takes the place of the first with `replace` and a higher
        version.

        Raises `AlreadyExists` otherwise, `ValueError` for a schema that is not valid.
        """
        known = self._tools.get(spec.name)
        digest = spec.digest
        if known is not None:
            if known.digest == digest:
                return known
            require_successor(spec.name, known.spec.version, spec.version, replace=replace)
        return self.put(registered(spec, digest, weight))

    def put(self, tool: Registered) -> Registered:
        """Have this tool under its name from now on, whatever was there."""
        if tool.spec.name not in self._tools:
            bisect.insort(self._names, tool.spec.name)
        self._tools[tool.spec.name] = tool
        return tool

    def remove(self, name: str) -> None:
        """Have no tool of this name any more. Calls that have begun go on."""
        if self._tools.pop(name, None) is not None:
            del self._names[bisect.bisect_left(self._names, name)]

    def discover(self, mine: permits.Permits, wanted: Wanted = Wanted(), *, after: str = "", most: int = 0) -> Page:
        """The tools that somebody may call and that are looked for, by name, after the name `after`.

        At most `most` (0: as many as fit), and no more than 1 MiB of them, but one.
        """
        conditions = list(wanted.conditions(mine))
        found: list[Registered] = []
        size = 0
        for name in self._names[bisect.bisect_right(self._names, after) :] if after else self._names:
            tool = self._tools[name]
            for condition in conditions:
                if not condition(tool):
                    break
            else:
                size += tool.size
                if found and (size > PAGE_BYTES or len(found) == most):
                    return Page(found, more=True)
                found.append(tool)
        return Page(found, more=False)


def require_successor(name: str, known: str, version: str, *, replace: bool) -> None:
    """Whether another declaration may take the place of one of version `known`. Raises `AlreadyExists` saying what it takes."""
    if not replace:
        message = f"There is a tool {name} {known} that is declared otherwise. Give yours a higher version and ask to replace it."
        raise errors.AlreadyExists(message, field="name", version=known)
    if declarations.version_of(version) <= declarations.version_of(known):
        message = f"The tool {name} has been {known}: what replaces it needs a higher version than that, not {version}."
        raise errors.AlreadyExists(message, field="version", version=known)


def registered(spec: ToolSpec, digest: str, weight: int = 0) -> Registered:
    """A tool that can be called. Raises `ValueError` when one of its schemas is not valid."""
    try:
        result = None if spec.output_schema is None else schemas.compiled(spec.output_schema)
        validator = schemas.compiled(spec.input_schema)
    except ValueError as error:
        raise ValueError(f"tool {spec.name}: its schema is not valid: {error}") from None
    properties = spec.input_schema.get("properties")
    shown = registration.message(spec, digest)
    return Registered(
        spec, digest, validator, result, shown, shown.ByteSize(),
        haystack=f"{spec.name} {spec.description}".casefold(),
        parameters=frozenset(properties) if isinstance(properties, Mapping) else frozenset(),
        weight=weight,
    )  # fmt: skip


def built_in() -> list[ToolSpec]:
    """The tools that come with Netra."""
    figures = [spend.usage_load, spend.usage_profile, spend.cost_breakdown, spend.spend_opportunities]
    texts = [text.text_statistics, text.text_keywords, model.model]
    return [*texts, *figures, chart.spend_chart, report.spend_report, *code.BUILT_IN, *demo.BUILT_IN]


def installed() -> list[ToolSpec]:
    """The tools that installed packages offer under the entry-point group `netra.tools`. Raises `ValueError` naming what is no tool."""
    return [spec for point in metadata.entry_points(group="netra.tools") for spec in offered(point.name, point.load())]


def offered(name: str, found: Any) -> list[ToolSpec]:
    """The tools in what an entry point leads to: a tool, an object with `arun`, or a list of those. Raises `ValueError`."""
    if isinstance(found, ToolSpec):
        return [found]
    if isinstance(found, list | tuple):
        return [spec for one in found for spec in offered("", one)]
    if hasattr(found, "arun") and not isinstance(found, type):
        return [from_object(found, name=str(getattr(found, "name", "") or name))]
    raise ValueError(f"the entry point {name!r} of netra.tools leads to {found!r}, which is no tool: see netra.tool")
