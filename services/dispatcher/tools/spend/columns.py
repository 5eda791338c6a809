"""Which column of a usage log says what; pure.

The table of names below is the stated mapping. A name matches whatever its case, spaces, `-` and `_`; in nested logs it is the
path with dots, and the wrappers `body`, `response` and `response.body` may stand around it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from netra import errors


class Role(StrEnum):
    """What a column says. `cached` and `written` are parts of `input`; `cache_read` and `cache_write` come beside it."""

    TIME = "time"
    INPUT = "input"
    OUTPUT = "output"
    CACHED = "cached"
    WRITTEN = "written"
    CACHE_READ = "cache_read"
    CACHE_WRITE = "cache_write"
    CACHE_WRITE_5M = "cache_write_5m"
    CACHE_WRITE_1H = "cache_write_1h"
    INPUT_AUDIO = "input_audio"
    CACHED_AUDIO = "cached_audio"
    OUTPUT_AUDIO = "output_audio"
    WEB_SEARCHES = "web_searches"
    REQUESTS = "requests"
    END = "end"
    MODEL = "model"
    USER = "user"
    TIER = "service_tier"
    BATCH = "batch"
    SPEED = "speed"
    BATCH_ID = "batch_id"


TIMES = (Role.TIME, Role.END)
TEXTS = (Role.MODEL, Role.USER, Role.TIER)
COUNTS = (
    Role.INPUT, Role.OUTPUT, Role.CACHED, Role.WRITTEN, Role.CACHE_READ, Role.CACHE_WRITE, Role.CACHE_WRITE_5M, Role.CACHE_WRITE_1H,
    Role.INPUT_AUDIO, Role.CACHED_AUDIO, Role.OUTPUT_AUDIO, Role.WEB_SEARCHES, Role.REQUESTS,
)  # fmt: skip
REQUIRED = (Role.TIME, Role.INPUT, Role.OUTPUT)
BESIDE = (Role.CACHE_READ, Role.CACHE_WRITE, Role.CACHE_WRITE_5M, Role.CACHE_WRITE_1H)
# what the normalised log calls it
FIELD = {
    Role.TIME: "time", Role.END: "end", Role.INPUT: "input_tokens", Role.OUTPUT: "output_tokens", Role.CACHED: "cached_input_tokens",
    Role.CACHE_READ: "cached_input_tokens", Role.CACHE_WRITE: "cache_write_tokens", Role.WRITTEN: "cache_write_tokens",
    Role.CACHE_WRITE_5M: "cache_write_5m_tokens", Role.CACHE_WRITE_1H: "cache_write_1h_tokens", Role.INPUT_AUDIO: "input_audio_tokens",
    Role.CACHED_AUDIO: "cached_audio_tokens", Role.OUTPUT_AUDIO: "output_audio_tokens", Role.WEB_SEARCHES: "web_searches",
    Role.REQUESTS: "requests", Role.MODEL: "model", Role.USER: "user", Role.TIER: "service_tier", Role.BATCH: "batch",
    Role.SPEED: "speed", Role.BATCH_ID: "batch_id",
}  # fmt: skip
_ROLE_NAMES = {role.value: role for role in Role} | {field: role for role, field in reversed(FIELD.items())}
_WRAPPERS = ("response.body.", "response.", "body.")
# a line of a provider's batch output: its wrapper, and what names the request of the batch
_BATCH_OUTPUT = ("response.body.", "custom_id")
PAGE = "jq -c '(.data // [.])[] | del(.results) + .results[]' page.json > log.jsonl"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a file: its name as written, the path to it in nested logs, its SQL type."""

    name: str
    path: tuple[str, ...]
    kind: str = "VARCHAR"


@dataclass(frozen=True, slots=True)
class Style:
    """A log whose columns are known: it has all of `signature` and, where there are any, one of `either`."""

    name: str
    signature: tuple[str, ...]
    roles: Mapping[Role, tuple[str, ...]]
    either: tuple[str, ...] = ()
    one_request_per_row: bool = True


@dataclass(frozen=True, slots=True)
class Mapped:
    """What each role is read from; of several columns the first that is not empty counts. Rows may be sums of requests."""

    style: str
    roles: Mapping[Role, tuple[Column, ...]]
    one_request_per_row: bool

    def named(self) -> dict[str, str]:
        """The field of the normalised log and the column of the file it comes from."""
        names: dict[str, list[str]] = {}
        for role, columns in self.roles.items():
            names.setdefault(FIELD[role], []).extend(column.name for column in columns)
        return {field: " or ".join(found) for field, found in names.items()}


# the usage of an answer as its interface gives it: OpenAI's and Anthropic's names differ, so that one log may have both
_ANSWER: Mapping[Role, tuple[str, ...]] = {
    Role.MODEL: ("model",), Role.INPUT: ("usage.input_tokens",), Role.OUTPUT: ("usage.output_tokens",),
    Role.CACHED: ("usage.input_tokens_details.cached_tokens", "usage.input_token_details.cached_tokens"),
    Role.WRITTEN: ("usage.input_tokens_details.cache_write_tokens",),
    Role.CACHE_READ: ("usage.cache_read_input_tokens",),
    Role.CACHE_WRITE: ("usage.cache_creation_input_tokens", "usage.cache_write_input_tokens"),
    Role.CACHE_WRITE_5M: ("usage.cache_creation.ephemeral_5m_input_tokens",),
    Role.CACHE_WRITE_1H: ("usage.cache_creation.ephemeral_1h_input_tokens",),
    Role.INPUT_AUDIO: ("usage.input_tokens_details.audio_tokens", "usage.input_token_details.audio_tokens"),
    Role.CACHED_AUDIO: ("usage.input_token_details.cached_tokens_details.audio_tokens",),
    Role.OUTPUT_AUDIO: ("usage.output_tokens_details.audio_tokens", "usage.output_token_details.audio_tokens"),
    Role.WEB_SEARCHES: ("usage.server_tool_use.web_search_requests",),
    Role.TIER: ("service_tier", "usage.service_tier"), Role.SPEED: ("usage.speed",),
}  # fmt: skip
_LASTING: Mapping[Role, tuple[str, ...]] = {
    Role.CACHE_WRITE_5M: ("cache_creation.ephemeral_5m_input_tokens", "cache_creation_ephemeral_5m_input_tokens"),
    Role.CACHE_WRITE_1H: ("cache_creation.ephemeral_1h_input_tokens", "cache_creation_ephemeral_1h_input_tokens"),
    Role.SPEED: ("speed",),
}
STYLES = (
    Style("azure-llm-trace", ("timestamp", "context_tokens", "generated_tokens"), {
        Role.TIME: ("timestamp",), Role.INPUT: ("context_tokens",), Role.OUTPUT: ("generated_tokens",),
    }),
    Style("anthropic-usage", ("usage_input_tokens_no_cache", "usage_output_tokens"), {
        Role.TIME: ("usage_date_utc",), Role.MODEL: ("model_version",), Role.USER: ("api_key",),
        Role.INPUT: ("usage_input_tokens_no_cache",), Role.OUTPUT: ("usage_output_tokens",),
        Role.CACHE_READ: ("usage_input_tokens_cache_read",), Role.CACHE_WRITE: ("usage_input_tokens_cache_write",),
        Role.CACHE_WRITE_5M: ("usage_input_tokens_cache_write_5m",), Role.CACHE_WRITE_1H: ("usage_input_tokens_cache_write_1h",),
        Role.BATCH: ("usage_type",),
    }, one_request_per_row=False),
    Style("anthropic-usage", ("uncached_input_tokens", "output_tokens"), {
        Role.TIME: ("starting_at",), Role.END: ("ending_at",), Role.MODEL: ("model",), Role.USER: ("api_key_id",),
        Role.INPUT: ("uncached_input_tokens",), Role.OUTPUT: ("output_tokens",), Role.CACHE_READ: ("cache_read_input_tokens",), **_LASTING,
    }, one_request_per_row=False),
    Style("openai-usage", ("input_tokens", "output_tokens", "num_model_requests"), {
        Role.TIME: ("start_time", "start_time_iso"), Role.END: ("end_time", "end_time_iso"), Role.MODEL: ("model",),
        Role.USER: ("user_id", "api_key_id", "project_id"), Role.INPUT: ("input_tokens",), Role.OUTPUT: ("output_tokens",),
        Role.CACHED: ("input_cached_tokens",), Role.WRITTEN: ("input_cache_write_tokens",),
        Role.CACHED_AUDIO: ("input_cached_audio_tokens",), Role.REQUESTS: ("num_model_requests",),
    }, one_request_per_row=False),
    Style("openai-usage", ("n_context_tokens_total", "n_generated_tokens_total"), {
        Role.TIME: ("timestamp", "aggregation_timestamp"), Role.MODEL: ("model", "snapshot_id"), Role.USER: ("user", "api_key_id"),
        Role.INPUT: ("n_context_tokens_total",), Role.OUTPUT: ("n_generated_tokens_total",),
        Role.CACHED: ("n_cached_context_tokens_total",), Role.REQUESTS: ("n_requests",),
    }, one_request_per_row=False),
    Style("openai-usage", ("usage.prompt_tokens", "usage.completion_tokens"), {
        Role.TIME: ("created", "timestamp"), Role.MODEL: ("model",),
        Role.INPUT: ("usage.prompt_tokens",), Role.OUTPUT: ("usage.completion_tokens",),
        Role.CACHED: ("usage.prompt_tokens_details.cached_tokens", "usage.cache_read_input_tokens", "usage.prompt_cache_hit_tokens"),
        # LiteLLM counts what is written to a cache as a part of the prompt, OpenAI does too
        Role.WRITTEN: ("usage.cache_creation_input_tokens", "usage.prompt_tokens_details.cache_write_tokens",
                       "usage.prompt_tokens_details.cache_creation_tokens"),
        Role.CACHE_WRITE_1H: ("usage.prompt_tokens_details.cache_creation_token_details.ephemeral_1h_input_tokens",
                              "usage.cache_creation.ephemeral_1h_input_tokens"),
        Role.INPUT_AUDIO: ("usage.prompt_tokens_details.audio_tokens",),
        Role.OUTPUT_AUDIO: ("usage.completion_tokens_details.audio_tokens",),
        Role.WEB_SEARCHES: ("usage.server_tool_use.web_search_requests",),
        Role.TIER: ("service_tier", "usage.service_tier"), Role.SPEED: ("usage.speed",),
    }),
    Style("openai-usage", ("usage.input_tokens", "usage.output_tokens"), {Role.TIME: ("created_at", "timestamp"), **_ANSWER},
          either=("usage.input_tokens_details.cached_tokens", "usage.input_token_details.cached_tokens")),
    Style("anthropic-usage", ("usage.input_tokens", "usage.output_tokens"), _ANSWER),
    Style("anthropic-usage", ("input_tokens", "output_tokens"), {
        Role.MODEL: ("model",), Role.INPUT: ("input_tokens",), Role.OUTPUT: ("output_tokens",),
        Role.CACHE_READ: ("cache_read_input_tokens",), Role.CACHE_WRITE: ("cache_creation_input_tokens", "cache_write_input_tokens"),
        **_LASTING,
    }, either=("cache_read_input_tokens", "cache_creation_input_tokens", *_LASTING[Role.CACHE_WRITE_5M], *_LASTING[Role.CACHE_WRITE_1H])),
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
    Role.WRITTEN: (("cache_creation_input_tokens", "cache_creation_tokens", "cache_write_input_tokens", "cache_write_tokens",
                    "prompt_tokens_details.cache_write_tokens", "input_tokens_details.cache_write_tokens"),),
    Role.INPUT_AUDIO: (("input_audio_tokens", "prompt_tokens_details.audio_tokens", "input_tokens_details.audio_tokens"),),
    Role.OUTPUT_AUDIO: (("output_audio_tokens", "completion_tokens_details.audio_tokens", "output_tokens_details.audio_tokens"),),
    Role.WEB_SEARCHES: (("web_searches", "web_search_count", "web_search_requests", "server_tool_use.web_search_requests"),),
    Role.REQUESTS: (("requests", "num_requests", "n_requests", "request_count", "num_model_requests"),),
    Role.MODEL: (("model", "model_name", "model_id"),),
    Role.USER: (("user", "user_id", "user_name", "user_email", "email", "customer", "customer_id"),
                ("api_key", "api_key_id", "key", "key_id", "key_name")),
    Role.TIER: (("service_tier",),),
    Role.BATCH: (("batch", "is_batch"),),
}  # fmt: skip


def mapped(found: Sequence[Column], overrides: Mapping[str, str], *, line: int = 1) -> Mapped:
    """The columns to read. `line` is that which names them; 0: no line does.

    Raises `InvalidPayload` naming the role, what was found and how to say what is meant.
    """
    given = _given(found, overrides)
    keys, free = _by_key(found), _by_key(_unused(found, given))
    style = next((style for style in STYLES if _is(style, keys)), None)
    roles = {role: columns for role, columns in given.items() if columns}
    known = style.roles if style else {}
    home = _home(known.get(Role.INPUT, ()), free, roles)
    for role in Role:
        if role not in given and (columns := _known(role, known.get(role, ()), free, home)):
            roles[role] = columns
    free = _by_key(_unused(found, roles))
    for role in Role:
        if role not in given and role not in roles and (columns := _generic(role, free, home)):
            _fill(roles, role, columns, given)
    if home == _BATCH_OUTPUT[0] and Role.BATCH_ID not in given and (columns := tuple(free.get(_key(_BATCH_OUTPUT[1]), ()))):
        roles[Role.BATCH_ID] = columns[:1]
    if missing := [role for role in REQUIRED if role not in roles]:
        raise _unusable(missing, found, line)
    return Mapped(
        style.name if style else "generic", {role: roles[role] for role in Role if role in roles}, not style or style.one_request_per_row
    )


def later(found: Sequence[Column], mapped_: Mapped) -> tuple[Column, ...]:
    """What would change the mapping if later rows of a nested log had it: columns of the usual names, where those seen stand."""
    keys = _by_key(found)
    names: dict[str, None] = {}
    for style in STYLES:
        if all(_key(name) in keys for role in (Role.INPUT, Role.OUTPUT) for name in style.roles[role]):
            names.update(dict.fromkeys(name for role, known in style.roles.items() if role not in REQUIRED for name in known))
    for role, groups in GENERIC.items():
        if role not in mapped_.roles:
            names.update(dict.fromkeys(name for group in groups for name in group))
    (of, *_) = mapped_.roles[Role.INPUT]
    return tuple(column for name in names if _key(name) not in keys for column in _placed(name, of))


def _placed(name: str, of: Column) -> Iterator[Column]:
    """The column of this name beside another one, and outside of what stands around that one."""
    above = ".".join(of.name.split(".")[: _wrapper(of).count(".")])
    for full in dict.fromkeys((f"{above}.{name}" if above else name, name)):
        flat = len(of.path) == 1 and "." in of.name
        yield Column(full, (full,) if flat else tuple(full.split(".")))


def _unused(found: Sequence[Column], roles: Mapping[Role, tuple[Column, ...]]) -> list[Column]:
    used = {column for columns in roles.values() for column in columns}
    return [column for column in found if column not in used]


def _is(style: Style, keys: Collection[str]) -> bool:
    return all(_key(name) in keys for name in style.signature) and (not style.either or any(_key(name) in keys for name in style.either))


def _home(known: Sequence[str], free: Mapping[str, list[Column]], roles: Mapping[Role, tuple[Column, ...]]) -> str:
    """What stands around the tokens."""
    columns = roles.get(Role.INPUT) or _known(Role.INPUT, known, free, "") or _generic(Role.INPUT, free, "")
    if len(columns) > 1:
        raise _ambiguous(Role.INPUT, columns)
    return _wrapper(columns[0]) if columns else ""


def _known(role: Role, names: Sequence[str], free: Mapping[str, list[Column]], home: str) -> tuple[Column, ...]:
    return tuple(column for name in names for column in _ordered(role, free.get(_key(name), ()), home))


def _generic(role: Role, free: Mapping[str, list[Column]], home: str) -> tuple[Column, ...]:
    for group in GENERIC.get(role, ()):
        if there := [(name, free[_key(name)]) for name in group if _key(name) in free]:
            if len(there) > 1:
                raise _ambiguous(role, [column for _, columns in there for column in columns])
            return _ordered(role, there[0][1], home)
    return ()


def _fill(roles: dict[Role, tuple[Column, ...]], role: Role, columns: tuple[Column, ...], given: Collection[Role]) -> None:
    """Take what any log may call a role, unless it would be counted twice: a log counts its cache beside the input or in it, not both."""
    beside = [other for other in BESIDE if other in roles]
    if role is Role.CACHED and Role.CACHE_READ in roles:
        certain = {_key(name) for name in GENERIC[role][0]}
        if Role.CACHE_READ not in given and _key(columns[0].name) in certain:
            raise _twice(roles[Role.CACHE_READ][0], columns[0])
    elif role is Role.WRITTEN and beside:
        if not {Role.CACHE_WRITE, Role.CACHE_WRITE_5M, Role.CACHE_WRITE_1H} & {*roles, *given}:
            roles[Role.CACHE_WRITE] = columns
    else:
        roles[role] = columns


def _ordered(role: Role, columns: Sequence[Column], home: str) -> tuple[Column, ...]:
    """Columns of one name: that which stands beside the tokens first. Two at the same place are ambiguous."""
    if len({_wrapper(column) for column in columns}) < len(columns):
        raise _ambiguous(role, columns)
    return tuple(sorted(columns, key=lambda column: _wrapper(column) != home))


def _ambiguous(role: Role, candidates: Sequence[Column]) -> errors.InvalidPayload:
    names = " and ".join(repr(column.name) for column in candidates)
    return errors.InvalidPayload(
        f"{names} could each be the {role} of a request. Say which one is meant: inputs.columns = {{{role.value!r}: 'NAME'}}.",
        field=f"columns.{role}", column=candidates[0].name,
    )  # fmt: skip


def _twice(read: Column, cached: Column) -> errors.InvalidPayload:
    return errors.InvalidPayload(
        f"{read.name!r} and {cached.name!r} both tell of tokens from a cache. If they say the same, inputs.columns = {{'cached': ''}} reads"
        f" {read.name!r} alone; if each row has one of them, {{'cached': {cached.name!r}}} reads both.",
        field="columns.cached", column=cached.name,
    )  # fmt: skip


def _given(found: Sequence[Column], overrides: Mapping[str, str]) -> dict[Role, tuple[Column, ...]]:
    """What the caller says; an empty name says that there is no such column."""
    given: dict[Role, tuple[Column, ...]] = {}
    taken: dict[Column, str] = {}
    for name, column in overrides.items():
        if name not in _ROLE_NAMES:
            raise errors.InvalidPayload(f"columns.{name} is not known; name one of {', '.join(Role)}.", field=f"columns.{name}")
        given[_ROLE_NAMES[name]] = columns = (_named(name, column, found),) if column else ()
        if columns and (other := taken.setdefault(columns[0], name)) != name:
            message = f"columns.{other} and columns.{name} both name {column!r}; it would be counted twice."
            raise errors.InvalidPayload(message, field=f"columns.{name}", column=column)
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


def _wrapper(column: Column) -> str:
    plain = re.sub(r"[\s_\-]", "", column.name).lower()
    return next((wrapper for wrapper in _WRAPPERS if plain.startswith(wrapper)), "")


def _unusable(missing: Sequence[Role], found: Sequence[Column], line: int) -> errors.InvalidPayload:
    field, place = f"columns.{missing[0]}", {"line": line} if line else {}
    if {"results", "data"} & {column.name for column in found}:
        message = f"No usable columns: this is a page of a usage interface. Write one of its results on each line: {PAGE}"
        return errors.InvalidPayload(message, field=field, **place)
    examples = ", ".join(f"{role} ({', '.join(GENERIC[role][0][:4])}, ...)" for role in missing)
    return errors.InvalidPayload(
        f"No usable columns: none of them says {' or '.join(missing)}. Found {_listed(found)}. Needed {examples}. The first line of a CSV "
        f"names its columns; other names can be given: inputs.columns = {{{missing[0].value!r}: 'NAME'}}.",
        field=field, **place,
    )  # fmt: skip


def _listed(found: Sequence[Column]) -> str:
    names = ", ".join(column.name[:64] for column in found[:30])
    return f"{names} and {len(found) - 30} more" if len(found) > 30 else names or "no columns"
