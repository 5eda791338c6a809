"""One analysis through the gateway, with the client everybody uses: the proof that the whole works."""

from typing import TYPE_CHECKING, Any

from standalone import folder, login, sample
from standalone.errors import StandaloneError
from standalone.progress import Progress

if TYPE_CHECKING:
    from netra.client import Client

AGENT = "spend-analyst"
REQUEST = "Where does the money go?"
ENDS = {"agent_completed": True, "agent_failed": False, "agent_cancelled": False, "agent_timed_out": False}
WIDTH = 110
_TELLING = ("error", "reasoning", "content", "message", "status")


async def proof(place: folder.Folder, progress: Progress) -> str:
    """Analyse the bundled log as the development user, print the events and the figures; returns the run's id.

    Raises `StandaloneError` when the run does not end in `agent_completed`.
    """
    from rich.console import Console

    import netra
    from netra import show, transfers

    token = await login.access_token(place)
    async with netra.connect(login.running(place)["urls"]["gateway"], token) as client:
        kept = await client.upload(sample.FILE)
        progress.line(f"  {sample.FILE.relative_to(folder.ROOT)} is uploaded: artifact {kept['artifact_id']}")
        last = await _run(client, kept["artifact_id"], progress)
        if not ENDS.get(str(last.get("type")), False):
            raise StandaloneError(f"the proof ended with {last.get('type', 'nothing')}", f"see the logs in {place.logs}")
        result = await transfers.result(client.api, last["data"])
        saved = await transfers.save(client.api, show.files_of(result), place.path / "sample", Console(quiet=True))
    show.report(Console(highlight=False), result, saved)
    return str(last["run_id"])


async def _run(client: "Client", artifact_id: str, progress: Progress) -> dict[str, Any]:
    """The last event."""
    last: dict[str, Any] = {}
    async for frame in client.run(AGENT, user_request=REQUEST, inputs={"artifact_id": artifact_id}):
        last = frame
        progress.line("  " + _line(frame))
    return last


def _line(frame: dict[str, Any]) -> str:
    """One event on one line; what does not fit ends in dots."""
    data = frame["data"]
    told = next((str(data[name]) for name in _TELLING if data.get(name)), "")
    words = (frame["type"].ljust(18), data["agent_name"].ljust(13), data.get("tool_name"), told)
    text = f"{frame['seq']:>3}  {' '.join(word for word in words if word)}"
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
