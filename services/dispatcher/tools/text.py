"""text_statistics and text_keywords: what can be said of a text by counting."""

from __future__ import annotations

import collections
import re
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict

from netra.tool import tool

_WORD = re.compile(r"[^\W_]+(?:['\u2019\-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?…]+")
# the hundred most frequent words of English carry no subject; a length of four or more drops most of them
_COMMON = frozenset(
    "about after also back because been before being between both came come could does down each even every from give good have"
    " here into just know like look made make many more most much must only other over said same should some such take than that"
    " their them then there these they thing this those time very want well went were what when where which while will with"
    " would year your".split()
)
_WORDS_PER_MINUTE = 238  # adults reading English silently: Brysbaert, 2019
Text = Annotated[str, Field(max_length=262_144, description="The text.")]


class Statistics(TypedDict):
    """The figures of a text."""

    characters: int
    words: int
    unique_words: int
    sentences: int
    longest_word: str
    reading_time_s: float


class Keyword(TypedDict):
    """A word and how often it occurs."""

    word: str
    count: int


class Keywords(TypedDict):
    """Words by frequency."""

    keywords: list[Keyword]


@tool(tags=("text",), idempotent=True)
async def text_statistics(text: Text) -> Statistics:
    """Counts the characters, words and sentences of a text and estimates how long it takes to read."""
    words = _WORD.findall(text)
    return Statistics(
        characters=len(text),
        words=len(words),
        unique_words=len({word.casefold() for word in words}),
        sentences=sum(1 for part in _SENTENCE_END.split(text) if part.strip()),
        longest_word=max(words, key=len, default=""),
        reading_time_s=round(len(words) / _WORDS_PER_MINUTE * 60, 1),
    )


@tool(tags=("text",), idempotent=True)
async def text_keywords(text: Text, limit: Annotated[int, Field(ge=1, le=50)] = 10) -> Keywords:
    """Lists the most frequent words of a text, leaving out short and very common ones."""
    words = (word.casefold() for word in _WORD.findall(text))
    counts = collections.Counter(word for word in words if len(word) > 3 and word not in _COMMON)
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return Keywords(keywords=[Keyword(word=word, count=count) for word, count in ranked[:limit]])
