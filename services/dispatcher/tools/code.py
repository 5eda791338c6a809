"""run_script, run_python, run_command: code that comes with the call, contained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Protocol, cast

import orjson
from pydantic import Field
from typing_extensions import TypedDict

from netra.tool import ToolContext, tool
from services.dispatcher.tools.sandbox import tiers

_TIMEOUT_S = 30.0
_MAX_CODE, _MAX_WORDS, _MAX_FILES = 64 * 1024, 64, 16
Arguments = Annotated[dict[str, Any] | None, Field(description="Values by name; a script and a program find them as variables.")]
Files = Annotated[
    dict[Annotated[str, Field(max_length=200)], Annotated[str, Field(max_length=64 * 1024)]] | None,
    Field(max_length=_MAX_FILES, description="Texts by file name, put into the folder that it runs in."),
]
Code = Annotated[str, Field(min_length=1, max_length=_MAX_CODE)]


class _Contains(Protocol):
    """What runs code, and tells what it printed as well."""

    async def ran(
        self, *, code: str = "", argv: Sequence[str] = (), arguments: Mapping[str, Any], files: Mapping[str, bytes]
    ) -> tiers.Ended:
        """See `provided.Provided.ran`."""
        ...


class Ran(TypedDict):
    """What code came to: its result, what it printed, and whether that was cut."""

    result: Any
    output: str
    cut: bool


@tool(tags=("code",), category="code", enforcement="script", timeout_s=_TIMEOUT_S, idempotent=True)
async def run_script(context: ToolContext, code: Code, arguments: Arguments = None, files: Files = None) -> Ran:
    """Runs a small script in a subset of Python, without any access to files, the network or processes; ready in a millisecond.

    Args:
        code: The script; the value of its last expression is the result.
        arguments: Values by name; the script finds them as variables.
        files: Texts by file name.
    """
    return _told(await _given(context).ran(code=code, arguments=arguments or {}, files=_texts(files)))


@tool(tags=("code",), category="code", enforcement="python", timeout_s=_TIMEOUT_S, idempotent=True)
async def run_python(context: ToolContext, code: Code, arguments: Arguments = None, files: Files = None) -> Ran:
    """Runs a Python program in a fresh process that can reach neither the network nor anything but its own folder.

    Args:
        code: The program; its variable `result`, else the value of its last expression, is the result.
        arguments: Values by name; the program finds them as variables.
        files: Texts by file name, in the folder that it runs in.
    """
    return _told(await _given(context).ran(code=code, arguments=arguments or {}, files=_texts(files)))


@tool(tags=("code",), category="code", enforcement="command", timeout_s=_TIMEOUT_S, idempotent=True)
async def run_command(
    context: ToolContext, argv: Annotated[list[Annotated[str, Field(max_length=4096)]], Field(min_length=1, max_length=_MAX_WORDS)],
    arguments: Arguments = None, files: Files = None,
) -> Ran:  # fmt: skip
    """Runs a program of the system in namespaces of its own: no network, nothing to write to but its own folder.

    Args:
        argv: The program and its words; no shell reads them.
        arguments: Values by name; they come as JSON on standard input.
        files: Texts by file name, in the folder that it runs in.

    Returns:
        What it wrote to standard output (as JSON where it is that) as `result`, and to standard error as `output`.
    """
    return _told(await _given(context).ran(argv=argv, arguments=arguments or {}, files=_texts(files)))


def _given(context: ToolContext) -> _Contains:
    # these come with the dispatcher, and use more of it than what tools are promised
    return cast(_Contains, context)


def _texts(files: dict[str, str] | None) -> dict[str, bytes]:
    return {name: text.encode() for name, text in (files or {}).items()}


def _told(ended: tiers.Ended) -> Ran:
    return Ran(result=orjson.loads(ended.result), output=ended.output, cut=ended.cut)


BUILT_IN = [run_script, run_python, run_command]
