"""Structured log lines that carry correlation id, user id and the ids of the work at hand by themselves."""

from __future__ import annotations

import logging
import re
import sys
from typing import Any

import structlog

from chassis import settings as settings_

_SECRET_KEY = re.compile(r"password|secret|token|authorization|api_?key|credential|cookie", re.IGNORECASE)
# signed tokens, opaque ones of ours (keys, refresh, reset, login codes), passwords in addresses
_TOKEN_TEXT = re.compile(
    r"eyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]+\.[A-Za-z0-9_\-]*|n(?:ak|rt|rs|lc)_[A-Za-z0-9_\-]{20,}|://[^/@\s:]+:[^/@\s]+@"
)


def _masked(value: Any) -> Any:
    if isinstance(value, str):
        return _TOKEN_TEXT.sub("***", value)
    if isinstance(value, dict):
        return {key: "***" if names_a_secret(str(key)) else _masked(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_masked(item) for item in value]
    return value


def names_a_secret(name: str) -> bool:
    """Whether what bears this name is a secret."""
    return _SECRET_KEY.search(name) is not None


def mask(_logger: Any, _method: str, entry: Any) -> Any:
    """Replace what looks like a secret, by its key or by its shape."""
    return {**_masked(dict(entry))}


def _processors(log_format: str) -> list[Any]:
    renderer = structlog.dev.ConsoleRenderer(colors=False) if log_format == "console" else structlog.processors.JSONRenderer()
    # what is masked last includes the text of exceptions
    return [structlog.processors.format_exc_info, mask, renderer]


def set_up(service: str, settings: settings_.ProcessSettings) -> None:
    """Send structlog and the standard library's log through one line format on standard error."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        lambda _logger, _method, entry: {"service": service, **entry},
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_processors(settings.log_format)],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.root.handlers = [handler]
    logging.root.setLevel(settings.log_level.upper())
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)


def get(name: str) -> Any:
    """A logger; its lines carry what `bind` bound."""
    return structlog.stdlib.get_logger(name)


def bind(**values: str) -> None:
    """Add values to every line of the current task."""
    structlog.contextvars.bind_contextvars(**values)
