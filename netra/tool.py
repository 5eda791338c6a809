"""What a tool is: the @tool decorator and the ToolSpec it produces."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

import pydantic

_NAME = re.compile(r"[a-z][a-z0-9_.\-]{0,63}")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
Function = Callable[..., Awaitable[object]]


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as the platform knows it. Schemas are JSON Schema 2020-12; times are seconds."""

    name: str
    version: str
    description: str
    input_schema: Mapping[str, Any]
    output_schema: Mapping[str, Any] | None
    function: Function = field(repr=False)
    tags: tuple[str, ...] = ()
    permission: str = "tools:execute"
    timeout_s: float = 5.0
    side_effects: bool = False
    idempotent: bool = False

    def __post_init__(self) -> None:
        """Raises `ValueError` naming what is wrong with the declaration."""
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"tool name {self.name!r} must match {_NAME.pattern}")
        if not _VERSION.fullmatch(self.version):
            raise ValueError(f"tool {self.name}: version {self.version!r} must be MAJOR.MINOR.PATCH")
        if not inspect.iscoroutinefunction(self.function):
            raise ValueError(f"tool {self.name}: declare the function with `async def`, so that it can be stopped")
        if self.timeout_s <= 0:
            raise ValueError(f"tool {self.name}: timeout_s must be positive")


def tool(
    *,
    name: str | None = None,
    version: str = "1.0.0",
    tags: tuple[str, ...] = (),
    permission: str = "tools:execute",
    timeout_s: float = 5.0,
    side_effects: bool = False,
    idempotent: bool = False,
) -> Callable[[Function], ToolSpec]:
    """Make a tool of an async function: name, description and schemas come from its name, docstring and annotations."""

    def declare(function: Function) -> ToolSpec:
        hints = get_type_hints(function, include_extras=True)
        returned = hints.pop("return", None)
        return ToolSpec(
            name=name or function.__name__,
            version=version,
            description=inspect.getdoc(function) or "",
            input_schema=_input_schema(function, hints),
            output_schema=None if returned in (None, Any) else pydantic.TypeAdapter(returned).json_schema(),
            function=function,
            tags=tags,
            permission=permission,
            timeout_s=timeout_s,
            side_effects=side_effects,
            idempotent=idempotent,
        )

    return declare


def _input_schema(function: Function, hints: Mapping[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[parameter.name] = (hints.get(parameter.name, Any), default)
    model = pydantic.create_model(function.__name__, __config__=pydantic.ConfigDict(extra="forbid"), **fields)
    return model.model_json_schema()
