"""Messages that were not added to a thread yet; pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from netra import errors, ids

MAX_CONTENT = 256 * 1024
ROLES = ("user", "assistant")
# with the id of a run and a colon before it no longer than a request id may be
_NAME = re.compile(r"[A-Za-z0-9._:\-]{1,27}")


@dataclass(frozen=True, slots=True)
class Draft:
    """A message that was not added yet. Raises `InvalidPayload` or `TooLarge` naming the field that is wrong."""

    request_id: ids.RequestId
    role: str
    content: str

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise errors.InvalidPayload(f"role must be one of {', '.join(ROLES)}", field="role")
        if not self.content.strip():
            raise errors.InvalidPayload("content is required and must not be empty", field="content")
        if "\0" in self.content:
            raise errors.InvalidPayload("content must not have a NUL character", field="content")
        size = len(self.content.encode())
        if size > MAX_CONTENT:
            raise errors.TooLarge(f"content has {size} bytes; at most {MAX_CONTENT} are allowed", field="content")


@dataclass(frozen=True, slots=True)
class Said:
    """What a run says at its begin or its end. Under its name it is one message of the run, whoever adds it."""

    name: str
    role: str
    content: str

    def draft(self, run_id: ids.RunId) -> Draft:
        """The message of this run. Raises `InvalidPayload` or `TooLarge` naming the field that is wrong."""
        if not _NAME.fullmatch(self.name):
            raise errors.InvalidPayload(f"name must match {_NAME.pattern}", field="name")
        return Draft(ids.RequestId(f"{run_id}:{self.name}"), self.role, self.content)


@dataclass(frozen=True, slots=True)
class First:
    """A message that begins a run, with the id that it gets."""

    message_id: ids.MessageId
    draft: Draft
