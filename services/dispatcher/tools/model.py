"""model: what agents ask a language model with. Until one is configured the answer is made of the prompt, the same one each time."""

from __future__ import annotations

import hashlib
import re
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from netra.tool import tool

_SENTENCE = re.compile(r"(?<=[.!?…])\s+")
_WORD = re.compile(r"\S+")
Prompt = Annotated[str, Field(min_length=1, max_length=262_144, description="What the model is asked.")]
Limit = Annotated[int, Field(ge=1, le=4096, description="The most words of an answer.")]


class Completion(TypedDict):
    """An answer, which model gave it, and how many words were read and written for it."""

    text: str
    model: str
    words_in: int
    words_out: int


@tool(tags=("model",), category="model", idempotent=True, timeout_s=60.0)
async def model(prompt: Prompt, limit: Limit = 64) -> Completion:
    """Answers a prompt. Without a language model: with its first sentence, and a mark that another prompt does not have."""
    first = _SENTENCE.split(prompt.strip(), maxsplit=1)[0]
    words = _WORD.findall(first)[:limit]
    mark = hashlib.sha256(prompt.encode()).hexdigest()[:8]
    return Completion(text=f"{' '.join(words)} [{mark}]", model="stand-in", words_in=len(_WORD.findall(prompt)), words_out=len(words))
