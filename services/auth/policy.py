"""The policy: its versions, what makes one valid, which one is in force."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from chassis import identity, log, rules
from netra import errors
from netra.auth.v1 import auth_pb2
from services.auth import permissions

_log = log.get(__name__)
_PERMISSION = re.compile(r"[a-z_]{1,32}:[a-z_]{1,32}", re.ASCII)
_TOOL = re.compile(r"\*|[a-z][a-z0-9_.\-]{0,63}\*?", re.ASCII)
_FEATURE = re.compile(r"[a-z][a-z0-9_]{0,63}", re.ASCII)
_MAX_BYTES = 256 * 1024
_MAX_COMMENT = 500
_SAME_TIER = {"mid": "business"}
# without these nobody could undo a change
_HOLD = frozenset({"policy:read", "policy:write"})
_BY_US = "netra"


@dataclass(frozen=True, slots=True)
class Version:
    """A version as it is kept. `defaults` is the version of the tables of `permissions` that it was made of; 0 for a person's."""

    version: int
    document: bytes
    actor: str
    comment: str
    defaults: int
    created_at: datetime


class Kept(Protocol):
    """Where the versions are kept; the highest one is in force."""

    async def latest(self) -> int:
        """The highest version; 0 when there is none."""
        ...

    async def get(self, version: int) -> Version | None:
        """One version."""
        ...

    async def add(self, version: int, document: bytes, *, actor: str, comment: str, defaults: int, user_id: str | None) -> bool:
        """Add a version, and to the record that the user did. False when there is such a version by now."""
        ...

    async def page(self, before: int, most: int) -> list[Version]:
        """Versions, newest first, older than `before`; all when it is 0."""
        ...


class Policies:
    """Every replica of auth reads the same rows; the database decides whose change comes first."""

    def __init__(self, rows: Kept) -> None:
        self._rows = rows
        self._in_force = auth_pb2.Policy()

    async def prepare(self) -> None:
        """Put the tables of `permissions` in force where no other policy is, or where it is an older state of these tables."""
        latest = await self._rows.latest()
        known = await self._rows.get(latest) if latest else None
        if known is not None and not 0 < known.defaults < permissions.VERSION:
            if known.defaults == 0:
                _warn_of_missing(auth_pb2.Policy.FromString(known.document))
            return
        comment = "the defaults" if known is None else "the defaults of a newer release"
        # where another replica was faster, it did the same
        await self._rows.add(latest + 1, _written(default()), actor=_BY_US, comment=comment, defaults=permissions.VERSION, user_id=None)

    async def load(self) -> auth_pb2.Policy:
        """The policy in force, as it is now in the database."""
        latest = await self._rows.latest()
        if latest != self._in_force.version:
            self._in_force = await self.get(latest)
            _log.info("another policy is in force", version=latest)
        return self._in_force

    async def get(self, version: int) -> auth_pb2.Policy:
        """One version; 0 is the one in force. Raises `NotFound`."""
        found = await self._rows.get(version or await self._rows.latest())
        if found is None:
            raise errors.NotFound("There is no such version of the policy.", field="version")
        return _read(found)

    async def update(self, wanted: auth_pb2.Policy, expected_version: int, comment: str, by: identity.Principal, actor: str) -> int:
        """Put a policy in force; returns its version. Raises `InvalidPayload`, or `FailedPrecondition` when another is in force."""
        document = _written(checked(wanted))
        if expected_version != await self._rows.latest():
            raise await self._overtaken()
        return await self._add(expected_version + 1, document, comment, by, actor)

    async def revert(self, version: int, comment: str, by: identity.Principal, actor: str) -> int:
        """Put an earlier version in force again, as a new one; returns its number."""
        found, latest = await self._rows.get(version), await self._rows.latest()
        if found is None:
            raise errors.NotFound("There is no such version of the policy.", field="version")
        note = f"back to version {version}"
        return await self._add(latest + 1, found.document, f"{note}: {comment}" if comment else note, by, actor)

    async def versions(self, before: int, most: int) -> list[Version]:
        """The history, newest first, older than `before`; from the newest on when it is 0."""
        return await self._rows.page(before, most)

    async def _add(self, version: int, document: bytes, comment: str, by: identity.Principal, actor: str) -> int:
        if len(comment) > _MAX_COMMENT or "\0" in comment:
            raise errors.InvalidPayload(f"comment must be a text of at most {_MAX_COMMENT} characters", field="comment")
        _require_hold(auth_pb2.Policy.FromString(document), by)
        if not await self._rows.add(version, document, actor=actor, comment=comment, defaults=0, user_id=by.user_id):
            raise await self._overtaken()
        return version

    async def _overtaken(self) -> errors.FailedPrecondition:
        latest = await self._rows.latest()
        message = f"Version {latest} of the policy is in force. Look at it, then send your change with expected_version {latest}."
        return errors.FailedPrecondition(message, field="expected_version", version=latest)


def default() -> auth_pb2.Policy:
    """The policy of an installation that has not changed it."""
    grants = [
        auth_pb2.Grant(role=role, tier=tier, permissions=sorted(permissions.granted(role, tier)))
        for role in permissions.ROLES
        for tier in permissions.TIERS
    ]
    limits = [auth_pb2.TierLimits(tier=tier, single_session=False, **permissions.LIMITS[tier]) for tier in permissions.TIERS]
    features = [auth_pb2.FeatureRule(feature=feature, tiers=tiers) for feature, tiers in sorted(permissions.FEATURES.items())]
    return auth_pb2.Policy(grants=grants, limits=limits, features=features)


def checked(wanted: auth_pb2.Policy) -> auth_pb2.Policy:
    """The same policy in its one form. Raises `InvalidPayload` naming the place that is wrong."""
    grants = [_grant(grant, f"policy.grants[{at}]") for at, grant in enumerate(wanted.grants)]
    limits = [_limits(limit, f"policy.limits[{at}]") for at, limit in enumerate(wanted.limits)]
    tools = [_tool(rule, f"policy.tools[{at}]") for at, rule in enumerate(wanted.tools)]
    features = [_feature(rule, f"policy.features[{at}]") for at, rule in enumerate(wanted.features)]
    _once((f"{grant.role} in {grant.tier}" for grant in grants), "policy.grants")
    _once((limit.tier for limit in limits), "policy.limits")
    _once((rule.tool for rule in tools), "policy.tools")
    _once((rule.feature for rule in features), "policy.features")
    if missing := set(permissions.TIERS) - {limit.tier for limit in limits}:
        raise _wrong("policy.limits", f"must name every tier; missing: {', '.join(sorted(missing))}")
    return auth_pb2.Policy(grants=grants, limits=limits, tools=tools, features=features)


def _grant(grant: auth_pb2.Grant, place: str) -> auth_pb2.Grant:
    _roles([grant.role], f"{place}.role")
    for permission in grant.permissions:
        _fits(_PERMISSION, permission, f"{place}.permissions", "names like runs:write")
    return auth_pb2.Grant(role=grant.role, tier=_tier(grant.tier, f"{place}.tier"), permissions=sorted(set(grant.permissions)))


def _limits(limit: auth_pb2.TierLimits, place: str) -> auth_pb2.TierLimits:
    for field, value in limit.ListFields():
        if field.name != "tier" and value < 0:
            raise _wrong(f"{place}.{field.name}", "must not be negative; 0 means none at all")
    found = auth_pb2.TierLimits()
    found.CopyFrom(limit)
    found.tier = _tier(limit.tier, f"{place}.tier")
    return found


def _tool(rule: auth_pb2.ToolRule, place: str) -> auth_pb2.ToolRule:
    _fits(_TOOL, rule.tool, f"{place}.tool", "the name of a tool, or its beginning and one * at the end")
    if rule.permission:
        _fits(_PERMISSION, rule.permission, f"{place}.permission", "a name like data:read")
    _roles(rule.roles, f"{place}.roles")
    tiers = _tiers(rule.tiers, f"{place}.tiers")
    return auth_pb2.ToolRule(tool=rule.tool, permission=rule.permission, tiers=tiers, roles=sorted(set(rule.roles)))


def _feature(rule: auth_pb2.FeatureRule, place: str) -> auth_pb2.FeatureRule:
    _fits(_FEATURE, rule.feature, f"{place}.feature", "a name of lower-case letters, digits and _")
    return auth_pb2.FeatureRule(feature=rule.feature, tiers=_tiers(rule.tiers, f"{place}.tiers"))


def _roles(roles: Iterable[str], place: str) -> None:
    if not set(roles) <= set(permissions.ROLES):
        raise _wrong(place, f"must be out of {', '.join(permissions.ROLES)}")


def _tiers(tiers: Iterable[str], place: str) -> list[str]:
    found = {_tier(tier, place) for tier in tiers}
    return [tier for tier in permissions.TIERS if tier in found]


def _tier(tier: str, place: str) -> str:
    found = _SAME_TIER.get(tier, tier)
    if found not in permissions.TIERS:
        raise _wrong(place, f"must be out of {', '.join(permissions.TIERS)}")
    return found


def _fits(form: re.Pattern[str], text: str, place: str, what: str) -> None:
    if not form.fullmatch(text):
        raise _wrong(place, f"must be {what}")


def _once(names: Iterable[str], place: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise _wrong(place, f"names {name} more than once")
        seen.add(name)


def _wrong(place: str, what: str) -> errors.InvalidPayload:
    return errors.InvalidPayload(f"{place} {what}", field=place)


def _require_hold(wanted: auth_pb2.Policy, by: identity.Principal) -> None:
    compiled = rules.Rules(wanted)
    if not compiled.permissions(by.roles, by.tier) >= _HOLD:
        needed = " and ".join(sorted(_HOLD))
        raise _wrong("policy.grants", f"must leave {needed} to your own role and tier: you could not take this change back")
    # without requests the edge refuses everything, and with it the way back
    if compiled.limits(by.tier).requests_per_minute < 1:
        raise _wrong("policy.limits", "must leave requests_per_minute of at least 1 to your own tier: you could not take this change back")


def _warn_of_missing(policy: auth_pb2.Policy) -> None:
    granted: set[str] = set()
    for grant in policy.grants:
        granted |= set(grant.permissions)
    if missing := permissions.ALL - granted:
        # a release that knows more than the one this policy was made with
        _log.warning("the policy in force grants some permissions to nobody", permissions=sorted(missing))


def _written(policy: auth_pb2.Policy) -> bytes:
    document = policy.SerializeToString(deterministic=True)
    if len(document) > _MAX_BYTES:
        raise errors.TooLarge(f"policy must be at most {_MAX_BYTES} bytes", field="policy")
    return document


def _read(found: Version) -> auth_pb2.Policy:
    policy = auth_pb2.Policy.FromString(found.document)
    policy.version = found.version
    return policy
