"""Messages and pages: what is refused, and that a page token has one spelling."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from netra import errors, ids
from services.context import drafts, pages, threads


@pytest.mark.parametrize(
    ("role", "content", "kind", "field"),
    [
        ("system", "hello", errors.InvalidPayload, "role"),
        ("", "hello", errors.InvalidPayload, "role"),
        ("user", "", errors.InvalidPayload, "content"),
        ("user", " \n\t", errors.InvalidPayload, "content"),
        ("user", "a\0b", errors.InvalidPayload, "content"),
        ("user", "é" * (drafts.MAX_CONTENT // 2 + 1), errors.TooLarge, "content"),
    ],
)
def test_wrong_messages_are_refused_by_field(role: str, content: str, kind: type[errors.NetraError], field: str) -> None:
    with pytest.raises(kind) as refused:
        drafts.Draft(ids.RequestId("m1"), role, content)
    assert refused.value.details["field"] == field


def test_the_longest_message_is_taken_as_it_is() -> None:
    content = " " + "é" * (drafts.MAX_CONTENT // 2 - 1) + " "
    assert drafts.Draft(ids.RequestId("m1"), "assistant", content).content == content


@given(st.integers(1, 2**63 - 1))
def test_positions_survive_a_page_token(position: int) -> None:
    assert threads._position(pages.unpacked(pages.packed("m", str(position)), "m")) == position


@given(st.text(max_size=80))
def test_a_page_token_has_one_spelling(token: str) -> None:
    try:
        place = pages.unpacked(token, "m")
    except errors.InvalidPayload:
        return
    assert token == (pages.packed("m", place) if place else "")


@pytest.mark.parametrize("token", ["x", "%%%", "é", "bTo", "bTox=", "bTo x", "bTox\n"])
def test_other_page_tokens_are_refused_by_field(token: str) -> None:
    with pytest.raises(errors.InvalidPayload) as refused:
        pages.unpacked(token, "m")
    assert refused.value.details["field"] == "page_token"


@pytest.mark.parametrize("place", ["-1", "1.5", str(2**63), "9" * 40, "٣x", "x"])
def test_a_position_out_of_range_is_refused(place: str) -> None:
    with pytest.raises(errors.InvalidPayload):
        threads._position(place)


def test_a_token_of_another_list_is_refused() -> None:
    with pytest.raises(errors.InvalidPayload):
        pages.unpacked(pages.packed("t", ids.ThreadId.new()), "m")
    with pytest.raises(errors.InvalidPayload):
        threads._thread_id("not-a-uuid")


@pytest.mark.parametrize("page_size", [-1, 201, 2**31 - 1])
def test_page_size_has_limits(page_size: int) -> None:
    with pytest.raises(errors.InvalidPayload) as refused:
        pages.limit(page_size)
    assert refused.value.details["field"] == "page_size"
