"""What the domain knows, as the protocol carries it."""

from __future__ import annotations

from datetime import datetime

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from chassis import identity
from netra.auth.v1 import auth_pb2
from services.auth import sessions
from services.auth import tokens as tokens_
from services.auth import users as users_


def tokens(issued: tokens_.Issued) -> auth_pb2.Tokens:
    """What a sign-in or a refresh yields."""
    return auth_pb2.Tokens(
        access_token=issued.access_token, refresh_token=issued.refresh_token, expires_in=Duration(seconds=issued.expires_in_s),
        user_id=issued.user_id, scope=issued.scope,
    )  # fmt: skip


def principal(known: identity.Principal) -> auth_pb2.Principal:
    """Whom a token names."""
    return auth_pb2.Principal(
        user_id=known.user_id, tenant_id=known.tenant_id, session_id=known.session_id, roles=known.roles, tier=known.tier,
        scope=sorted(known.scope or ()), actor=known.actor,
    )  # fmt: skip


def session(listed: sessions.Listed, current: str) -> auth_pb2.Session:
    """An entry of the list of devices."""
    return auth_pb2.Session(
        session_id=listed.session_id, device=listed.device, method=listed.method, address=listed.address,
        created_at=stamp(listed.created_at), last_used_at=stamp(listed.last_used_at), expires_at=stamp(listed.expires_at),
        current=listed.session_id == current,
    )  # fmt: skip


def user(profile: users_.Profile) -> auth_pb2.User:
    """A user as administrators see them."""
    known = profile.user
    return auth_pb2.User(
        user_id=known.user_id, tenant_id=known.tenant_id, email=profile.email, roles=known.roles, tier=known.tier,
        version=known.version, created_at=stamp(profile.created_at), disabled_at=stamp(profile.disabled_at),
    )  # fmt: skip


def stamp(moment: datetime | None) -> Timestamp | None:
    """A time; None stays unset."""
    if moment is None:
        return None
    found = Timestamp()
    found.FromDatetime(moment)
    return found
