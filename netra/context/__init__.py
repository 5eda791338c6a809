"""The frozen frame a run executes in."""

from __future__ import annotations

from netra import ids


class UserExecutionContext:
    user_id: ids.UserId

    @classmethod
    def from_claims(cls, claims: dict[str, object]) -> UserExecutionContext:
        return cls()
