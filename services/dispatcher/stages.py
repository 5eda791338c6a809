"""The nine stages of a message on its way from the socket to the answer: which there are, and when one was passed; pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta

import orjson

RECEIVED = "message_received"
VALIDATED = "message_validated"
PERSISTED = "message_persisted"
ROUTING = "routing_to_agent"
STARTED = "agent_execution_started"
COMPLETED = "agent_execution_completed"
RESPONDED = "agent_response_received"
RESPONSE_PERSISTED = "response_persisted"
NOTIFIED = "websocket_notification_sent"
ORDER = (RECEIVED, VALIDATED, PERSISTED, ROUTING, STARTED, COMPLETED, RESPONDED, RESPONSE_PERSISTED, NOTIFIED)
# what is older is not believed: nothing waits so long between the edge and here
_OLDEST = timedelta(minutes=1)


class Passed:
    """The stages that one process saw a message pass. The first time counts."""

    def __init__(self, times: Mapping[str, datetime] | None = None) -> None:
        self.times = dict(times or {})

    def now(self, stage: str) -> None:
        """It passes a stage at this moment."""
        self.times.setdefault(stage, datetime.now(UTC))


def accepted(received: datetime | None, validated: datetime | None, now: datetime) -> Passed:
    """The first two stages, as the edge tells them; a time that cannot be is this moment."""
    first = _believed(received, now - _OLDEST, now)
    return Passed({RECEIVED: first, VALIDATED: _believed(validated, first, now)})


def _believed(told: datetime | None, earliest: datetime, now: datetime) -> datetime:
    return told if told is not None and earliest <= told <= now else now


def in_order(times: Mapping[str, datetime]) -> Iterable[tuple[str, datetime]]:
    """The stages that were passed, in the order of the way."""
    return [(stage, times[stage]) for stage in ORDER if stage in times]


def written(times: Mapping[str, datetime]) -> str:
    """As they are kept."""
    return orjson.dumps(dict(times)).decode()


def read(kept: str) -> dict[str, datetime]:
    """What `written` wrote, or the database."""
    return {stage: datetime.fromisoformat(at) for stage, at in orjson.loads(kept).items()}
