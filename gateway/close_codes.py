"""Why a socket was closed and whether to reconnect: 4000-4499 reconnect and resume, 4500-4999 do not."""

from __future__ import annotations

from typing import NamedTuple


class Close(NamedTuple):
    """A close code of RFC 6455 and a reason for a person."""

    code: int
    reason: str


DRAINING = Close(4001, "this gateway is stopping; reconnect and resume")
SLOW_READER = Close(4002, "nothing was read for too long; reconnect and resume")
RESYNC = Close(4003, "the record was restored from a backup; reconnect")
TOKEN_EXPIRED = Close(4401, "the access token has ended; reconnect with a fresh one")
TOO_MANY_PARTS = Close(1009, "a message has at most 64 parts")
NO_PONG = Close(4408, "no pong came; reconnect and resume")
REPLACED = Close(4504, "a newer socket of the same client took over")
REVOKED = Close(4509, "the session was ended")
TOO_MANY = Close(4529, "too many sockets are open for this user")
ABUSE = Close(4530, "too many frames after being told to slow down")
