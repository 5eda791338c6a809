"""usage_load, usage_profile, cost_breakdown, spend_opportunities: the figures of a usage log, each computed in a process of its own."""

from __future__ import annotations

import uuid
from typing import Annotated, Any

from pydantic import Field

from netra.tool import ToolContext, tool
from services.dispatcher.tools.sandbox import process
from services.dispatcher.tools.spend import figures

_WORKER = "services.dispatcher.tools.spend.worker"
_TIMEOUT_S = 900.0
_USAGE = "usage.parquet"

Id = Annotated[str, Field(description="The id of the usage log: CSV, JSONL or Parquet, also gzip.")]
Again = Annotated[str, Field(description="The log to load first, with what follows, when this run has none (any more); else not used.")]
Model = Annotated[str, Field(max_length=512, description="The model of rows that name none.")]
Columns = Annotated[
    dict[str, str] | None,
    Field(
        max_length=32,
        description="Columns that are not recognised: role to name. Roles are time, end, model, user, input, output, cached,"
        " written, cache_read, cache_write, cache_write_5m, cache_write_1h, input_audio, cached_audio, output_audio, web_searches,"
        " requests, service_tier, batch, speed, batch_id; an empty name says that there is none.",
    ),
]
Timezone = Annotated[str, Field(max_length=64, description="The zone of times that name none, such as Europe/Berlin or +02:00.")]


@tool(tags=("spend",), timeout_s=_TIMEOUT_S, idempotent=True, backend="process")
async def usage_load(
    context: ToolContext, artifact_id: Id, model: Model = "", columns: Columns = None, timezone: Timezone = ""
) -> figures.Loaded:
    """Reads a usage log and checks every line of it; the other spend tools of the same run then compute its figures."""
    loaded: figures.Loaded = await _load(context, artifact_id, model, columns, timezone)
    return loaded


@tool(tags=("spend",), timeout_s=_TIMEOUT_S, idempotent=True, backend="process")
async def usage_profile(
    context: ToolContext, artifact_id: Again = "", model: Model = "", columns: Columns = None, timezone: Timezone = ""
) -> figures.UsageProfile:
    """Tells how many requests and tokens a usage log has, how large they are and when most of them came."""
    await _ready(context, artifact_id, model, columns, timezone)
    found: figures.UsageProfile = await _computed(context, "usage_profile")
    return found


@tool(tags=("spend",), timeout_s=_TIMEOUT_S, idempotent=True, backend="process")
async def cost_breakdown(
    context: ToolContext, artifact_id: Again = "", model: Model = "", columns: Columns = None, timezone: Timezone = ""
) -> figures.CostBreakdown:
    """Tells what a usage log cost by the price list, by model, day, hour and user, and what of it has no price."""
    await _ready(context, artifact_id, model, columns, timezone)
    found: figures.CostBreakdown = await _computed(context, "cost_breakdown")
    return found


@tool(tags=("spend",), timeout_s=_TIMEOUT_S, idempotent=True, backend="process")
async def spend_opportunities(
    context: ToolContext, artifact_id: Again = "", model: Model = "", columns: Columns = None, timezone: Timezone = ""
) -> figures.Opportunities:
    """Tells what the same work could cost less: each saving with its method, assumption and a way to verify it."""
    await _ready(context, artifact_id, model, columns, timezone)
    found: figures.Opportunities = await _computed(context, "spend_opportunities")
    return found


async def _load(context: ToolContext, artifact_id: str, model: str, columns: dict[str, str] | None, timezone: str) -> Any:
    # a name of its own: several calls of a run may load at the same time
    source = context.workspace / f"usage-{uuid.uuid4().hex}"
    try:
        artifact = await context.fetch(artifact_id, source)
        request = {
            "tool": "usage_load",
            "file": source.name,
            "name": artifact.name,
            "model": model,
            "named": columns or {},
            "zone": timezone,
        }
        return await process.run(_WORKER, request, cwd=context.workspace)
    finally:
        source.unlink(missing_ok=True)


async def _ready(context: ToolContext, artifact_id: str, model: str, columns: dict[str, str] | None, timezone: str) -> None:
    """Load the log where the call names one and the run has none: whoever takes a run over has its record, not its folder."""
    if artifact_id and not (context.workspace / _USAGE).exists():
        await _load(context, artifact_id, model, columns, timezone)


async def _computed(context: ToolContext, name: str) -> Any:
    return await process.run(_WORKER, {"tool": name}, cwd=context.workspace)
