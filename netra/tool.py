"""What a tool is: the @tool decorator and the ToolSpec it produces."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_type_hints

import pydantic

from netra.context import UserExecutionContext

_NAME = re.compile(r"[a-z][a-z0-9_.\-]{0,63}")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
Function = Callable[..., Awaitable[object]]
Backend = Literal["asyncio", "process"]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file of the user's, as the platform keeps it. `size` is in bytes, `sha256` in hex."""

    artifact_id: str
    name: str
    media_type: str
    size: int
    sha256: str


class ToolContext(Protocol):
    """What a call is given beside its arguments: declare one parameter of this type; it is no part of the input schema."""

    @property
    def context(self) -> UserExecutionContext:
        """For whom and in what frame the call is made."""
        ...

    @property
    def workspace(self) -> Path:
        """A folder of this run alone; it is removed when the run has ended."""
        ...

    async def fetch(self, artifact_id: str, to: Path) -> Artifact:
        """Write an artifact of the user to a file. Raises `netra.errors.NotFound`."""
        ...

    async def keep(self, name: str, media_type: str, content: bytes | Path) -> Artifact:
        """Make an artifact of the user. Raises `netra.errors.TooLarge`, `InvalidPayload`."""
        ...


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as the platform knows it. Schemas are JSON Schema 2020-12; times are seconds.

    `backend` says where its work is done: in the process that runs the agents, or in one of its own that can be killed.
    """

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
    context_parameter: str = ""
    backend: Backend = "asyncio"

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
    backend: Backend = "asyncio",
) -> Callable[[Function], ToolSpec]:
    """Make a tool of an async function: name, description and schemas come from its name, docstring and annotations."""

    def declare(function: Function) -> ToolSpec:
        hints = get_type_hints(function, include_extras=True)
        returned = hints.pop("return", None)
        wanted = _context_parameter(hints)
        return ToolSpec(
            name=name or function.__name__,
            version=version,
            description=inspect.getdoc(function) or "",
            input_schema=_input_schema(function, hints, wanted),
            output_schema=None if returned in (None, Any) else pydantic.TypeAdapter(returned).json_schema(),
            function=function,
            tags=tags,
            permission=permission,
            timeout_s=timeout_s,
            side_effects=side_effects,
            idempotent=idempotent,
            context_parameter=wanted,
            backend=backend,
        )

    return declare


def _context_parameter(hints: Mapping[str, Any]) -> str:
    found = [name for name, hint in hints.items() if hint is ToolContext]
    if len(found) > 1:
        raise ValueError(f"declare one parameter of type ToolContext, not {len(found)}: {', '.join(found)}")
    return found[0] if found else ""


def _input_schema(function: Function, hints: Mapping[str, Any], context_parameter: str) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for parameter in inspect.signature(function).parameters.values():
        if parameter.name == context_parameter:
            continue
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        fields[parameter.name] = (hints.get(parameter.name, Any), default)
    model = pydantic.create_model(function.__name__, __config__=pydantic.ConfigDict(extra="forbid"), **fields)
    return model.model_json_schema()
