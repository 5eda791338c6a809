"""Frames of worker processes: they come whole however they are cut, and what is none is refused."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.dispatcher.tools.sandbox import frames

SMALL = st.binary(max_size=30)
# around the length from which a frame is written where it stays
LARGE = st.integers(65_530, 65_545).map(lambda size: bytes(range(256)) * (size // 256) + b"x" * (size % 256))


def received(sent: bytes, cuts: list[int]) -> list[tuple[bytes, bytes]]:
    """The frames that come out when bytes come in portions of these sizes, over and over."""
    incoming, found, start = frames.Incoming(), [], 0
    while start < len(sent):
        space = incoming.space()
        portion = sent[start : start + min(cuts[start % len(cuts)], len(space))]
        space[: len(portion)] = portion
        start += len(portion)
        found += [(kind, bytes(text)) for kind, text in incoming.filled(len(portion))]
    return found


@given(texts=st.lists(SMALL, max_size=5), cuts=st.lists(st.integers(1, 40), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_frames_are_whole_however_they_come(texts: list[bytes], cuts: list[int]) -> None:
    sent = b"".join(frames.frame(frames.RESULT, text) for text in texts)
    assert received(sent, cuts) == [(frames.RESULT, text) for text in texts]


@given(texts=st.lists(SMALL | LARGE, max_size=4), cuts=st.lists(st.integers(5_000, 100_000), min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_large_ones_are_whole_too(texts: list[bytes], cuts: list[int]) -> None:
    sent = b"".join(frames.frame(frames.RESULT, text) for text in texts)
    assert received(sent, cuts) == [(frames.RESULT, text) for text in texts]


def test_no_more_is_taken_at_a_time_than_a_chunk() -> None:
    incoming = frames.Incoming()
    incoming.space()[: frames.HEAD_BYTES] = frames.frame(frames.RESULT, b"x" * 200_000)[: frames.HEAD_BYTES]
    assert list(incoming.filled(frames.HEAD_BYTES)) == []
    assert len(incoming.space()) == 64 * 1024


def test_what_is_larger_than_anything_may_be_is_refused() -> None:
    incoming = frames.Incoming()
    incoming.space()[:5] = b"\xff\xff\xff\xff."
    with pytest.raises(frames.Broken, match="4294967295 bytes"):
        list(incoming.filled(5))


def test_a_last_answer_is_known_as_such() -> None:
    assert frames.ends(frames.LAST[frames.RESULT]) == (frames.RESULT, True)
    assert frames.ends(frames.RESULT) == (frames.RESULT, False)
