"""What the declaration of a tool must be like; pure."""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Iterator
from typing import Any

# each from the least upwards
ROLES = ("readonly", "user", "admin")
TIERS = ("free", "early", "business", "enterprise", "internal")
ENFORCEMENTS = ("trusted", "script", "python", "command", "remote")
MAX_TIMEOUT_S = 86_400.0
MAX_RETRIES = 10
MAX_CONCURRENCY = 10_000
MAX_DESCRIPTION = 8_192
MAX_LINE = 500
MAX_TAGS = 32
MAX_SECRETS = 32
NAME = re.compile(r"[a-z][a-z0-9_.\-]{0,63}", re.ASCII)
VERSION = re.compile(r"(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})", re.ASCII)
WORD = re.compile(r"[a-z0-9][a-z0-9_.\-]{0,63}", re.ASCII)
PERMISSION = re.compile(r"[a-z_]{1,32}:[a-z_]{1,32}", re.ASCII)
SECRET = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
# a terminal that shows a list must not be steered by it
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
Problems = Iterator[tuple[str, str]]
# a netra.tool.ToolSpec, whose fields hold whatever somebody wrote
Spec = Any


class Misdeclared(ValueError):
    """A tool that cannot be. `field` is the part of its declaration that is wrong."""

    def __init__(self, tool: str, field: str, problem: str) -> None:
        super().__init__(f"tool {tool}: {field} {problem}")
        self.field = field


def version_of(text: str) -> tuple[int, int, int]:
    """A version as it is ordered: MAJOR, MINOR, PATCH. Raises `ValueError`."""
    found = VERSION.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is not MAJOR.MINOR.PATCH")
    return int(found[1]), int(found[2]), int(found[3])


def problems(spec: Spec) -> Problems:
    """What is wrong with a declaration: the field and what it must be."""
    yield from _naming(spec)
    yield from _schemas(spec)
    yield from _access(spec)
    yield from _running(spec)
    yield from _effects(spec)
    yield from _function(spec)


def _naming(spec: Spec) -> Problems:
    if not _fits(NAME, spec.name):
        yield "name", f"must match {NAME.pattern}"
    if not _fits(VERSION, spec.version):
        yield "version", f"must be MAJOR.MINOR.PATCH, not {spec.version!r}"
    if not isinstance(spec.description, str) or len(spec.description) > MAX_DESCRIPTION or _CONTROL.search(spec.description):
        yield "description", f"must be a text of at most {MAX_DESCRIPTION} characters, without control characters"
    if spec.category != "" and not _fits(WORD, spec.category):
        yield "category", f"must match {WORD.pattern}"
    if not _words(spec.tags, WORD, MAX_TAGS):
        yield "tags", f"must be a tuple of at most {MAX_TAGS} different words that match {WORD.pattern}"
    if not isinstance(spec.deprecated, str) or len(spec.deprecated) > MAX_LINE or not spec.deprecated.isprintable():
        yield "deprecated", f"must be one line of at most {MAX_LINE} characters that says what to use instead"


def _schemas(spec: Spec) -> Problems:
    for field, schema in (("input_schema", spec.input_schema), ("output_schema", spec.output_schema)):
        try:
            json.dumps(schema, allow_nan=False, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            yield field, f"must be JSON: {error}"


def _access(spec: Spec) -> Problems:
    if not _fits(PERMISSION, spec.permission):
        yield "permission", "must be a name like data:read"
    if spec.min_role not in ("", *ROLES):
        yield "min_role", f"must be one of {', '.join(ROLES)}"
    if spec.min_tier not in ("", *TIERS):
        yield "min_tier", f"must be one of {', '.join(TIERS)}"
    if not _words(spec.secrets, SECRET, MAX_SECRETS):
        yield "secrets", f"must be a tuple of at most {MAX_SECRETS} different names that match {SECRET.pattern}"


def _running(spec: Spec) -> Problems:
    if spec.enforcement not in ENFORCEMENTS:
        yield "enforcement", f"must be one of {', '.join(ENFORCEMENTS)}"
    if not _number(spec.timeout_s) or not 0 < spec.timeout_s <= MAX_TIMEOUT_S:
        yield "timeout_s", f"must be positive and at most {MAX_TIMEOUT_S:g}"
    if not _count(spec.retries, MAX_RETRIES):
        yield "retries", f"must be a whole number from 0 to {MAX_RETRIES}"
    if not _count(spec.concurrency, MAX_CONCURRENCY):
        yield "concurrency", f"must be a whole number from 0 to {MAX_CONCURRENCY}"
    if spec.fallback != "" and not _fits(NAME, spec.fallback):
        yield "fallback", f"must be the name of a tool: {NAME.pattern}"
    if spec.fallback == spec.name:
        yield "fallback", "must be another tool"


def _effects(spec: Spec) -> Problems:
    for field in ("side_effects", "idempotent"):
        if not isinstance(getattr(spec, field), bool):
            yield field, "must be True or False"
    if spec.retries and not spec.idempotent:
        yield "retries", "must be 0 unless the tool is idempotent: a repeated call could do twice what it does"
    if spec.reconcile is not None:
        if not inspect.iscoroutinefunction(spec.reconcile):
            yield "reconcile", "must be an `async def (context, arguments)`"
        if not spec.side_effects:
            yield "reconcile", "is of no use without side_effects: nothing is left to be found out"


def _function(spec: Spec) -> Problems:
    if inspect.iscoroutinefunction(spec.function):
        if spec.backend not in ("asyncio", "process"):
            yield "backend", "must be asyncio or process for an `async def`"
        return
    if not inspect.isfunction(spec.function) or inspect.isgeneratorfunction(spec.function) or inspect.isasyncgenfunction(spec.function):
        yield "function", "must be a function that returns its result: an `async def`, or a plain `def`"
        return
    if spec.enforcement not in ("trusted", "python"):
        yield "function", f"must be an `async def` that uses ToolContext.contained to reach the tier {spec.enforcement}"
    if spec.backend != ("worker" if spec.enforcement == "trusted" else "sandbox"):
        yield "backend", "must be worker for a plain `def` that is trusted, sandbox for one of the tier python"
    if spec.context_parameter:
        yield "function", "must be an `async def` to be given a ToolContext: a plain one runs in another process"
    if "." in spec.function.__qualname__ or spec.function.__name__ == "<lambda>" or spec.function.__module__ == "__main__":
        yield "function", "must stand at the top of a module, where another process can import it by name; or be an `async def`"


def _fits(form: re.Pattern[str], text: Any) -> bool:
    return isinstance(text, str) and form.fullmatch(text) is not None


def _words(value: Any, form: re.Pattern[str], most: int) -> bool:
    return isinstance(value, tuple) and len(value) <= most and all(_fits(form, one) for one in value) and len(set(value)) == len(value)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most
