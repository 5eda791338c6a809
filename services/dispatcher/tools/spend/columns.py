"""Which column of a usage log says what; pure.

The table of names below is the stated mapping. A name matches whatever its case, spaces, `-` and `_`; in nested logs it is the
path with dots, and the wrappers `body`, `response` and `response.body` may stand around it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from netra import errors


class Role(StrEnum):
    """What a column says. `cached` is a part of `input`; `cache_read` and `cache_write` come beside it."""

    TIME = "time"
    INPUT = "input"
    OUTPUT = "output"
    CACHED = "cached"
    CACHE_READ = "cache_read"
    CACHE_WRITE = "cache_write"
    CACHE_WRITE_5M = "cache_write_5m"
    CACHE_WRITE_1H = "cache_write_1h"
    REQUESTS = "requests"
    MODEL = "model"
    USER = "user"


COUNTS = tuple(role for role in Role if role not in (Role.TIME, Role.MODEL, Role.USER))
REQUIRED = (Role.TIME, Role.INPUT, Role.OUTPUT)
# what the normalised log calls it
FIELD = {
    Role.TIME: "time", Role.INPUT: "input_tokens", Role.OUTPUT: "output_tokens", Role.CACHED: "cached_input_tokens",
    Role.CACHE_READ: "cached_input_tokens", Role.CACHE_WRITE: "cache_write_tokens", Role.CACHE_WRITE_5M: "cache_write_5m_tokens",
    Role.CACHE_WRITE_1H: "cache_write_1h_tokens", Role.REQUESTS: "requests", Role.MODEL: "model", Role.USER: "user",
}  # fmt: skip
_ROLE_NAMES = {role.value: role for role in Role} | {field: role for role, field in reversed(FIELD.items())}
_WRAPPERS = ("response.body.", "response.", "body.")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a file: its name as written, the path to it in nested logs, its SQL type; and whether the first rows have it."""

    name: str
    path: tuple[str, ...]
    kind: str = "VARCHAR"
    seen: bool = True


@dataclass(frozen=True, slots=True)
class Style:
    """A log whose columns are known, recognised by `signature`."""

    name: str
    signature: tuple[str, ...]
    roles: Mapping[Role, tuple[str, ...]]
    one_request_per_row: bool = True


@dataclass(frozen=True, slots=True)
class Mapped:
    """What each role is read from; of several columns the first that is not empty counts. Rows may be sums of requests."""

    style: str
    roles: Mapping[Role, tuple[Column, ...]]
    one_request_per_row: bool

    def named(self, *, late: Collection[Role] = ()) -> dict[str, str]:
        """The field of the normalised log and the column of the file it comes from; of unseen columns those of the roles in `late`."""
        names: dict[str, str] = {}
        for role, columns in self.roles.items():
            if shown := [column.name for column in columns if column.seen or role in late]:
                names[FIELD[role]] = " or ".join(shown)
        return names


STYLES = (
    Style("azure-llm-trace", ("timestamp", "context_tokens", "generated_tokens"), {
        Role.TIME: ("timestamp",), Role.INPUT: ("context_tokens",), Role.OUTPUT: ("generated_tokens",),
    }),
    Style("anthropic-usage", ("usage_input_tokens_no_cache", "usage_output_tokens"), {
        Role.TIME: ("usage_date_utc",), Role.MODEL: ("model_version",), Role.USER: ("api_key",),
        Role.INPUT: ("usage_input_tokens_no_cache",), Role.OUTPUT: ("usage_output_tokens",),
        Role.CACHE_READ: ("usage_input_tokens_cache_read",), Role.CACHE_WRITE: ("usage_input_tokens_cache_write",),
        Role.CACHE_WRITE_5M: ("usage_input_tokens_cache_write_5m",), Role.CACHE_WRITE_1H: ("usage_input_tokens_cache_write_1h",),
    }, one_request_per_row=False),
    Style("anthropic-usage", ("uncached_input_tokens", "output_tokens"), {
        Role.TIME: ("starting_at",), Role.MODEL: ("model",), Role.USER: ("api_key_id",),
        Role.INPUT: ("uncached_input_tokens",), Role.OUTPUT: ("output_tokens",), Role.CACHE_READ: ("cache_read_input_tokens",),
        Role.CACHE_WRITE_5M: ("cache_creation.ephemeral_5m_input_tokens",),
        Role.CACHE_WRITE_1H: ("cache_creation.ephemeral_1h_input_tokens",),
    }, one_request_per_row=False),
    Style("openai-usage", ("input_tokens", "output_tokens", "num_model_requests"), {
        Role.TIME: ("start_time", "start_time_iso"), Role.MODEL: ("model",), Role.USER: ("user_id", "api_key_id", "project_id"),
        Role.INPUT: ("input_tokens",), Role.OUTPUT: ("output_tokens",), Role.CACHED: ("input_cached_tokens",),
        Role.REQUESTS: ("num_model_requests",),
    }),
    Style("openai-usage", ("n_context_tokens_total", "n_generated_tokens_total"), {
        Role.TIME: ("timestamp", "aggregation_timestamp"), Role.MODEL: ("model", "snapshot_id"), Role.USER: ("user", "api_key_id"),
        Role.INPUT: ("n_context_tokens_total",), Role.OUTPUT: ("n_generated_tokens_total",),
        Role.CACHED: ("n_cached_context_tokens_total",), Role.REQUESTS: ("n_requests",),
    }),
    Style("openai-usage", ("usage.prompt_tokens", "usage.completion_tokens"), {
        Role.TIME: ("created",), Role.MODEL: ("model",),
        Role.INPUT: ("usage.prompt_tokens",), Role.OUTPUT: ("usage.completion_tokens",),
        Role.CACHED: ("usage.prompt_tokens_details.cached_tokens",),
    }),
    Style("openai-usage", ("usage.input_tokens", "usage.output_tokens", "usage.input_tokens_details.cached_tokens"), {
        Role.TIME: ("created_at",), Role.MODEL: ("model",),
        Role.INPUT: ("usage.input_tokens",), Role.OUTPUT: ("usage.output_tokens",),
        Role.CACHED: ("usage.input_tokens_details.cached_tokens",),
    }),
    Style("anthropic-usage", ("usage.input_tokens", "usage.output_tokens"), {
        Role.MODEL: ("model",), Role.INPUT: ("usage.input_tokens",), Role.OUTPUT: ("usage.output_tokens",),
        # a log of OpenAI's whose first lines do not name their cached tokens is recognised as this one: it is read right too
        Role.CACHED: ("usage.input_tokens_details.cached_tokens",),
        Role.CACHE_READ: ("usage.cache_read_input_tokens",), Role.CACHE_WRITE: ("usage.cache_creation_input_tokens",),
        Role.CACHE_WRITE_1H: ("usage.cache_creation.ephemeral_1h_input_tokens",),
    }),
    Style("anthropic-usage", ("input_tokens", "output_tokens", "cache_read_input_tokens"), {
        Role.MODEL: ("model",), Role.INPUT: ("input_tokens",), Role.OUTPUT: ("output_tokens",),
        Role.CACHE_READ: ("cache_read_input_tokens",), Role.CACHE_WRITE: ("cache_creation_input_tokens",),
    }),
    Style("anthropic-usage", ("input_tokens", "output_tokens", "cache_creation_input_tokens"), {
        Role.MODEL: ("model",), Role.INPUT: ("input_tokens",), Role.OUTPUT: ("output_tokens",),
        Role.CACHE_WRITE: ("cache_creation_input_tokens",),
    }),
)  # fmt: skip
# names of any other log. Names of a group mean the same: two of them in one log are ambiguous; an earlier group goes before a later one
GENERIC: Mapping[Role, tuple[tuple[str, ...], ...]] = {
    Role.TIME: (("time", "timestamp", "@timestamp", "ts", "datetime", "date_time", "request_time", "event_time", "start_time", "logged_at"),
                ("created", "created_at"), ("date", "day")),
    Role.INPUT: (("input_tokens", "prompt_tokens", "context_tokens", "tokens_in", "usage.prompt_tokens", "usage.input_tokens"), ("input",)),
    Role.OUTPUT: (("output_tokens", "completion_tokens", "generated_tokens", "tokens_out",
                   "usage.completion_tokens", "usage.output_tokens"), ("output",)),
    Role.CACHED: (("cached_tokens", "cached_input_tokens", "input_cached_tokens", "cached_prompt_tokens",
                   "prompt_tokens_details.cached_tokens", "input_tokens_details.cached_tokens"),
                  ("cache_read_input_tokens", "cache_read_tokens"), ("cached",)),
    Role.REQUESTS: (("requests", "num_requests", "n_requests", "request_count", "num_model_requests"),),
    Role.MODEL: (("model", "model_name", "model_id"),),
    Role.USER: (("user", "user_id", "user_name", "user_email", "email", "customer", "customer_id"),
                ("api_key", "api_key_id", "key", "key_id", "key_name")),
}  # fmt: skip


def mapped(found: Sequence[Column], overrides: Mapping[str, str], *, late: bool = False) -> Mapped:
    """The columns to read. With `late`, those that only later rows may have are read too, under their usual names.

    Raises `InvalidPayload` naming the role, what was found and how to say what is meant.
    """
    given = _given(found, overrides)
    seen = _by_key(found)
    style = next((style for style in STYLES if all(_key(name) in seen for name in style.signature)), None)
    roles: dict[Role, tuple[Column, ...]] = {}
    for role in Role:
        known = tuple(style.roles.get(role, ())) if style else ()
        columns = given[role] if role in given else _seen(role, known, seen) or (_unseen(role, known, style is None) if late else ())
        if columns:
            roles[role] = columns
    if missing := [role for role in REQUIRED if role not in roles]:
        raise _unusable(missing, found)
    return Mapped(style.name if style else "generic", roles, style.one_request_per_row if style else True)


def _seen(role: Role, known: Sequence[str], seen: Mapping[str, list[Column]]) -> tuple[Column, ...]:
    if there := [seen[_key(name)][0] for name in known if _key(name) in seen]:
        return tuple(there)
    for group in GENERIC.get(role, ()):
        if candidates := [column for name in group for column in seen.get(_key(name), ())]:
            return (_only(role, candidates),)
    return ()


def _unseen(role: Role, known: Sequence[str], generic: bool) -> tuple[Column, ...]:
    if role in REQUIRED:
        return ()
    names = known or [name for group in GENERIC.get(role, ()) for name in group if generic or role in (Role.MODEL, Role.USER)]
    return tuple(Column(name, tuple(name.split(".")), seen=False) for name in names)


def _only(role: Role, candidates: Sequence[Column]) -> Column:
    if len(candidates) == 1:
        return candidates[0]
    names = " and ".join(repr(column.name) for column in candidates)
    raise errors.InvalidPayload(
        f"{names} could each be the {role} of a request. Say which one is meant: inputs.columns = {{{role.value!r}: 'NAME'}}.",
        field=f"columns.{role}", column=candidates[0].name,
    )  # fmt: skip


def _given(found: Sequence[Column], overrides: Mapping[str, str]) -> dict[Role, tuple[Column, ...]]:
    """What the caller says; an empty name says that there is no such column."""
    given: dict[Role, tuple[Column, ...]] = {}
    for name, column in overrides.items():
        if name not in _ROLE_NAMES:
            raise errors.InvalidPayload(f"columns.{name} is not known; name one of {', '.join(Role)}.", field=f"columns.{name}")
        given[_ROLE_NAMES[name]] = (_named(name, column, found),) if column else ()
    return given


def _named(role: str, name: str, found: Sequence[Column]) -> Column:
    exact = [column for column in found if column.name == name]
    alike = exact or [column for column in found if _key(column.name) == _key(name)]
    if len(alike) != 1:
        raise errors.InvalidPayload(
            f"columns.{role} names {name!r}, of which the file has {len(alike)}. It has {_listed(found)}.",
            field=f"columns.{role}",
            column=name,
        )
    return alike[0]


def _by_key(found: Sequence[Column]) -> dict[str, list[Column]]:
    keys: dict[str, list[Column]] = {}
    for column in found:
        keys.setdefault(_key(column.name), []).append(column)
    return keys


def _key(name: str) -> str:
    plain = re.sub(r"[\s_\-]", "", name).lower()
    return next((plain.removeprefix(wrapper) for wrapper in _WRAPPERS if plain.startswith(wrapper)), plain)


def _unusable(missing: Sequence[Role], found: Sequence[Column]) -> errors.InvalidPayload:
    examples = ", ".join(f"{role} ({', '.join(GENERIC[role][0][:4])}, ...)" for role in missing)
    return errors.InvalidPayload(
        f"No usable columns: none of them says {' or '.join(missing)}. Found {_listed(found)}. Needed {examples}. The first line of a CSV "
        f"names its columns; other names can be given: inputs.columns = {{{missing[0].value!r}: 'NAME'}}.",
        field=f"columns.{missing[0]}", line=1,
    )  # fmt: skip


def _listed(found: Sequence[Column]) -> str:
    names = ", ".join(column.name[:64] for column in found[:30])
    return f"{names} and {len(found) - 30} more" if len(found) > 30 else names or "no columns"
