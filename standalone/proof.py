"""One run through the gateway, with the client everybody uses: the proof that the whole works."""

from typing import Any

from standalone import folder, login
from standalone.errors import StandaloneError
from standalone.progress import Progress

AGENT = "text-analyst"
REQUEST = "Say what you find in this sentence: every event of a run is recorded before anybody sees it."
ENDS = {"agent_completed": True, "agent_failed": False, "agent_cancelled": False, "agent_timed_out": False}
WIDTH = 110
_TELLING = ("error", "result", "parameters", "reasoning", "content", "message")


async def proof(place: folder.Folder, progress: Progress) -> str:
    """Perform one run as the development user, print its events; returns the run's id.

    Raises `StandaloneError` when the run does not end in `agent_completed`.
    """
    import netra

    token = await login.access_token(place)
    last: dict[str, Any] = {}
    async with netra.connect(login.running(place)["urls"]["gateway"], token) as client:
        async for frame in client.run(AGENT, user_request=REQUEST):
            last = frame
            progress.line("  " + _line(frame))
            if frame.get("type") in ENDS:
                break
    if not ENDS.get(str(last.get("type")), False):
        raise StandaloneError(f"the proof ended with {last.get('type', 'nothing')}", f"see the logs in {place.logs}")
    return str(last.get("run_id", ""))


def _line(frame: dict[str, Any]) -> str:
    """One event on one line; what does not fit ends in dots."""
    data = frame["data"]
    told = " ".join(str(data[name]) for name in ("tool_name", *_TELLING) if data.get(name))
    text = f"{frame['seq']:>3}  {frame['type']:<18} {told}"
    return text if len(text) <= WIDTH else text[: WIDTH - 1] + "…"
