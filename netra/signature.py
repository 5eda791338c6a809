"""What a function's signature and docstring say of a tool: its description, and the schemas of its arguments and its result; pure."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import pydantic
from docstring_parser import Docstring, ParseError, google
from pydantic.errors import PydanticInvalidForJsonSchema, PydanticSchemaGenerationError, PydanticUserError

_SECTIONS = [section for section in google.DEFAULT_SECTIONS if section.key in ("param", "raises", "returns")]
_UNFIT = (PydanticUserError, PydanticSchemaGenerationError, PydanticInvalidForJsonSchema, NameError, TypeError, ValueError)
_NAMED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


@dataclass(frozen=True, slots=True)
class Described:
    """What was found. `context_parameter` is the one that is given the call's own context; empty when there is none."""

    description: str
    input_schema: dict[str, Any]
    output_schema: dict[str, Any] | None
    context_parameter: str


def described(function: Callable[..., Any], context_type: object, *, open_ended: bool = False) -> Described:
    """Read a function; one that is `open_ended` may take `*args` (never given) and `**kwargs` (any further argument).

    Raises `ValueError` saying what cannot be described.
    """
    try:
        hints = get_type_hints(function, include_extras=True)
    except (NameError, TypeError) as error:
        raise ValueError(f"its annotations cannot be resolved: {error}") from None
    returned = hints.pop("return", None)
    context_parameter = _context_parameter(hints, context_type)
    parameters, more = _parameters(function, context_parameter, open_ended=open_ended)
    text = inspect.getdoc(function) or ""
    parsed = _parsed(text)
    schema = _input_schema(function.__name__, parameters, hints, more=more)
    _explain(schema, parsed, {*parameters, context_parameter})
    # without sections the text stays as it was written
    description = (parsed.description or "") if parsed.meta else text
    return Described(description, schema, _output_schema(returned, parsed), context_parameter)


def _context_parameter(hints: Mapping[str, Any], context_type: object) -> str:
    found = [name for name, hint in hints.items() if hint is context_type]
    if len(found) > 1:
        raise ValueError(f"declare one parameter of type ToolContext, not {len(found)}: {', '.join(found)}")
    return found[0] if found else ""


def _parameters(
    function: Callable[..., Any], context_parameter: str, *, open_ended: bool
) -> tuple[dict[str, inspect.Parameter], bool]:  # fmt: skip
    """Those that become arguments, and whether there may be more."""
    found, more = {}, False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind in _NAMED:
            if parameter.name != context_parameter:
                found[parameter.name] = parameter
        elif not open_ended:
            raise ValueError(f"its parameter {parameter} cannot be given by name: arguments are a JSON object")
        elif parameter.kind is inspect.Parameter.POSITIONAL_ONLY:
            raise ValueError(f"its parameter {parameter.name} can be given by position only: arguments are a JSON object")
        else:
            more = more or parameter.kind is inspect.Parameter.VAR_KEYWORD
    return found, more


def _input_schema(name: str, parameters: Mapping[str, inspect.Parameter], hints: Mapping[str, Any], *, more: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for number, parameter in enumerate(parameters.values()):
        default = ... if parameter.default is inspect.Parameter.empty else parameter.default
        # by its alias a parameter may be called like a method of models, or like nothing that a model could have
        fields[f"p{number}"] = (Annotated[hints.get(parameter.name, Any), pydantic.Field(alias=parameter.name)], default)
    config = pydantic.ConfigDict(extra="allow" if more else "forbid")
    try:
        return pydantic.TypeAdapter(pydantic.create_model(name, __config__=config, **fields)).json_schema(by_alias=True)
    except _UNFIT as error:
        raise ValueError(f"its parameters cannot be described as JSON Schema: {_first_line(error)}") from None


def _output_schema(returned: Any, parsed: Docstring) -> dict[str, Any] | None:
    if returned in (None, Any):
        return None
    try:
        schema = pydantic.TypeAdapter(returned).json_schema()
    except _UNFIT as error:
        raise ValueError(f"its result cannot be described as JSON Schema: {_first_line(error)}") from None
    if parsed.returns is not None and parsed.returns.description:
        schema.setdefault("description", parsed.returns.description)
    return schema


def _parsed(text: str) -> Docstring:
    try:
        return google.GoogleParser(_SECTIONS).parse(text)
    except ParseError as error:
        raise ValueError(f"its docstring is not Google style: {_first_line(error)}") from None


def _explain(schema: dict[str, Any], parsed: Docstring, known: set[str]) -> None:
    """Put what the docstring says of parameters into the schema; what an annotation says comes first."""
    properties = schema.get("properties", {})
    for parameter in parsed.params:
        if parameter.arg_name not in known and not schema.get("additionalProperties"):
            raise ValueError(f"its docstring explains {parameter.arg_name}, which is no parameter")
        if parameter.arg_name in properties and parameter.description:
            properties[parameter.arg_name].setdefault("description", parameter.description)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
