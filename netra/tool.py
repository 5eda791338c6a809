"""What a tool is: the @tool decorator, objects as tools, and the ToolSpec they produce."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypedDict, Unpack

from netra import declarations, signature
from netra.context import UserExecutionContext
from netra.declarations import Misdeclared

Function = Callable[..., Any]
Backend = Literal["asyncio", "process", "worker", "sandbox"]
Tier = Literal["trusted", "script", "python", "command", "remote"]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


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

    @property
    def effect_key(self) -> str:
        """Stays the same over all attempts of this call: the idempotency key for whatever is changed outside."""
        ...

    async def fetch(self, artifact_id: str, to: Path) -> Artifact:
        """Write an artifact of the user to a file. Raises `netra.errors.NotFound`."""
        ...

    async def keep(self, name: str, media_type: str, content: bytes | Path) -> Artifact:
        """Make an artifact of the user. Raises `netra.errors.TooLarge`, `InvalidPayload`."""
        ...

    async def contained(
        self, *, code: str = "", argv: Sequence[str] = (), arguments: Mapping[str, Any] = _NOTHING,
        files: Mapping[str, bytes | Path] = _NOTHING,
    ) -> Any:  # fmt: skip
        """Run foreign code in the tier that the tool declares, and return its result: `code`, or the command `argv`.

        It gets `arguments` (JSON), `files` by name in its own folder, the tool's secrets, and what is left of the call's time. Raises
        `netra.errors.ToolFailed`, `DeadlineExceeded`, `ResourceExhausted`, `SecurityViolation`, `SandboxUnavailable`.
        """
        ...

    def progress(self, fraction: float, message: str = "") -> None:
        """Show how much is done, 0 to 1, to those who watch; it is not kept, and may be dropped."""
        ...

    def secret(self, name: str) -> str:
        """A secret that was granted to the tool. Raises `netra.errors.PermissionDenied` for one that it does not declare."""
        ...


@dataclass(frozen=True, slots=True)
class Settled:
    """What `reconcile` found out about a call that may have been made or not: with its result when it was `done`."""

    done: bool
    result: object = None


Reconcile = Callable[[ToolContext, Mapping[str, Any]], Awaitable[Settled | None]]


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as the platform knows it. Schemas are JSON Schema 2020-12; times are seconds.

    It is called by those who have its `permission`, a role from `min_role` upwards and a tier from `min_tier` upwards (both may be
    empty). `enforcement` is the tier that contains it, `backend` where its own function runs: in the process that runs the agents
    (`asyncio`), there but with a process of its own for the work (`process`), in a warm process that can be killed (`worker`), or as
    a whole in its tier (`sandbox`). `retries` is how often a call that failed in a way that may pass is made again; `concurrency` how
    many calls one dispatcher makes at a time (0: as many as come); `fallback` the tool that answers when this one cannot; `deprecated`
    what to use instead; `secrets` the names of what it may read. `reconcile` is asked what became of a call that was cut off.
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
    category: str = ""
    min_role: str = ""
    min_tier: str = ""
    enforcement: Tier = "trusted"
    retries: int = 0
    reconcile: Reconcile | None = field(default=None, repr=False)
    concurrency: int = 0
    fallback: str = ""
    deprecated: str = ""
    secrets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises `Misdeclared`, a `ValueError` naming the first field that is wrong and what it must be."""
        for name, problem in declarations.problems(self):
            raise Misdeclared(self.name, name, problem)

    def __call__(self, *args: Any, **arguments: Any) -> Any:
        """Call the function itself: no check, no permission, no sandbox. For its own module, and where it is contained already."""
        return self.function(*args, **arguments)

    @property
    def asynchronous(self) -> bool:
        """Whether the function is awaited; a plain one is imported by name in another process."""
        return inspect.iscoroutinefunction(self.function)

    def declaration(self) -> dict[str, Any]:
        """Everything that is declared, as JSON: not the functions, nor how they are run."""
        return {
            "name": self.name, "version": self.version, "description": self.description,
            "input_schema": self.input_schema, "output_schema": self.output_schema,
            "tags": list(self.tags), "category": self.category,
            "permission": self.permission, "min_role": self.min_role, "min_tier": self.min_tier,
            "enforcement": self.enforcement, "timeout_s": float(self.timeout_s), "retries": self.retries, "concurrency": self.concurrency,
            "side_effects": self.side_effects, "idempotent": self.idempotent, "reconciles": self.reconcile is not None,
            "fallback": self.fallback, "deprecated": self.deprecated, "secrets": list(self.secrets),
        }  # fmt: skip

    @property
    def digest(self) -> str:
        """SHA-256, in hex, of the declaration in its one form: two tools that declare the same have the same."""
        text = json.dumps(self.declaration(), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


class Options(TypedDict, total=False):
    """What both ways of declaring a tool take; as the fields of `ToolSpec`."""

    version: str
    tags: tuple[str, ...]
    category: str
    permission: str
    min_role: str
    min_tier: str
    enforcement: Tier
    timeout_s: float
    retries: int
    side_effects: bool
    idempotent: bool
    reconcile: Reconcile | None
    concurrency: int
    fallback: str
    deprecated: str
    secrets: tuple[str, ...]


def tool(*, name: str | None = None, backend: Backend | None = None, **options: Unpack[Options]) -> Callable[[Function], ToolSpec]:
    """Make a tool of a function: name, description and schemas come from its name, docstring (Google style) and annotations.

    An `async def` runs in the process of the agents; a plain `def` in a warm process of its own or, with `enforcement="python"`, in the
    sandbox: so it must stand at the top of a module that can be imported. Raises `Misdeclared`, a `ValueError`.
    """

    def declare(function: Function) -> ToolSpec:
        called = name or str(getattr(function, "__name__", "?"))
        found = _described(called, function)
        return _spec(called, function, found, backend or _backend(function, options.get("enforcement", "trusted")), options)

    return declare


def from_object(
    thing: Any, *, name: str = "", description: str = "", input_schema: Mapping[str, Any] | None = None, **options: Unpack[Options]
) -> ToolSpec:
    """Make a tool of an object with `async def arun(*args, **kwargs)`; arguments are given by name.

    Name and description are the object's own (`name`, `description`, else its docstrings) where they are not given here. The schema
    comes from the annotations of `arun`; `**kwargs` takes anything. All users share the object: it must keep nothing of a call.
    Raises `Misdeclared`, a `ValueError`.
    """
    called = name or str(getattr(thing, "name", "") or type(thing).__name__)
    run = getattr(thing, "arun", None)
    if isinstance(thing, type) or not inspect.iscoroutinefunction(run):
        raise Misdeclared(called, "function", "must be an object with `async def arun(*args, **kwargs)`")
    found = _described(called, run, open_ended=True)
    told = description or _said(thing) or found.description

    async def arun(**arguments: Any) -> object:
        return await run(**arguments)

    schema = found.input_schema if input_schema is None else dict(input_schema)
    read = signature.Described(told, schema, found.output_schema, found.context_parameter)
    return _spec(called, arun, read, "asyncio", options)


def _said(thing: Any) -> str:
    own = getattr(thing, "description", "")
    return own if isinstance(own, str) and own else inspect.cleandoc(type(thing).__doc__ or "")


def _described(name: str, function: Function, *, open_ended: bool = False) -> signature.Described:
    try:
        return signature.described(function, ToolContext, open_ended=open_ended)
    except ValueError as error:
        raise Misdeclared(name, "function", f"cannot be a tool: {error}") from None


def _backend(function: Function, enforcement: str) -> Backend:
    if inspect.iscoroutinefunction(function):
        return "asyncio"
    return "worker" if enforcement == "trusted" else "sandbox"


def _spec(name: str, function: Function, found: signature.Described, backend: Backend, options: Options) -> ToolSpec:
    declared: dict[str, Any] = {"version": "1.0.0", **options}
    return ToolSpec(
        name=name, description=found.description, input_schema=found.input_schema, output_schema=found.output_schema, function=function,
        context_parameter=found.context_parameter, backend=backend, **declared,
    )  # fmt: skip
