"""text-analyst: tells a text's figures and what it is about."""

from __future__ import annotations

from netra import errors
from netra.agent import Turn, agent


@agent("text-analyst")
async def analyst(turn: Turn) -> dict[str, object]:
    """Tells how long a text is, how long it takes to read and which words it is about. Input `pace_s` (0 to 60) waits before each step."""
    pace_s = _pace(turn.inputs.get("pace_s", 0))
    await turn.think("First the figures of the text, then the words it is about.", progress=0)
    await turn.sleep(pace_s)
    figures = await turn.tool("text_statistics", text=turn.request)
    await turn.think(f"The text has {figures['words']} words. Now the words that stand out.", progress=50)
    await turn.sleep(pace_s)
    keywords = await turn.tool("text_keywords", text=turn.request, limit=5)
    words = ", ".join(entry["word"] for entry in keywords["keywords"]) or "nothing in particular"
    return {
        "message": f"Words: {figures['words']}. Sentences: {figures['sentences']}. Mostly about: {words}.",
        "statistics": figures,
        "keywords": keywords["keywords"],
    }


def _pace(value: object) -> float:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            value = None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 60:
        raise errors.InvalidPayload("inputs.pace_s must be a number of seconds from 0 to 60", field="inputs.pace_s")
    return float(value)
