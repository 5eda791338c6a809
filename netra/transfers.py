"""Files of the command line, to the gateway and back, with their progress on a terminal."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from netra import errors, show
from netra.api import Api


async def upload(api: Api, file: Path, console: Console, thread_id: str = "") -> str:
    """Make an artifact of a file, in a thread if one is given; returns its id."""
    with show.transfer(console, f"Uploading {file.name}") as advance:
        kept = await api.upload(file, thread_id=thread_id, progress=advance)
    show.uploaded(console, kept)
    return str(kept["artifact_id"])


async def _download(api: Api, artifact_id: str, to: Path, console: Console) -> Path:
    """Write an artifact to a file; returns where."""
    to.parent.mkdir(parents=True, exist_ok=True)
    with show.transfer(console, f"Downloading {to.name}") as advance:
        await api.download(artifact_id, to, progress=advance)
    return to


async def fetch(api: Api, artifact_id: str, to: Path | None, console: Console) -> Path:
    """Write an artifact to a file, or under its own name into this folder. Raises `AlreadyExists` when that is taken."""
    if to is not None:
        return await _download(api, artifact_id, to, console)
    with tempfile.TemporaryDirectory(prefix=".netra-", dir=".") as folder, show.transfer(console, "Downloading") as advance:
        came = Path(folder) / "file"
        kept = await api.download(artifact_id, came, progress=advance)
        return came.rename(_free(kept["name"] or artifact_id))


def _free(name: str) -> Path:
    # a name comes from the gateway: it must not lead out of the folder
    chosen = Path(Path(name).name)
    if chosen.exists():
        raise errors.AlreadyExists(f"{chosen} is here already. Say with --to where to write.")
    return chosen


async def save(api: Api, files: Mapping[str, Mapping[str, Any]], folder: Path, console: Console) -> dict[str, Path]:
    """Write the files of a result into a folder, over those of an earlier run; returns where each is."""
    return {what: await _download(api, kept["artifact_id"], folder / Path(kept["name"]).name, console) for what, kept in files.items()}


async def result(api: Api, data: Mapping[str, Any]) -> Any:
    """The result in an `agent_completed`; one that was too large for its event is fetched."""
    reference = data.get("result_ref")
    if not reference:
        return data.get("result")
    with tempfile.TemporaryDirectory() as folder:
        kept = await _download(api, reference["artifact_id"], Path(folder) / "result.json", Console(quiet=True))
        return json.loads(kept.read_bytes())
