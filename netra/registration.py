"""A tool as a message: what is sent to register it, and what lists show."""

from __future__ import annotations

import json
from typing import Any

from google.protobuf import duration_pb2

from netra.dispatcher.v1 import dispatcher_pb2
from netra.tool import ToolSpec


def message(spec: ToolSpec, digest: str = "") -> dispatcher_pb2.Tool:
    """A tool as it is told to others; `digest` when it is known already. The names of its secrets are not told."""
    timeout = duration_pb2.Duration()
    timeout.FromMilliseconds(round(spec.timeout_s * 1000))
    return dispatcher_pb2.Tool(
        name=spec.name, version=spec.version, description=spec.description,
        input_schema=_written(spec.input_schema), output_schema=b"" if spec.output_schema is None else _written(spec.output_schema),
        tags=spec.tags, category=spec.category, permission=spec.permission, min_role=spec.min_role, min_tier=spec.min_tier,
        enforcement=spec.enforcement, timeout=timeout, retries=spec.retries, concurrency=spec.concurrency,
        side_effects=spec.side_effects, idempotent=spec.idempotent, reconciles=spec.reconcile is not None,
        fallback=spec.fallback, deprecated=spec.deprecated, digest=digest or spec.digest,
    )  # fmt: skip


def _written(schema: Any) -> bytes:
    return json.dumps(schema, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
