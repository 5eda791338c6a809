"""What the guardian of tools' processes makes of its notes: whom it ends, and in which order."""

from __future__ import annotations

import os

import pytest

from services.dispatcher.tools.sandbox import watch


def test_groups_that_are_left_are_ended_in_the_order_of_their_notes(monkeypatch: pytest.MonkeyPatch) -> None:
    killed = list[int]()
    monkeypatch.setattr(os, "killpg", lambda group, _signal: killed.append(group))
    notes, door = os.pipe()
    monkeypatch.setattr(watch, "_STDIN", notes)
    for kind, number in ((watch.GUARD, 7), (watch.GUARD, 5), (watch.GUARD, 3), (watch.RELEASE, 5), (watch.GUARD, 7), (watch.BEAT, 1)):
        os.write(door, watch.note(kind, number))
    os.close(door)
    try:
        watch.main(3600.0)
    finally:
        os.close(notes)
    assert killed == [7, 3]
