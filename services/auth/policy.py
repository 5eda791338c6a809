"""The rules of role and tier as they are pushed to every process."""

from __future__ import annotations

from netra.auth.v1 import auth_pb2
from services.auth import permissions


def current() -> auth_pb2.Policy:
    """The policy in force."""
    grants = [
        auth_pb2.Grant(role=role, tier=tier, permissions=sorted(permissions.granted(role, tier)))
        for role in permissions.ROLES
        for tier in permissions.TIERS
    ]
    return auth_pb2.Policy(version=permissions.VERSION, grants=grants)
